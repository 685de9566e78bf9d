"""A workspace of runs: found wherever they were started, labelled, renamed, and removed safely."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from codex_nb.cli.main import main
from codex_nb.core.artifacts import open_artifact, publish
from codex_nb.core.plugins import register
from codex_nb.run.callbacks import MetricsLogger, export_run
from codex_nb.run.run_folder import Run, find_run, list_runs, register_external_run, verify_files
from codex_nb.run.run_list import label_run, remove_run, rename_run, run_rows
from codex_nb.run.run_record import RunError
from codex_nb.run.settings import KINDS
from codex_nb.run.sources import run_or_model
from codex_nb.tracking.metrics_log import MetricsWriter
from codex_nb.tracking.sinks import close_ended_runs, mlflow_experiment


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def start(name, kind="train", parents=(), **settings):
    folder = name if isinstance(name, Path) else Path(os.environ["CODEX_NB_HOME"]) / "runs" / name
    run = Run.start(kind, KINDS[kind].check("smoke", **settings), folder=folder)
    for role, digest in dict(parents).items():
        run.add_parent(role, digest)
    return run


def made(name, kind="train", parents=(), **settings):
    "A sealed run with a checkpoint, or an evaluation, that nothing has computed."
    run = start(name, kind, parents, **settings)
    part = "checkpoints/step-00000001" if kind == "train" else "evaluations/validation"
    (run.folder / part).parent.mkdir()
    with publish(run.folder / part, part.split("s/")[0], {"of": str(name)}) as draft:
        draft.meta["bits_per_byte"] = 1.25
    run.finish()
    return run.folder


def part(run):
    (manifest,) = run.glob("*/*/manifest.json")
    return open_artifact(manifest.parent).digest


def refuses(change, *names):
    with pytest.raises(RunError) as refused:
        change()
    assert all(name in str(refused.value) for name in names), refused.value


def test_run_that_another_is_made_from_stays():
    base = made("base")
    tuned = made("tuned", parents={"base": part(base)})
    judged = made("judged", "evaluate", {"checkpoint": part(tuned)})
    compared = start("compared", "compare", {"evaluation 1": part(judged)})
    swept, trial = start("swept", "sweep"), made("swept-trial-000")
    refuses(lambda: remove_run(base), "tuned")
    refuses(lambda: remove_run(tuned), "judged")
    refuses(lambda: remove_run(judged), "compared")  # which has not ended yet
    refuses(lambda: remove_run(trial), "swept")
    refuses(lambda: remove_run(compared.folder), "in use")
    for run in (compared, swept):
        run.lock.release()
    for folder in (compared.folder, judged, tuned, base, swept.folder, trial):
        remove_run(folder)
    assert list_runs() == [] and not any(base.parent.glob(".removed*"))


def test_new_name_breaks_nothing_or_is_refused():
    base = made("base")
    tuned = made("tuned", parents={"base": part(base)}, lr=1e-3)
    waiting = start("waiting", base="base")
    refuses(lambda: rename_run(base, "other"), "waiting", "base=base")
    waiting.lock.release()
    remove_run(waiting.folder)
    label_run(base, add=["good"], note="as in the paper")
    other = rename_run(base, "other")
    assert verify_files(tuned)["parents"]["base"] == "ok, in other"
    assert [(r["name"], r["tags"], r["note"]) for r in run_rows()][0][1:] == (
        ["good"],
        "as in the paper",
    )
    for name in ("tuned", "last", "a/b", "../out", ".hidden", ""):
        refuses(lambda: rename_run(other, name), name)
    trial = made("swept-trial-000")
    sweep = start("swept", "sweep")
    sweep.lock.release()
    refuses(lambda: rename_run(trial, "mine"), "swept")
    refuses(lambda: rename_run(sweep.folder, "mine"), "swept")


def test_labels_change_no_seal_and_a_damaged_file_of_them_is_named(home):
    folder = made("one")
    before = verify_files(folder)
    label_run(folder, add=["good"], note="n")
    assert verify_files(folder) == before and before["ok"]
    (home / "runs" / ".labels.json").write_text('{"one": 3, "two": {"tags": "x", "note": 1}}')
    assert run_rows()[0]["tags"] == []
    (home / "runs" / ".labels.json").write_text("[")
    with pytest.raises(Exception, match="labels.json: not JSON"):
        run_rows()


def test_run_elsewhere_is_listed_found_and_removed(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere") / "mine"
    made(folder)
    register_external_run(folder)
    made("inside", parents={"base": part(folder)})
    assert [r["path"] for r in list_runs()] == [str(folder), str(home / "runs" / "inside")]
    assert find_run("mine") == folder and find_run("last").name == "inside"
    assert run_or_model("last") == (find_run("last"), True)  # for chat, serve and base=last
    assert verify_files(find_run("inside"))["parents"]["base"] == "ok, in mine"
    refuses(lambda: remove_run(folder), "inside")
    remove_run(find_run("inside"))
    remove_run(folder)
    assert not folder.exists() and list_runs() == []


def test_table_of_runs_imports_no_torch(home):
    made("one", lr=1e-3)
    program = (
        "import sys\nfrom codex_nb.cli.main import main\n"
        "try: main(['runs', '--where', 'lr=1e-3', '--sort', '-figure'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'scipy', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    *_, row, imported = done.stdout.splitlines()
    assert imported == "[]" and row.startswith("one ") and "lr=0.001" in row, done


def test_run_is_removed_only_after_a_yes(home, monkeypatch, capsys):
    made("one")
    for answer, words, code in (("n\n", (), 1), ("", (), 1), ("", ("--yes",), 0)):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        with pytest.raises(SystemExit) as ended:
            main(["runs", "rm", "last", *words])
        printed = capsys.readouterr()
        assert ended.value.code == code and (home / "runs" / "one").exists() == bool(code)
        assert ("Remove one" in printed.err) == (not words), printed
    assert printed.out == "removed one\n" and not list_runs()


def test_mlflow_shows_when_a_run_was_and_how_it_ended(home):
    "Exported later, killed without a word, and resumed."
    run = start("one", lr=1e-3)
    with_clock = pytest.MonkeyPatch()
    with_clock.setattr("time.time", lambda: 1_700_000_000.5)
    log = MetricsWriter(run.folder / "metrics.ndjson")
    log.write(1, {"loss": 2.0, "tokens_per_second": 900.0})
    log.write(1, {"loss": 2.1, "bits_per_byte": 1.3}, split="validation")
    with_clock.setattr("time.time", lambda: 1_700_000_060.0)
    log.write(2, {"loss": 1.5, "lr": 1e-3, "tokens_per_second": 1000.0})
    log.close()
    with_clock.undo()
    client, experiment = mlflow_experiment()

    def shown():
        (found,) = client.search_runs([experiment])
        return found

    assert export_run(run.folder, "mlflow") == {}  # while it runs
    assert shown().info.status == "RUNNING" and close_ended_runs(client, experiment) == 0
    assert shown().info.start_time == 1_700_000_000_500
    run.lock.release()  # as when its process is killed
    assert close_ended_runs(client, experiment) == 1
    assert (shown().info.status, shown().info.end_time) == ("KILLED", 1_700_000_060_000)
    made_part = run.folder / "evaluations" / "validation" / "summary.json"
    made_part.parent.mkdir(parents=True)
    made_part.write_text(json.dumps({"metrics": {"bits_per_byte": {"value": 1.25}}}))
    run.finish()
    assert export_run(run.folder, "mlflow") == {}
    found = shown()
    assert found.info.status == "FINISHED" and found.info.end_time > 1_700_000_060_000
    assert sorted(found.data.metrics)[:2] == ["loss/train", "loss/validation"]
    assert found.data.metrics["sealed/validation.bits_per_byte"] == 1.25
    assert found.data.metrics["while_training/validation.bits_per_byte"] == 1.3
    assert found.data.metrics["speed/median_tokens_per_second"] == 950
    assert found.data.params["lr"] == "0.001" and len(found.data.params) < 12
    assert "settings.json" in [a.path for a in client.list_artifacts(found.info.run_id)]


class Told:
    "A sink that keeps what it is told at the end."

    statuses = []

    def __init__(self, run_info):
        self.fed = {}

    def write(self, rows):
        return

    def close(self, status, files):
        self.statuses.append(status)


def test_sinks_are_told_how_training_ended():
    register("sink", "told", Told)
    for interrupted, failed in ((True, False), (False, True), (False, False)):
        state = SimpleNamespace(step=1, tokens=0, interrupted=interrupted)
        state.drain_metrics, state.throughput = list, SimpleNamespace(lap=lambda: 0.0)
        logger = MetricsLogger(start(f"run-{interrupted}-{failed}", sinks="told"), None)
        logger.on_train_start(state)
        logger.close(state, failed)
    assert Told.statuses == ["KILLED", "FAILED", None]  # None: its evaluation follows
