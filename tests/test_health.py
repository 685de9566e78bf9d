"""A run that goes wrong is recognised, once; a healthy one is left in peace."""

import json
from pathlib import Path

import pytest

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "health.json").read_text())
SMALL = dict(width=32, layers=1, seq_len=32, batch_size=4, steps=50, eval_every=50, save_every=50)
SMALL |= dict(optimizer="adamw", max_new_tokens=2, monitor=False, device="cpu")


def ask(recorded, fresh=True):
    "Rule -> the first step at which it speaks, asked after each tenth step of a recorded run."
    from codex_nb.run.health import History, high_learning_rate, overfitting, plateau

    rules = dict(overfitting=overfitting, plateau=plateau)
    rules["learning-rate"] = lambda h: high_learning_rate(h, fresh)
    h, found, evaluations = History(), {}, dict(recorded["validation"])
    for step, values in enumerate(zip(recorded["loss"], recorded["grad_norm"]), 1):
        values = dict(zip(("loss", "grad_norm"), values))
        h.add({"step": step, "split": "train", "values": values})
        if step in evaluations:
            values = {"loss": evaluations[step]}
            h.add({"step": step, "split": "validation", "values": values})
        if step % 10 == 0:
            found |= {n: step for n, rule in rules.items() if n not in found and rule(h)}
    return found


@pytest.mark.parametrize("name", [n for n, run in RECORDED.items() if not run["sick"]])
def test_no_rule_speaks_of_a_healthy_run(name):
    assert ask(RECORDED[name]) == {}
    assert ask(RECORDED[name], fresh=False) == {}


@pytest.mark.parametrize("name", [n for n, run in RECORDED.items() if run["sick"]])
def test_a_sick_run_is_recognised(name):
    assert set(ask(RECORDED[name])) == {RECORDED[name]["sick"]}


def test_noise_alone_makes_no_rule_speak():
    import numpy as np

    for seed in range(20):
        drawn = np.random.default_rng(seed)
        steps = np.arange(1, 3001)
        loss = 2 + 5 * steps**-0.35 + 0.3 * drawn.standard_t(4, 3000)
        norm = np.exp(0.5 * drawn.standard_normal(3000))
        validation = 2.1 + 5 * steps[99::100] ** -0.35 + 0.01 * drawn.standard_normal(30)
        recorded = dict(loss=loss.tolist(), grad_norm=norm.tolist())
        recorded["validation"] = [*zip(steps[99::100].tolist(), validation.tolist())]
        assert ask(recorded, fresh=False) == {}, seed


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    "A run whose learning rate is too high, the same run without a monitor, and what both printed."
    import contextlib
    import io

    from codex_nb.run.health import HealthMonitor
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.settings import RunConfig

    home, printed = tmp_path_factory.mktemp("health"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODEX_NB_HOME", str(home))
        for name in ("watched", "alone"):
            if name == "alone":
                patch.setattr(HealthMonitor, "check", lambda self, state: None)
            cfg = RunConfig.from_preset("smoke", lr=1.0, spike=0.0, **SMALL)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                train_and_judge(cfg, home / name, judged=False)
            printed[name] = out.getvalue()
    return home, printed


def test_a_sick_run_says_so_once_and_records_it(sick):
    from codex_nb.run.health import health_notes

    home, printed = sick
    (note,) = health_notes(home / "watched")
    assert note.rule == "learning-rate" and note.step == 40 and "give a lower lr" in note.text
    assert printed["watched"].count(f"note: learning-rate: {note.text}\n") == 1
    assert printed["watched"].count("note: learning-rate") == 1
    assert health_notes(home / "alone") == []


def test_notes_change_no_digest_and_the_run_verifies(sick):
    from codex_nb.core.artifacts import read_manifest
    from codex_nb.experiments.verify import verify_run

    home, _ = sick
    assert read_manifest(home / "watched").digest == read_manifest(home / "alone").digest
    assert verify_run(home / "watched")["ok"]


def test_a_resumed_run_repeats_no_note_and_forgets_those_of_lost_steps(sick, tmp_path, capsys):
    import shutil
    from types import SimpleNamespace

    from codex_nb.run.health import HealthMonitor, health_notes
    from codex_nb.run.run_record import RunRecord
    from codex_nb.train.engine import TrainState

    home, _ = sick
    shutil.copytree(home / "watched", tmp_path / "run")
    run = SimpleNamespace(folder=tmp_path / "run", cfg=RunRecord.load(tmp_path / "run").settings())
    for step, notes in ((45, 1), (39, 0)):
        monitor = HealthMonitor(run, {"documents": 40, "bytes": 40_000})
        state = TrainState(step=step)
        monitor.on_train_start(state)
        assert len(health_notes(run.folder)) == notes
        if notes:
            monitor.check(state)
    assert "note" not in capsys.readouterr().out
    monitor.check(state)
    assert [n.rule for n in health_notes(run.folder)] == ["learning-rate"]


def test_a_small_validation_split_is_said_before_the_first_step(sick, capsys):
    from types import SimpleNamespace

    from codex_nb.run.health import HealthMonitor, health_notes
    from codex_nb.run.run_record import RunRecord
    from codex_nb.train.engine import TrainState

    folder = sick[0] / "alone"
    run = SimpleNamespace(folder=folder, cfg=RunRecord.load(folder).settings())
    HealthMonitor(run, {"documents": 5, "bytes": 900}).on_train_start(TrainState())
    said = capsys.readouterr().out
    (folder / "health.ndjson").unlink()
    assert said.startswith("note: validation-split: the validation split has 900 bytes in 5 doc")
    assert health_notes(folder) == []


def test_threads_are_chosen_once_and_kept_by_a_resume(tmp_path, monkeypatch, capsys):
    from codex_nb.run import training_inputs
    from codex_nb.run.settings import RunConfig

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    monkeypatch.setattr(training_inputs, "default_threads", lambda: 2)
    monkeypatch.setattr(training_inputs, "set_threads", lambda n: None)  # of this whole process
    asked = []

    def choose(most, *shape):
        asked.append((most, *shape))
        return 1, "threads: 1 instead of 2"

    monkeypatch.setattr(training_inputs, "choose_threads", choose)
    for _ in range(2):  # started, and resumed with the same settings
        run = training_inputs.start_run("train", RunConfig.from_preset("smoke", **SMALL), tmp_path)
        assert run.cfg.threads == 1
        run.lock.release()
    assert asked == [(2, 4 * 32, 32, run.cfg.model.ffn_width)]
    assert capsys.readouterr().out.count("note: threads: 1 instead of 2") == 1
    given = RunConfig.from_preset("smoke", threads=2, **SMALL)
    run = training_inputs.start_run("train", given, tmp_path / "given")
    run.lock.release()
    assert run.cfg.threads == 2 and len(asked) == 1
