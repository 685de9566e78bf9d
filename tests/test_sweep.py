"""Sweeps: killed and resumed, no trial is lost or made twice; machines share one search."""

import json
import random
import time
from collections import Counter
from importlib import metadata

import pytest
from helpers import PROGRAMS, PROVE, codex, counts, flags, run_record, start, train_steps

import codex_nb.experiments.launch as launch
import codex_nb.experiments.sweep as sweeps
from codex_nb.core.config import ConfigError
from codex_nb.run.settings import SweepConfig

SMALL = dict(
    width=32,
    seq_len=32,
    batch_size=4,
    eval_every=20,
    save_every=10,
    keep_last=2,
    eval_documents=4,
    max_documents=4,
    max_new_tokens=4,
    resamples=100,
    vocab_size=400,
)
RANGE = ["-s", "lr=1e-3..1e-2:log"]


def sweep(folder, *more, steps=40):
    "The words of a command that sweeps."
    given = flags(SMALL | dict(steps=steps))
    return ["codex-nb", "sweep", "train", *given, "--folder", folder, *more]


def trials(folder):
    "Number -> run folder, of those that have begun."
    found = folder.parent.glob(f"{folder.name}-trial-*")
    return {p.name.rpartition("-")[2]: p for p in found if (p / "config.json").exists()}


def finished(folder):
    return {n: p for n, p in trials(folder).items() if (p / "manifest.json").exists()}


def outcome(trial):
    "What a trial computed, when it was sealed, and how it ended."
    m = json.loads((trial / "manifest.json").read_text())
    return m["digest"], m["created"], m["meta"]["status"]


def kill_and_resume(folder, home, more, kills):
    "Run a sweep that is killed several times; outcomes of its trials."
    rng, before = random.Random(len(more)), {}
    p = start(*sweep(folder, *more), home=home, fresh=PROVE)
    for _ in range(kills):
        end = time.monotonic() + 180
        while len(finished(folder)) < len(before) + 1 and p.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 6) if PROVE else 1)
        if p.poll() is not None:
            break
        before = {n: outcome(trial) for n, trial in finished(folder).items()}
        p.kill()
        p.communicate()
        p = start("codex-nb", "resume", folder, home=home, fresh=PROVE)
    out, err = p.communicate(timeout=400)
    assert p.returncode == 0, out + err
    after = {n: outcome(trial) for n, trial in finished(folder).items()}
    assert {n: after[n] for n in before} == before, "a finished trial was made again"
    return after


@pytest.mark.skipif(not PROVE, reason="a search that is killed, the next test, in `make test`")
def test_killed_grid_resumes_without_a_lost_or_repeated_trial(tmp_path):
    folder = tmp_path / "runs" / "rates"
    rates = ["8e-3", "4e-3"][: counts(1, 2)]
    more = ["-g", f"lr={','.join(rates)}", "-g", "seed=0..1", "--jobs", counts(1, 2)]
    after = kill_and_resume(folder, tmp_path, more, counts(1, 8))
    assert sorted(after) == [f"{i:03}" for i in range(2 * len(rates))]
    assert {status for _, _, status in after.values()} == {"finished"}
    assert trials(folder).keys() == after.keys()
    for trial in trials(folder).values():
        assert train_steps(trial) == list(range(1, 41))
    assert codex("verify", folder, home=tmp_path).returncode == 0
    rows = json.loads(codex("leaderboard", "rates", "--json", home=tmp_path).stdout)
    assert sorted(r["parameters"]["lr"] for r in rows) == sorted(map(float, rates))
    for r in rows:
        assert r["over"] == "seeds" and len(r["trials"]) == 2
        assert r["low"] <= r["value"] <= r["high"]
    if PROVE:  # the same as a sweep that nobody killed
        straight = tmp_path / "runs" / "straight"
        done = codex(*sweep(straight, *more)[1:], home=tmp_path)
        assert done.returncode == 0, done.stderr
        digests = {n: outcome(trial)[0] for n, trial in finished(straight).items()}
        assert digests == {n: digest for n, (digest, _, _) in after.items()}


def test_killed_search_resumes_with_every_trial_told_once(tmp_path):
    import optuna

    folder, n = tmp_path / "runs" / "search", counts(2, 8)
    more = [*RANGE, "--trials", n, "--jobs", counts(1, 2)]
    after = kill_and_resume(folder, tmp_path, more, counts(1, 5))
    assert sorted(after) == [f"{i:03}" for i in range(n)]
    assert trials(folder).keys() == after.keys()
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'study.db'}")
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * len(after)
    for t in study.trials:
        trial = trials(folder)[f"{t.number:03}"]
        lr = run_record(trial)["config"]["optim"]["lr"]
        assert lr == t.params["lr"] and 1e-3 <= lr <= 1e-2
        (summary,) = trial.glob("evaluations/*/summary.json")
        assert json.loads(summary.read_text())["metrics"]["bits_per_byte"]["value"] == t.value
    assert len({t.params["lr"] for t in study.trials}) == len(after)


def test_processes_that_ask_at_the_same_moment_share_out_the_trials(tmp_path):
    "Four in two workspaces open one empty database together and make 30 trials, each once."
    program = PROGRAMS / "search_together.py"
    for k in range(counts(1, 5)):
        url = f"sqlite:///{tmp_path / f'{k}.db'}"
        processes = [
            start("python", program, url, tmp_path / str(k) / where / "s", 30, home=tmp_path)
            for where in "aabb"
        ]
        for p in processes:
            assert p.stdout.readline() == "ready\n", p.stderr.read()
        for p in processes:
            p.stdin.write("\n")
            p.stdin.flush()
        texts = [p.communicate(timeout=200) for p in processes]
        assert [p.returncode for p in processes] == [0] * 4, texts
        assert sorted(n for out, _ in texts for n in json.loads(out)) == list(range(30))


@pytest.mark.skipif(not PROVE, reason="one machine and several processes, above; in `make prove`")
def test_two_machines_search_together(tmp_path):
    "Two workspaces and one database: so many trials in all, none in both."
    n, url = counts(2, 12), f"sqlite:///{tmp_path / 'shared.db'}"
    more, processes = [*RANGE, "--trials", n, "--study", url], []
    for name in ("one", "two"):
        home = tmp_path / name
        home.mkdir()
        words = sweep(home / "runs" / "s", *more, steps=10)
        processes.append(start(*words, home=home, fresh=PROVE))
    texts = [p.communicate(timeout=400) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], texts
    made = [sorted(finished(tmp_path / name / "runs" / "s")) for name in ("one", "two")]
    assert sorted(made[0] + made[1]) == [f"{i:03}" for i in range(n)], made


def test_sweep_that_cannot_be_is_refused_with_nothing_written(tmp_path):
    def error(*more, **env):
        done = codex("sweep", "train", *more, home=tmp_path / "home", **env)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    assert "did you mean epochs?" in error("-g", "epohcs=1,2")
    assert "give a grid" in error()
    assert not list(tmp_path.iterdir())
    blocked = tmp_path / "block" / "optuna"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('blocked')")
    words = [*RANGE, "--trials", "2"]
    assert "pip install 'codex_nb[sweep]'" in error(*words, PYTHONPATH=str(blocked.parent))


def test_a_large_grid_is_checked_once_and_says_how_far_it_is(monkeypatch, capsys):
    asked = Counter()

    def counted(module, name):
        original = getattr(module, name)

        def call(*args, **more):
            asked[name] += 1
            return original(*args, **more)

        monkeypatch.setattr(module, name, call)

    with pytest.raises(ConfigError, match=r"seed=0\.\.200000: 200,001 values.* at most 100,000"):
        sweeps.parse_grid(["seed=0..200000"])
    grid = sweeps.parse_grid(["seed=0..499", "lr=1e-3,3e-4,1e-4"])
    cfg = SweepConfig.check(preset="empty", grid=grid | {"batch_size": [*range(1, 101)]})
    with pytest.raises(ConfigError, match="grid: 150,000 trials, and at most 100,000"):
        sweeps.check_sweep(cfg)
    cfg = SweepConfig.check(preset="empty", grid=grid)
    counted(launch, "find_secrets")
    counted(launch, "looks_secret")
    counted(metadata, "entry_points")
    monkeypatch.setattr(sweeps, "PROGRESS_SECONDS", 0)
    assert sweeps.check_sweep(cfg) == 1500
    assert asked["find_secrets"] == 2 and asked["entry_points"] <= 1, asked
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "checked 1,499 of 1,500 trials", lines[-1]
    secret = grid | {"data": ["sample", "https://me:" + "a-secret-word@example.org/x"]}
    with pytest.raises(ConfigError, match="data: the value looks like a secret"):
        sweeps.check_sweep(SweepConfig.check(preset="empty", grid=secret))


def test_trial_that_cannot_resume_stops_the_worker_and_stays_interrupted(
    tmp_path, monkeypatch, capsys
):
    "Its search is not told that it failed, and no other trial is begun."
    from codex_nb.experiments import sweep as module
    from codex_nb.experiments.launch import Outcome
    from codex_nb.run.run_folder import Run, run_status
    from codex_nb.run.settings import RunConfig, SweepConfig

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    monkeypatch.setattr(module, "die_with_parent", lambda: None)
    cfg = SweepConfig.check("empty", grid={"lr": [1e-3, 2e-3]}, given={"preset": "smoke"})
    run = Run.start("sweep", cfg, folder=tmp_path / "runs" / "rates")
    trial = module.trial_folder(run.folder, 0)
    Run.start("train", RunConfig.check("smoke", lr=1e-3), folder=trial).lock.release()
    refused = Outcome(trial, "interrupted", 1, "ReadError: data: there is no such file")
    monkeypatch.setattr(module, "resume", lambda folder: refused)
    assert module.run_sweep_worker(run.folder) == 1
    assert "trial 0: ReadError: data: there is no such file" in capsys.readouterr().err
    assert run_status(trial) == "interrupted"
    assert not module.trial_folder(run.folder, 1).exists()
    run.lock.release()
