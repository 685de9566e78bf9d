"""Sinks broken while a run goes on: named, harmless to the run, filled again from its folder."""

import contextlib
import csv
import json
import os
import shutil
import sqlite3
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import wandb
from helpers import codex, wait_until
from wandb.proto import wandb_internal_pb2

from codex_nb.core.config import environment_with
from codex_nb.core.plugins import register
from codex_nb.core.store import workspace
from codex_nb.data.corpus import open_corpus
from codex_nb.data.tokenizer_training import train_tokenizer
from codex_nb.data.tokens import PackedDataset, build_tokens
from codex_nb.run import callbacks
from codex_nb.run.callbacks import export_run, run_info_of
from codex_nb.run.run_folder import Run
from codex_nb.run.settings import KINDS, RunConfig
from codex_nb.run.trainer import Trainer
from codex_nb.run.training_inputs import model_for, start_run
from codex_nb.tracking.metrics_log import MetricsWriter, read_metrics
from codex_nb.tracking.sinks import Sinks, mlflow_experiment, sink_names
from codex_nb.train.checkpoint import require_checkpoint
from codex_nb.train.engine import Hook

STEPS = 24
ALL_STEPS = list(range(1, STEPS + 1))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def train(name, sinks, hooks=(), wait=30.0):
    "Train into runs/NAME; its folder, exact record, weights, and the sinks."
    cfg = RunConfig.from_preset(
        "smoke",
        steps=STEPS,
        eval_every=12,
        save_every=12,
        log_every=1,
        width=32,
        seq_len=32,
        batch_size=4,
        sinks=sinks,
    )
    corpus = open_corpus(cfg.corpus)
    tokenizer = train_tokenizer(corpus, cfg.tokenizer)
    rows = PackedDataset.from_config(build_tokens(corpus, tokenizer), cfg.model.seq_len, cfg.rows)
    parents, made = dict(corpus=corpus, tokenizer=tokenizer, tokens=rows.store), []
    run = start_run("train", cfg, workspace() / "runs" / name, **parents)

    def impatient_sinks(run):
        names = sink_names(cfg.tracking.sinks)
        made.append(Sinks(run_info_of(run.folder), names, every=0, wait=wait))
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "sinks_of", impatient_sinks)
        Trainer(run, corpus, tokenizer, rows, model_for(run.cfg, tokenizer), hooks).fit()
    run.lock.release()
    records = [r for r in read_metrics(run.folder / "metrics.ndjson") if r["exact"]]
    return SimpleNamespace(
        folder=run.folder,
        record=[(r["step"], r["split"], r["exact"]) for r in records],
        weights=require_checkpoint(run.folder).manifest.files,
        sinks=made[0] if made else None,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "A run without sinks."
    with environment_with(CODEX_NB_HOME=str(tmp_path_factory.mktemp("alone"))):
        return train("alone", "none")


def assert_same_run(a, b):
    digests = [{n: f["sha256"] for n, f in r.weights.items()} for r in (a, b)]
    assert a.record == b.record and digests[0] == digests[1]


def wait_for_all_steps(seen, folder):
    "The process of Weights & Biases may still be writing."
    wait_until(lambda: seen(folder) == ALL_STEPS, 20, 0.1)


def in_mlflow(run):
    client, experiment = mlflow_experiment()
    found = client.search_runs([experiment], f"tags.run_folder = '{run}'")
    if not found:
        return []
    return [m.step for m in client.get_metric_history(found[0].info.run_id, "loss/train")]


def in_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workspace() / "tensorboard" / run.name)).Reload()
    if "train/loss" not in events.Tags()["scalars"]:
        return []
    return [e.step for e in events.Scalars("train/loss")]


def in_csv(run):
    with open(workspace() / "csv" / f"{run.name}.csv", newline="") as f:
        return [int(r["step"]) for r in csv.DictReader(f) if r["split"] == "train"]


def wandb_records(path):
    """The records of a file of Weights & Biases.

    After seven bytes of magic they are in blocks of 32 KiB; a piece has a header of seven bytes.
    """
    data, at, pieces = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        pieces += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the last piece, or the only one
            yield wandb_internal_pb2.Record.FromString(pieces)
            pieces = b""


def in_wandb(run):
    steps = []
    for path in (workspace() / "wandb" / "wandb").glob("offline-run-*/*.wandb"):
        mine = False
        for r in wandb_records(path):
            mine = mine or r.WhichOneof("record_type") == "run" and r.run.display_name == run.name
            items = r.history.item
            values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            if mine and "train/loss" in values:
                steps.append(values["step"])
    return steps


def destroy_database(run):
    (workspace() / "mlflow.db").write_bytes(b"no database" * 9999)


def remove_database(run):
    for p in workspace().glob("mlflow.db*"):
        p.unlink()


def remove_folder(run):
    shutil.rmtree(workspace() / "tensorboard" / run.name)


def block_file(run):
    path = workspace() / "csv" / f"{run.name}.csv"
    path.unlink()
    path.mkdir()


def unblock_file(run):
    (workspace() / "csv" / f"{run.name}.csv").rmdir()


def kill_process(run):
    for p in psutil.Process().children(recursive=True):
        if "wandb-core" in " ".join(p.cmdline()):
            p.kill()


def forget_process(run):
    "This process, and those it starts, would go on asking for the one that is gone."
    os.environ.pop("WANDB_SERVICE", None)
    with contextlib.suppress(Exception):
        wandb.teardown()


def was_fed(name, run):
    "Whether a sink has received something."
    if name == "mlflow":
        return (workspace() / "mlflow.db").exists() and in_mlflow(run)
    if name == "wandb":
        return any((workspace() / "wandb" / "wandb").glob("offline-run-*/*.wandb"))
    written = any((workspace() / name).glob(f"{run.name}*/*"))
    return written or (workspace() / name / f"{run.name}.csv").exists()


@pytest.mark.parametrize(
    "name, seen, breaks, mends",
    [
        ("mlflow", in_mlflow, destroy_database, remove_database),
        ("tensorboard", in_tensorboard, remove_folder, lambda run: None),
        ("csv", in_csv, block_file, unblock_file),
        ("wandb", in_wandb, kill_process, forget_process),
    ],
    ids=["mlflow", "tensorboard", "csv", "wandb"],
)
def test_broken_sink_is_left_out_and_filled_again(name, seen, breaks, mends, alone, capfd):
    run = workspace() / "runs" / f"broken-{name}"

    def strike(state):
        if state.step == 8:
            wait_until(lambda: was_fed(name, run), 60)
            breaks(run)

    other, in_other = ("tensorboard", in_tensorboard) if name == "csv" else ("csv", in_csv)
    trained = train(run.name, f"{name},{other}", (Hook(strike),))
    assert_same_run(trained, alone)  # bit for bit the run that had no sinks
    err = capfd.readouterr().err
    assert list(trained.sinks.broken) == [name], (trained.sinks.broken, err)
    assert err.count(f"{name} is disabled for this run") == 1, err
    assert f"codex-nb export {run.name} --to {name}" in err
    assert in_other(trained.folder) == ALL_STEPS  # the other sink was not touched
    mends(run)
    done = codex("export", run.name, "--to", name, home=workspace())
    assert done.returncode == 0, done.stderr
    assert f"open {name}: " in done.stdout
    if name != "mlflow":
        return wait_for_all_steps(seen, trained.folder)
    # this process still has the old database open
    query = "select step from metrics where key = 'loss/train' order by step"
    with sqlite3.connect(workspace() / "mlflow.db") as db:
        assert [step for (step,) in db.execute(query)] == ALL_STEPS


def test_four_sinks_at_once_change_nothing_and_are_not_filled_twice(alone):
    names = "mlflow,tensorboard,csv,wandb"
    trained = train("all", names)
    assert not trained.sinks.broken
    assert_same_run(trained, alone)
    for _ in range(2):
        for seen in (in_mlflow, in_tensorboard, in_csv, in_wandb):
            wait_for_all_steps(seen, trained.folder)
        assert export_run(trained.folder, names) == {}


def test_sink_that_never_answers_is_given_up(alone, capfd):
    "Training neither waits for it nor differs."
    asleep = threading.Event()

    class Asleep:
        def __init__(self, origin):
            self.fed = {}

        def write(self, rows):
            asleep.wait(60)

        def close(self, status, files):
            return

    register("sink", "asleep", Asleep)
    began = time.monotonic()
    trained = train("asleep", "asleep", wait=0.5)
    took = time.monotonic() - began
    asleep.set()
    assert took < 30
    assert_same_run(trained, alone)
    assert "asleep is disabled for this run: it was still busy" in capfd.readouterr().err


@pytest.mark.parametrize("trained", [False, True])
def test_sealed_evaluation_is_exported_and_not_hidden_by_a_curve(trained):
    folder, cfg = workspace() / "runs" / "judged", KINDS["evaluate"].from_preset("smoke")
    run = Run.start("evaluate", cfg, folder=folder)
    if trained:  # measured during training, on fewer documents
        writer = MetricsWriter(folder / "metrics.ndjson")
        writer.write(12, {"bits_per_byte": 1.9}, split="validation")
        writer.close()
    (run.folder / "evaluations" / "validation").mkdir(parents=True)
    metrics = {"bits_per_byte": {"value": 1.25, "low": 1.0, "high": 1.5}}
    summary = run.folder / "evaluations" / "validation" / "summary.json"
    summary.write_text(json.dumps({"metrics": metrics}))
    run.finish()
    assert export_run(run.folder, "csv,mlflow") == {}
    if not trained:
        text = (workspace() / "csv" / "judged.csv").read_text()
        assert text == "figure,value\nvalidation.bits_per_byte,1.25\n"
    client, experiment = mlflow_experiment()
    sent = client.search_runs([experiment])[0].data.metrics
    curve = {"while_training/validation.bits_per_byte": 1.9} if trained else {}
    assert sent == {"sealed/validation.bits_per_byte": 1.25} | curve


def test_damaged_samples_leave_the_sink_out_by_name(alone, capfd):
    folder = train("damaged", "none").folder
    with open(folder / "samples.ndjson", "ab") as f:
        f.write(b"no record\n")
    assert list(export_run(folder, "csv")) == ["csv"]
    said = capfd.readouterr().err
    assert "csv is disabled for this run: ArtifactError" in said and "restore the file" in said
