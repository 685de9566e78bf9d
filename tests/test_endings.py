"""How training may end: memory that ran out, and a clock whose run is killed right afterwards."""

import threading

import pytest
import torch
from helpers import read_lines, train_steps
from test_forgery import SMALL


@pytest.fixture
def train(tmp_path, monkeypatch):
    "Train a run as its notebook does, with something that happens after each step."
    from codex_nb.run.recipe import train_model
    from codex_nb.run.settings import RunConfig
    from codex_nb.run.training_inputs import model_for, prepare_data, start_run
    from codex_nb.train.engine import Hook

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))

    def call(after_step):
        cfg = RunConfig.from_preset("smoke", **SMALL)
        corpus, tokenizer, dataset = prepare_data(cfg)
        folder = tmp_path / "runs" / "ended"
        store = dataset.store
        run = start_run("train", cfg, folder, corpus=corpus, tokenizer=tokenizer, tokens=store)
        try:
            model = model_for(run.cfg, tokenizer)
            train_model(run, corpus, tokenizer, dataset, model, [Hook(after_step)])
        finally:
            run.lock.release()
        return folder

    return call


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["gpu", "cpu"],
)
def test_a_run_whose_memory_ran_out_is_interrupted(error, train, tmp_path):
    from codex_nb.run.run_folder import run_status

    def fail(state):
        if state.step == 5:
            raise error

    with pytest.raises(type(error)):
        train(fail)
    folder = tmp_path / "runs" / "ended"
    assert run_status(folder) == "interrupted"
    train(lambda state: None)
    assert train_steps(folder) == list(range(1, 9))


@pytest.mark.parametrize("state_recorded", [True, False])
def test_a_run_that_the_clock_has_ended_stays_ended(state_recorded, train, tmp_path):
    "It was killed before it was sealed, perhaps before its last state was added to the chain."
    from codex_nb.experiments.verify import contradictions

    def clock(state):
        if state.step == 5:
            state.stop("1 minutes are over")

    folder = train(clock)
    chain = (folder / "states.ndjson").read_text().splitlines(keepends=True)
    assert [r["step"] for r in read_lines(folder / "states.ndjson")] == [4, 5]
    if not state_recorded:
        (folder / "states.ndjson").write_text(chain[0])
    train(lambda state: None)
    assert (folder / "states.ndjson").read_text() == "".join(chain)
    assert train_steps(folder) == [1, 2, 3, 4, 5] and contradictions(folder) == []


def test_a_save_in_the_background_has_the_progress_of_its_own_step(train, monkeypatch):
    "Also where the next save begins before it is written."
    from codex_nb.core.artifacts import read_manifest
    from codex_nb.experiments.verify import contradictions
    from codex_nb.train import async_checkpoint

    next_has_begun = threading.Event()
    write, wait = async_checkpoint.write_checkpoint, async_checkpoint.AsyncCheckpointer.wait

    def write_late(*args):
        assert next_has_begun.wait(60)
        return write(*args)

    def wait_for_the_one_before(self):
        if self._thread:
            next_has_begun.set()
        wait(self)

    monkeypatch.setattr(async_checkpoint, "write_checkpoint", write_late)
    monkeypatch.setattr(async_checkpoint.AsyncCheckpointer, "wait", wait_for_the_one_before)
    folder = train(lambda state: None)
    steps = {p.name: read_manifest(p).meta["step"] for p in (folder / "checkpoints").iterdir()}
    assert steps == {"step-00000004": 4, "step-00000008": 8} and contradictions(folder) == []
