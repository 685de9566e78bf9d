"""Sweeps: killed and continued, no trial is lost or made twice; several processes and machines share one search."""

import json
import os
import random
import subprocess
import time

from test_launch import BIN, ROOT

PROVE = bool(os.environ.get("PROVE"))
SMALL = [
    w
    for p in "width 32,seq_len 32,batch_size 4,eval_every 20,save_every 10,keep_last 2,eval_documents 4,max_documents 4,max_new_tokens 4,resamples 100,vocab_size 400".split(
        ","
    )
    for w in ("-p", *p.split())
]


def words(folder, *more, steps=40):
    return [
        BIN / "codex-nb",
        "sweep",
        "train",
        *SMALL,
        "-p",
        "steps",
        str(steps),
        "--folder",
        str(folder),
        *more,
    ]


def env(home):
    return os.environ | {"CODEX_NB_HOME": str(home), "OMP_NUM_THREADS": "1"}


def trials(folder):
    return {
        p.name.rpartition("-")[2]: p
        for p in folder.parent.glob(f"{folder.name}-trial-*")
        if (p / "config.json").exists()
    }


def finished(folder):
    return {n: p for n, p in trials(folder).items() if (p / "manifest.json").exists()}


def outcome(p):  # what the trial computed, and when it was sealed
    m = json.loads((p / "manifest.json").read_text())
    return m["digest"], m["created"], m["meta"]["status"]


def killed_and_continued(folder, home, more, kills, steps=40):
    rng, before = random.Random(len(more)), {}
    p = subprocess.Popen(
        words(folder, *more, steps=steps),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=env(home),
    )
    for k in range(kills):
        end = time.monotonic() + 180
        while len(finished(folder)) < len(before) + 1 and p.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 6) if PROVE else 4)
        if p.poll() is not None:
            break
        before = {n: outcome(q) for n, q in finished(folder).items()}
        p.kill()
        p.communicate()
        p = subprocess.Popen(
            [BIN / "codex-nb", "resume", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=env(home),
        )
    out, err = p.communicate(timeout=400)
    assert p.returncode == 0, out + err
    after = {n: outcome(q) for n, q in finished(folder).items()}
    assert {n: after[n] for n in before} == before, "a finished trial was made again"
    return after


def test_a_grid_that_is_killed(tmp_path):
    folder = tmp_path / "runs" / "rates"
    rates = ["8e-3", "4e-3"][: 2 if PROVE else 1]
    more = ["-g", f"lr={','.join(rates)}", "-g", "seed=0..1", "--jobs", "2" if PROVE else "1"]
    after = killed_and_continued(folder, tmp_path, more, 8 if PROVE else 1)
    assert (
        sorted(after) == [f"{i:03}" for i in range(2 * len(rates))]
        and {s for _, _, s in after.values()} == {"finished"}
        and trials(folder).keys() == after.keys()
    )
    for p in trials(folder).values():
        assert [
            r["step"]
            for l in (p / "metrics.ndjson").read_text().splitlines()
            if (r := json.loads(l))["split"] == "train"
        ] == list(range(1, 41))
    assert (
        subprocess.run(
            [BIN / "codex-nb", "verify", folder], capture_output=True, env=env(tmp_path), cwd=ROOT
        ).returncode
        == 0
    )
    rows = json.loads(
        subprocess.run(
            [BIN / "codex-nb", "leaderboard", "rates", "--json"],
            capture_output=True,
            text=True,
            env=env(tmp_path),
            cwd=ROOT,
        ).stdout
    )
    assert sorted(r["parameters"]["lr"] for r in rows) == sorted(map(float, rates)) and all(
        r["over"] == "seeds" and len(r["trials"]) == 2 and r["low"] <= r["value"] <= r["high"]
        for r in rows
    )
    if PROVE:  # the same as a sweep that nobody killed
        subprocess.run(
            words(tmp_path / "runs" / "straight", *more),
            check=True,
            capture_output=True,
            cwd=ROOT,
            env=env(tmp_path),
        )
        assert {n: outcome(p)[0] for n, p in finished(tmp_path / "runs" / "straight").items()} == {
            n: d for n, (d, _, _) in after.items()
        }


def test_a_search_that_is_killed(tmp_path):
    import optuna

    folder = tmp_path / "runs" / "search"
    after = killed_and_continued(
        folder,
        tmp_path,
        [
            "-s",
            "lr=1e-3..1e-2:log",
            "--trials",
            "8" if PROVE else "2",
            "--jobs",
            "2" if PROVE else "1",
        ],
        5 if PROVE else 1,
    )
    assert (
        sorted(after) == [f"{i:03}" for i in range(8 if PROVE else 2)]
        and trials(folder).keys() == after.keys()
    )
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'study.db'}")
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * len(after)
    for t in study.trials:
        said = json.loads((trials(folder)[f"{t.number:03}"] / "config.json").read_text())["config"]
        assert said["optim"]["lr"] == t.params["lr"] and 1e-3 <= t.params["lr"] <= 1e-2
        (summary,) = trials(folder)[f"{t.number:03}"].glob("evaluations/*/summary.json")
        assert json.loads(summary.read_text())["metrics"]["bits_per_byte"]["value"] == t.value
    assert len({t.params["lr"] for t in study.trials}) == len(after)


ASKS = """
import json, sys, time
from pathlib import Path
import optuna, sqlalchemy
from codex_nb.run.settings import SweepConfig
from codex_nb.experiments.sweep import Search
url, folder, n = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
cfg = SweepConfig.from_dict({"of": "train", "space": {"lr": {"low": 1e-3, "high": 1e-2, "log": True}}, "trials": n, "study": url})
folder.mkdir(parents=True, exist_ok=True)
print("ready", flush=True); sys.stdin.readline()
search, made = Search(cfg, folder), []
for t in search.take(): made.append(t.number); search.told(t, 0.5)
print(json.dumps(made))
"""


def test_many_ask_at_the_same_moment(tmp_path):
    "Four processes in two workspaces open one empty database together and finish 30 trials: each trial is made once. Nothing is trained."
    for k in range(5 if PROVE else 1):
        url = f"sqlite:///{tmp_path / f'{k}.db'}"
        hands = [
            subprocess.Popen(
                [BIN / "python", "-c", ASKS, url, tmp_path / str(k) / where / "s", "30"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                env=env(tmp_path),
            )
            for where in "aabb"
        ]
        for p in hands:
            assert p.stdout.readline() == "ready\n", p.stderr.read()
        for p in hands:
            p.stdin.write("\n")
            p.stdin.flush()
        said = [p.communicate(timeout=200) for p in hands]
        assert [p.returncode for p in hands] == [0] * 4, said
        assert sorted(n for out, _ in said for n in json.loads(out)) == list(range(30))


def test_two_machines_search_together(tmp_path):
    "Two workspaces and one database: so many trials in all, none in both."
    n, url = 12 if PROVE else 2, f"sqlite:///{tmp_path / 'shared.db'}"
    more = ["-s", "lr=1e-3..1e-2:log", "--trials", str(n), "--study", url]
    hands = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        hands.append(
            subprocess.Popen(
                words(tmp_path / name / "runs" / "s", *more, steps=10),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=env(tmp_path / name),
            )
        )
    said = [p.communicate(timeout=400) for p in hands]
    assert [p.returncode for p in hands] == [0, 0], said
    made = [sorted(finished(tmp_path / name / "runs" / "s")) for name in ("one", "two")]
    assert sorted(made[0] + made[1]) == [f"{i:03}" for i in range(n)], made


def test_what_cannot_be_swept(tmp_path):
    def said(*more, **kw):
        done = subprocess.run(
            [BIN / "codex-nb", "sweep", "train", *more],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=env(tmp_path) | kw,
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    assert "did you mean epochs?" in said("-g", "epohcs=1,2")
    assert "give a grid" in said()
    assert not list(tmp_path.iterdir())
    (tmp_path / "block" / "optuna").mkdir(parents=True)
    (tmp_path / "block" / "optuna" / "__init__.py").write_text("raise ImportError('blocked')")
    assert "pip install 'codex_nb[sweep]'" in said(
        "-s", "lr=1e-3..1e-2:log", "--trials", "2", PYTHONPATH=str(tmp_path / "block")
    )
