"""Batches that are read ahead change nothing that is trained, and an error comes at its step."""

import random
import threading
import time

import pytest
import torch
from helpers import counts
from test_engine import BatchSampler, Small, loss

from codex_nb.train.engine import FitConfig, Hook, TrainState, fit
from codex_nb.train.optim import OptimConfig, lr_at, make_optimizer
from codex_nb.train.prefetch import Prefetcher

STEPS = 12


class Slow(BatchSampler):
    "Reads that take some time, now and then; one of them may fail."

    def __init__(self, broken=None):
        self.rng, self.broken, self.read = random.Random(0), broken, []

    def step(self, position, end=None):
        time.sleep(self.rng.choice((0, 0, 0.003)))
        self.read.append(position)
        if position == self.broken:
            raise OSError(5, "Input/output error")
        return super().step(position, end)


def trained(window, model=None, optimizer=None, start=None, stop_at=None, sampler=None):
    "Weights and records of a training with this window."
    torch.manual_seed(0)
    cfg, records = OptimConfig(), []
    model = model or Small()
    optimizer = optimizer or make_optimizer(model, cfg)

    def log(state):
        records.extend(state.drain_metrics())
        if state.step == stop_at:
            state.stop("asked to")

    state = fit(
        model,
        sampler or Slow(),
        loss,
        optimizer,
        lambda step, total: lr_at(step, total, cfg),
        FitConfig(steps=STEPS, prefetch=window),
        start,
        [Hook(log), Hook(log, when="error")],
    )
    return model, optimizer, state, records


def is_reading():
    return any(thread.name == "prefetch" for thread in threading.enumerate())


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.fixture(scope="module")
def plain():
    model, _, state, records = trained(0)
    return weights(model), records


@pytest.mark.parametrize("window", [1, 2, 8, 100])
def test_any_window_trains_the_same(window, plain):
    model, _, state, records = trained(window)
    assert all(map(torch.equal, weights(model), plain[0]))
    assert records == plain[1] and state.step == STEPS
    assert not is_reading()


def test_a_run_that_stops_and_resumes_equals_one_that_does_not(plain):
    first = trained(8, stop_at=5)
    assert first[2].step == 5 and not is_reading()
    start = TrainState.of(first[2].progress())
    second = trained(2, first[0], first[1], start)
    assert first[3] + second[3] == plain[1]
    assert all(map(torch.equal, weights(second[0]), plain[0]))


@pytest.mark.parametrize("window", [0, 1, 8])
def test_an_error_while_reading_is_raised_at_its_step(window, plain):
    sampler, records = Slow(broken=28), []
    model = Small()
    with pytest.raises(OSError, match="Input/output error"):
        fit(
            model,
            sampler,
            loss,
            make_optimizer(model, OptimConfig()),
            lambda step, total: lr_at(step, total, OptimConfig()),
            FitConfig(steps=STEPS, prefetch=window),
            hooks=[Hook(lambda s: records.extend(s.drain_metrics()), when="error")],
        )
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6, 7]
    assert sampler.read[-1] == 28 and not is_reading()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_ends_the_thread(error):
    def interrupt(state):
        if state.step == 3:
            raise error

    model, sampler = Small(), Slow()
    with pytest.raises(error):
        fit(
            model,
            sampler,
            loss,
            make_optimizer(model, OptimConfig()),
            lambda step, total: 0.1,
            FitConfig(steps=STEPS, prefetch=2),
            hooks=[Hook(interrupt)],
        )
    assert not is_reading() and max(sampler.read) <= 4 * (3 + 2)


def test_no_more_is_held_than_the_window_and_the_step():
    for window in (1, 3):
        sampler = Slow()
        with Prefetcher(sampler, None, window) as reader:
            for i in range(counts(20, 500)):
                reader.step(4 * i)
                assert len(sampler.read) <= i + 1 + window
                time.sleep(random.Random(i).choice((0, 0.004)))
            assert max(sampler.read) >= 4 * i
