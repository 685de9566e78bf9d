"""Sinks broken while a run goes on: it is said once, the record and the weights are those of a run without sinks, and the sink is filled again from the folder."""

import contextlib
import csv
import json
import os
import shutil
import sqlite3
import subprocess
import time

import psutil
import pytest
import wandb
from test_launch import BIN
from wandb.proto import wandb_internal_pb2

from codex_nb.core.config import environment_with
from codex_nb.core.store import workspace
from codex_nb.data.corpus import open_corpus
from codex_nb.data.tokenizer_training import train_tokenizer
from codex_nb.data.tokens import PackedDataset, build_tokens
from codex_nb.run import callbacks
from codex_nb.run.callbacks import export_run, run_info_of
from codex_nb.run.settings import RunConfig
from codex_nb.run.trainer import Trainer
from codex_nb.run.training_inputs import model_for, start_run
from codex_nb.tracking.metrics_log import read_metrics
from codex_nb.tracking.sinks import Sinks, mlflow_experiment, sink_names
from codex_nb.train.checkpoint import require_checkpoint
from codex_nb.train.engine import Hook

STEPS = 24


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def trained(name, sinks, hooks=(), wait=30.0, stub=None):
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
    run, made = (
        start_run(
            "train",
            cfg,
            workspace() / "runs" / name,
            corpus=corpus,
            tokenizer=tokenizer,
            tokens=rows.store,
        ),
        [],
    )
    before = callbacks.sinks_of
    callbacks.sinks_of = lambda run: (
        made.append(
            Sinks(run_info_of(run.folder), sink_names(cfg.tracking.sinks), every=0, wait=wait)
        )
        or made[-1]
    )
    try:
        Trainer(run, corpus, tokenizer, rows, model_for(run.cfg, tokenizer), hooks).fit()
    finally:
        callbacks.sinks_of = before
        run.lock.release()
    weights = {n: f["sha256"] for n, f in require_checkpoint(run.folder).manifest.files.items()}
    return (
        run.folder,
        [
            (r["step"], r["split"], r["exact"])
            for r in read_metrics(run.folder / "metrics.ndjson")
            if r["exact"]
        ],
        weights,
        made[0],
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    with environment_with(CODEX_NB_HOME=str(tmp_path_factory.mktemp("alone"))):
        return trained("alone", "none")


def until(there):  # fed for the first time
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


def whole(seen, folder):  # the process of Weights & Biases may still be writing
    end = time.monotonic() + 20
    while seen(folder) != list(range(1, STEPS + 1)):
        assert time.monotonic() < end, (seen, seen(folder))
        time.sleep(0.1)


def in_mlflow(run):
    client, experiment = mlflow_experiment()
    found = client.search_runs([experiment], f"tags.run_folder = '{run}'")
    return (
        [m.step for m in client.get_metric_history(found[0].info.run_id, "train.loss")]
        if found
        else []
    )


def in_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = workspace() / "tensorboard" / run.name
    events = EventAccumulator(str(folder)).Reload()
    return (
        [e.step for e in events.Scalars("train/loss")]
        if "train/loss" in events.Tags()["scalars"]
        else []
    )


def in_csv(run):
    with open(workspace() / "csv" / f"{run.name}.csv", newline="") as f:
        return [int(r["step"]) for r in csv.DictReader(f) if r["split"] == "train"]


def in_wandb(
    run,
):  # records in blocks of 32 KiB, each piece behind a header of seven bytes, after seven bytes of magic
    steps = []
    for path in (workspace() / "wandb" / "wandb").glob("offline-run-*/*.wandb"):
        data, at, whole, mine = path.read_bytes(), 7, b"", False
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind not in (1, 4):
                continue  # more of it follows
            r, whole = wandb_internal_pb2.Record.FromString(whole), b""
            mine = mine or r.WhichOneof("record_type") == "run" and r.run.display_name == run.name
            values = {
                i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item
            }
            if mine and "train/loss" in values:
                steps.append(values["step"])
    return steps


def no_database(run):
    (workspace() / "mlflow.db").write_bytes(b"no database" * 9999)


def no_folder(run):
    shutil.rmtree(workspace() / "tensorboard" / run.name)


def no_file(run):
    (p := workspace() / "csv" / f"{run.name}.csv").unlink()
    p.mkdir()


def new_process(
    run,
):  # this process, and those it starts, would go on asking for the one that is gone
    os.environ.pop("WANDB_SERVICE", None)
    with contextlib.suppress(Exception):
        wandb.teardown()


def no_process(run):
    for p in psutil.Process().children(recursive=True):
        if "wandb-core" in " ".join(p.cmdline()):
            p.kill()


@pytest.mark.parametrize(
    "name, seen, breaks, mended",
    [
        (
            "mlflow",
            in_mlflow,
            no_database,
            lambda run: [p.unlink() for p in workspace().glob("mlflow.db*")],
        ),
        ("tensorboard", in_tensorboard, no_folder, lambda run: None),
        ("csv", in_csv, no_file, lambda run: (workspace() / "csv" / f"{run.name}.csv").rmdir()),
        ("wandb", in_wandb, no_process, new_process),
    ],
)
def test_broken_in_the_middle(name, seen, breaks, mended, alone, capfd):
    run = workspace() / "runs" / f"broken-{name}"

    def strike(state):
        if state.step != 8:
            return
        until(
            lambda: {
                "mlflow": lambda: (workspace() / "mlflow.db").exists() and in_mlflow(run),
                "wandb": lambda: any(
                    (workspace() / "wandb" / "wandb").glob("offline-run-*/*.wandb")
                ),
            }.get(
                name,
                lambda: (
                    any((workspace() / name).glob(f"{run.name}*/*"))
                    or (workspace() / name / f"{run.name}.csv").exists()
                ),
            )()
        )
        breaks(run)

    folder, record, weights, sinks = trained(
        run.name, f"{name},csv" if name != "csv" else "csv,tensorboard", (Hook(strike),)
    )
    assert (record, weights) == alone[1:3]  # bit for bit those of the run that nobody watched
    said = capfd.readouterr().err
    assert (
        list(sinks.broken) == [name]
        and said.count(f"{name} is disabled for this run") == 1
        and f"codex-nb export {run.name} --to {name}" in said
    ), (sinks.broken, said)
    assert (in_csv if name != "csv" else in_tensorboard)(folder) == list(
        range(1, STEPS + 1)
    )  # the other sink was not touched
    mended(run)
    done = subprocess.run(
        [BIN / "codex-nb", "export", run.name, "--to", name], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if name != "mlflow":
        whole(seen, folder)
    else:  # this process still holds the old database open
        with sqlite3.connect(workspace() / "mlflow.db") as db:
            assert [
                s
                for (s,) in db.execute(
                    "select step from metrics where key = 'train.loss' order by step"
                )
            ] == list(range(1, STEPS + 1))


def test_all_at_once_and_fed_again(alone):
    folder, record, weights, sinks = trained("all", "mlflow,tensorboard,csv,wandb")
    assert not sinks.broken and (record, weights) == alone[1:3]
    for _ in range(2):
        for seen in (in_mlflow, in_tensorboard, in_csv, in_wandb):
            whole(seen, folder)
        assert export_run(folder, "mlflow,tensorboard,csv,wandb") == {}


def test_one_that_never_answers(alone, capfd):
    "Training neither waits for it nor differs, and in the end it is given up."
    import threading

    from codex_nb.core.plugins import register

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
    folder, record, weights, sinks = trained("asleep", "asleep", wait=0.5)
    took = time.monotonic() - began
    asleep.set()
    assert took < 30 and (record, weights) == alone[1:3]
    assert "asleep is disabled for this run: it was still busy" in capfd.readouterr().err


def test_a_run_that_only_judged():
    from codex_nb.run.run_folder import Run
    from codex_nb.run.settings import KINDS

    run = Run.start(
        "evaluate", KINDS["evaluate"].from_preset("smoke"), folder=workspace() / "runs" / "judged"
    )
    (run.folder / "evaluations" / "validation").mkdir(parents=True)
    (run.folder / "evaluations" / "validation" / "summary.json").write_text(
        '{"metrics": {"bits_per_byte": {"value": 1.25, "low": 1.0, "high": 1.5}}}'
    )
    run.finish()
    assert export_run(run.folder, "csv,mlflow") == {}
    assert (
        workspace() / "csv" / "judged.csv"
    ).read_text() == "figure,value\nvalidation.bits_per_byte,1.25\n"
    client, experiment = mlflow_experiment()
    assert client.search_runs([experiment])[0].data.metrics == {
        "figures.validation.bits_per_byte": 1.25
    }


def test_a_record_that_cannot_be_read(alone, capfd):
    folder = trained("damaged", "none")[0]
    with open(folder / "samples.ndjson", "ab") as f:
        f.write(b"no record\n")
    assert (
        list(export_run(folder, "csv")) == ["csv"]
        and "csv is disabled for this run: JSONDecodeError" in capfd.readouterr().err
    )
