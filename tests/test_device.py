"""Devices that are not here: settings that are chosen for them, and a GPU with a queue."""

import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from fake_gpu import OPERATOR, FakeGPU
from helpers import LIB
from torch import nn

from codex_nb.core.device import GPU, DeviceInfo

H100 = DeviceInfo("cuda", gpus=(GPU("NVIDIA H100 80GB HBM3", 80 << 30, (9, 0)),))
TWO = replace(H100, gpus=H100.gpus * 2, index=1)
SLICE = GPU("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10 << 30, (9, 0))
V100 = DeviceInfo("cuda", gpus=(GPU("Tesla V100-SXM2-16GB", 16 << 30, (7, 0)),))
T4 = DeviceInfo("cuda", gpus=(GPU("Tesla T4", 15 << 30, (7, 5)),))
CPU = DeviceInfo()
# Machine -> device, dtype, compile, attention, graphs
MACHINES = {
    "H100": (H100, "cuda", "bf16", "on", "varlen", "on"),
    "two of them": (TWO, "cuda", "bf16", "on", "varlen", "on"),
    "a slice of one": (replace(H100, gpus=(SLICE,)), "cuda", "bf16", "on", "varlen", "on"),
    "V100": (V100, "cuda", "fp32", "on", "sdpa", "on"),
    "T4": (T4, "cuda", "fp32", "on", "sdpa", "on"),
    "no gcc": (replace(H100, compiler=False), "cuda", "bf16", "off", "varlen", "on"),
    "no triton": (replace(H100, triton=False), "cuda", "bf16", "off", "varlen", "on"),
    "older torch": (replace(H100, varlen_kernel=False), "cuda", "bf16", "on", "sdpa", "on"),
    "mps": (DeviceInfo("mps"), "mps", "fp32", "off", "sdpa", "off"),
    "CPU": (CPU, "cpu", "fp32", "on", "sdpa", "off"),
    "CPU with bf16": (DeviceInfo(avx512_bf16=True), "cpu", "bf16", "on", "eager", "off"),
    "CPU, no g++": (DeviceInfo(compiler=False), "cpu", "fp32", "off", "sdpa", "off"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_settings_follow_from_the_machine(machine):
    from codex_nb.model.causal_lm import resolve_device, resolve_dtype
    from codex_nb.model.compute import resolve_compute
    from codex_nb.model.model_config import ComputeConfig

    info, *expected = MACHINES[machine]
    device = resolve_device("auto", info)
    dtype = resolve_dtype("auto", device, info)
    llama = {"model_type": "llama"}
    cfg = resolve_compute(ComputeConfig(), device, dtype, 256, 1e15, llama, info=info)
    assert [device, dtype, cfg.compile, cfg.attention, cfg.graphs] == expected


def test_no_other_chapter_asks_a_gpu():
    found = []
    for p in LIB.rglob("*.py"):
        if p.name == "device.py":
            continue
        code = re.sub(r"#.*", "", p.read_text())
        for bad in (r"torch\.cuda\b", r"[=!]= \"cuda\"", r"startswith\(\"cuda\"\)"):
            found += [(p.name, m[0]) for m in re.finditer(bad, code)]
    assert not found


@pytest.fixture
def gpu():
    with FakeGPU(flops=1e9) as found:
        found.flops[1] = 4e9
        yield found


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 8), nn.LayerNorm(8), nn.Linear(8, 64))


class Rows:
    seq_len = 16

    def __len__(self):
        return 64


class Batches:
    "As `BatchSampler`: ids and targets are views of one array."

    rows, batch_size = Rows(), 4

    def step(self, position, end=None):
        from codex_nb.core.types import Batch

        ids = torch.randint(1, 64, (4, 17), generator=torch.Generator().manual_seed(position))
        places = torch.arange(16).expand(4, 16)
        return [Batch(ids[:, :-1], ids[:, 1:], places, torch.arange(4))]


def loss(model, b):
    logits = model(b.ids_BT).flatten(0, 1)
    return nn.functional.cross_entropy(logits, b.targets_BT.flatten(), reduction="sum")


def trained(gpu, device, steps, *hooks):
    from codex_nb.tracking.timers import Throughput
    from codex_nb.train.engine import FitConfig, TrainState, fit
    from codex_nb.train.optim import OptimConfig, make_optimizer

    model = small_model().to(device)
    optimizer = make_optimizer(model, OptimConfig(optimizer="adamw"))
    state = TrainState(throughput=Throughput(gpu.clock))
    gpu.synchronize(device)
    return fit(
        model, Batches(), loss, optimizer, lambda *_: 1e-3, FitConfig(steps=steps), state, hooks
    )


@pytest.mark.parametrize("every", [1, 4])
def test_speed_is_that_of_the_device_whatever_is_queued(every, gpu):
    "What Python has queued is not done; here the queue holds up to `every` steps."
    from codex_nb.train.engine import Hook

    speeds, done, started = [], [], []  # done, started: on the clock of the device

    def log(state):
        done.append(gpu.ends[0])
        state.drain_metrics()
        speeds.append(state.throughput.lap())
        started.append(gpu.ends[0])

    state = trained(gpu, "cuda:0", 8, Hook(log, every, part="logging"))
    assert len(done) == 8 // every
    taken = [b - a for a, b in zip(started, done[1:])]
    assert speeds[1:] == pytest.approx([every * 64 / t for t in taken], rel=0.01)
    assert state.tokens == 8 * 64
    assert state.throughput.mean == pytest.approx(64 * every / taken[0], rel=0.05)


def test_one_process_on_the_second_gpu_makes_it_the_current_one(gpu):
    from codex_nb.run.settings import RunConfig
    from codex_nb.run.training_inputs import setup_process
    from codex_nb.train.engine import Hook

    cfg = RunConfig.from_preset("smoke", device="cuda:1", determinism="off")
    setup_process(cfg)
    assert gpu.current == 1
    state = trained(gpu, "cuda:1", 4, Hook(lambda s: s.drain_metrics(), 2, part="logging"))
    parts = state.clock.totals
    assert gpu.ends[0] == 0 and gpu.ends[1] > 100 * OPERATOR
    inside = sum(parts[k] for k in ("data", "forward", "backward", "optimizer"))
    assert 0.5 * gpu.ends[1] < inside <= gpu.ends[1]


def test_peaks_and_synchronisation_are_of_the_gpu_that_is_named(gpu):
    from codex_nb.core.device import peak_memory, reset_peak_memory, synchronize

    torch.zeros(100, device="cuda:1")
    assert (peak_memory("cuda:1"), peak_memory("cuda:0")) == (400, 0)
    before = gpu.now
    synchronize("cuda:0")
    assert gpu.now == before
    synchronize("cuda:1")
    assert gpu.now == gpu.ends[1] > before
    reset_peak_memory("cuda:1")
    assert peak_memory("cuda:1") == 0


def test_the_yardstick_of_mfu_is_the_gpu_that_trains(gpu):
    from codex_nb.tracking.timers import measure_peak_flops

    with mock.patch("time.perf_counter", gpu.clock):
        measured = [measure_peak_flops(f"cuda:{i}", size=256) for i in range(2)]
    assert measured == pytest.approx([1e9, 4e9], rel=0.01)


def test_batches_are_copied_beside_the_computation(gpu):
    "From contiguous, pinned memory: any other copy would wait until the queue is empty."
    batch = Batches().step(0)[0]
    assert not batch.ids_BT.is_contiguous()
    torch.zeros(9, device="cuda:1")  # something to wait for
    batch.to("cuda:1")
    assert gpu.copies == [(True, True)] * 4
    assert gpu.waits == 0 and gpu.now < gpu.ends[1]
    torch.ones(3).to("cuda:1", non_blocking=True)  # this one does
    assert gpu.waits == 1 and gpu.copies[-1] == (True, False)


def test_nothing_multiplies_before_the_workspace_of_cublas_is_set(gpu, small_model, monkeypatch):
    "torch reads it at the first product, and deterministic algorithms then refuse all others."
    from codex_nb.cli.generate import open_named_model
    from codex_nb.eval.eval_config import GenerateConfig
    from codex_nb.eval.generate import generate_batch
    from codex_nb.model.causal_lm import resolve_dtype
    from codex_nb.run.settings import RunConfig

    def run():
        RunConfig.from_preset("smoke", device="cuda", dtype="bf16")

    def dtype():
        resolve_dtype("bf16", "cuda:0")

    def command():
        model, tokenizer = open_named_model(str(small_model), "cuda")
        generate_batch(model, tokenizer, ["a"], GenerateConfig(max_new_tokens=1), 0, ["x"])

    for first in (run, dtype, command):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        gpu.workspaces.clear()
        first()
        assert set(gpu.workspaces) == {":4096:8"}, first


def test_dropout_of_each_rank_is_drawn_from_a_seed_of_its_own(gpu):
    "Making a model, which all ranks do with one seed, leaves the generators of GPUs alone."
    from codex_nb.model.causal_lm import build_model
    from codex_nb.run.settings import RunConfig
    from codex_nb.run.training_inputs import setup_process
    from codex_nb.train.distributed import World

    cfg, last = RunConfig.from_preset("smoke", device="cuda", determinism="off"), []
    for rank in range(2):
        setup_process(cfg, World(rank, 2, rank))
        build_model(cfg.model, 300, 0, cfg.seed)
        last.append(gpu.seeds[-1])
        assert gpu.current == rank
    assert last[0] != last[1]


def test_a_model_is_compiled_once_for_rows_of_one_document_and_once_for_more(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    from codex_nb.model.causal_lm import build_model, document_mask
    from codex_nb.model.compute import apply_compute, compiled_for
    from codex_nb.model.model_config import ComputeConfig, ModelConfig

    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: compile(f, backend=counter, **given))
    model = build_model(ModelConfig(width=32, layers=1, heads=2, seq_len=16), 64, 0, 0)
    apply_compute(model, ComputeConfig(compile="off", attention="varlen", products="torch"))
    call, ids = compiled_for(model.base_model, (3, 16)), torch.arange(48).view(3, 16)
    rows = [0, 16, 32, 48]
    for starts in (rows, [0, 5, *rows[1:]], rows, [0, 5, 9, *rows[1:]], [*range(0, 48, 4), 48]):
        cu_seqlens = torch.tensor(starts, dtype=torch.int32)
        positions = (
            torch.arange(48)
            - cu_seqlens[torch.bucketize(torch.arange(48), cu_seqlens[1:], right=True)]
        )
        given = dict(position_ids=positions.view(3, 16), use_cache=False)
        given |= document_mask(model, cu_seqlens)
        expected = model.base_model(input_ids=ids, **given).last_hidden_state
        torch.testing.assert_close(call(input_ids=ids, **given).last_hidden_state, expected)
    assert counter.frame_count == 2
