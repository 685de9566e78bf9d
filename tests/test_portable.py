"""Portable arithmetic: the same bytes whatever computes them, however a batch is divided."""

import itertools

import pytest
import torch
from architectures import MORE, SHAPES
from fake_gpu import FakeGPU
from helpers import codex, counts

from codex_nb.core.config import ConfigError
from codex_nb.core.repro import set_determinism
from codex_nb.core.types import IGNORE, Batch
from codex_nb.experiments.portable_digest import (
    first_difference,
    portable_digests,
    recorded_digests,
)
from codex_nb.model.loss import LMLoss
from codex_nb.model.model_config import AdapterConfig, ModelConfig
from codex_nb.model.portable_functions import (
    PortableError,
    compiled_kernels,
    kernels_for,
    without_kernels,
)
from codex_nb.model.portable_mode import arithmetic, in_portable_dtype
from codex_nb.run.recipe import train_model
from codex_nb.run.settings import RunConfig
from codex_nb.run.training_inputs import model_for, prepare_data, start_run
from codex_nb.tracking.metrics_log import read_metrics

# Each hides instructions from torch, from MKL or from NumPy, or takes the compiler away.
MACHINES = {
    "default": dict(ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE", OMP_NUM_THREADS="2"),
    "avx2": dict(ATEN_CPU_CAPABILITY="avx2", MKL_CBWR="AVX2"),
    "compiler": dict(CC="false", NPY_DISABLE_CPU_FEATURES="AVX512F AVX512CD AVX512_SKX"),
}
MACHINES["all"] = (
    dict(itertools.chain(*(m.items() for m in MACHINES.values()))) | MACHINES["default"]
)


@pytest.mark.parametrize("machine", counts(["all"], MACHINES))
def test_a_digest_is_the_same_on_another_machine(machine, tmp_path):
    done = codex("prove-digest", home=tmp_path, fresh=True, **MACHINES[machine])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("equal: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    done = codex("prove-digest", "--device", "cuda", home=tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("codex-nb: device: ")


@pytest.mark.skipif(compiled_kernels() is None, reason="there is no C compiler")
def test_compiled_kernels_agree_with_the_plain_form():
    "Where one bit differs they are not used, and nothing but the speed would show it."
    assert kernels_for(torch.zeros(1, dtype=torch.float64)) is not None


@pytest.fixture
def portable():
    set_determinism("portable")
    yield
    set_determinism("deterministic")


def model_of(arch, adapter="none", width=32):
    from codex_nb.model.adapters import add_adapter
    from codex_nb.model.causal_lm import build_model

    cfg = ModelConfig(arch=arch, width=width, layers=2, heads=4, seq_len=24)
    with arithmetic():
        model = build_model(cfg, 60, 0, 3)
        if adapter != "none":
            model = add_adapter(model, AdapterConfig(adapter=adapter, rank=4), 3, "base")
            for name, p in model.named_parameters():
                if "lora_B" in name:  # which begins at 0, where A has no gradient
                    p.data.copy_((torch.arange(p.numel()) % 7 - 3).view(p.shape) * 0.01)
    return in_portable_dtype(model)


def batch_of_documents():
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 60, (6, 25), generator=drawn)
    targets = ids[:, 1:].clone()
    targets[1, 7:] = IGNORE
    positions = torch.arange(24).repeat(6, 1)
    positions[:, 10:] -= 10  # two documents in each row
    return Batch(ids[:, :-1], targets, positions, torch.arange(6))


def gradients(model, batch, parts):
    "Loss and gradients of a batch in parts of so many rows, the last one first."
    total = 0.0
    with arithmetic(model):
        objective = LMLoss(model)
        for at in reversed(range(0, 6, parts)):
            part = Batch(*(x[at : at + parts] for x in batch[:4]))
            loss = objective(part.ids_BT, part.targets_BT, part.positions_BT)
            (loss / 120).backward()
            total += loss.item()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total, found


@pytest.mark.parametrize(
    "arch,adapter", [("llama", "none"), ("gpt2", "none"), ("qwen3", "none"), ("llama", "lora")]
)
def test_gradients_do_not_depend_on_how_a_batch_is_divided(arch, adapter, portable):
    batch, expected = batch_of_documents(), None
    model = model_of(arch, adapter)
    for parts in (6, 2, 1):
        found = gradients(model, batch, parts)
        expected = expected or found
        assert found[0] == expected[0]
        assert found[1].keys() == expected[1].keys() and found[1]
        for name, gradient in found[1].items():
            assert torch.equal(gradient, expected[1][name]), (parts, name)
    with without_kernels():
        plain = gradients(model, batch, 3)
    assert all(torch.equal(g, expected[1][n]) for n, g in plain[1].items())
    # and they are the gradients: torch's own, in float64
    set_determinism("deterministic")
    total, ordinary = gradients(model, batch, 6)
    assert abs(total - expected[0]) < 1e-4 * total
    for name, gradient in ordinary.items():
        error = float((gradient - expected[1][name]).norm() / gradient.norm())
        assert error < 2e-5, (name, error)


@pytest.mark.parametrize(
    "kind",
    counts(
        ["gemma3_text"],
        [
            "gemma2",
            "gemma3_text",
            "phi3",
            "gpt_neox",
            "olmo2",
            "mistral",
            "granite",
            "smollm3",
            "bloom",
            "mpt",
        ],
    ),
)
def test_models_of_other_makers_do_not_depend_on_it_either(kind, portable):
    "Gemma computes its norms in float32, with weights that it adds 1 to."
    from transformers import AutoConfig, AutoModelForCausalLM

    with arithmetic():
        ids = dict(vocab_size=64, eos_token_id=0, bos_token_id=1, pad_token_id=0)
        config = AutoConfig.for_model(kind, **(SHAPES | MORE)[kind], **ids)
        model = in_portable_dtype(AutoModelForCausalLM.from_config(config)).train()
    batch = batch_of_documents()
    whole, parts = gradients(model, batch, 6), gradients(model, batch, 2)
    assert whole[0] == parts[0] and whole[1]
    assert all(torch.equal(g, parts[1][n]) for n, g in whole[1].items())


def test_a_digest_is_the_same_on_a_gpu():
    "One that is not there, and divides by a number as one does: by multiplying with its inverse."
    with FakeGPU():
        found = portable_digests(device="cuda", micro_batch=8)
    assert first_difference(found, recorded_digests()) is None


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_gradients_are_the_same_on_a_gpu(arch, portable):
    "Rows of 48 numbers, whose inverse is not exact."
    model, batch = model_of(arch, width=48), batch_of_documents()
    expected = gradients(model, batch, 6)
    with FakeGPU():
        found = gradients(model.to("cuda"), batch.to("cuda"), 3)
        values = {n: g.cpu() for n, g in found[1].items()}
    assert found[0] == expected[0] and values.keys() == expected[1].keys()
    assert all(torch.equal(g, expected[1][n]) for n, g in values.items())


def test_angles_are_the_same_in_each_version_of_transformers(portable):
    "In older ones they are a product of matrices, whose factors would be rounded to 20 bits."
    frequency = (torch.arange(1, 9) / 7)[None, :, None].expand(2, 8, 1)
    position = torch.arange(24)[None, None].expand(2, 1, 24).float()
    with arithmetic():
        expected = frequency * position
        assert torch.equal(frequency @ position, expected)
        assert torch.equal(torch.matmul(frequency, position), expected)
        assert (frequency @ torch.ones(1)).shape == (2, 8)  # no angles: a product as any other
        with pytest.raises(RuntimeError):
            frequency @ torch.ones(2, 8, 24)


def test_a_number_on_the_cpu_is_divided_by_what_lies_on_a_gpu(portable):
    x = torch.tensor([3.0, 7.0], dtype=torch.float64)
    with arithmetic():
        expected = [torch.tensor(2.0).double() / x, x / torch.tensor(49.0).double()]
    with FakeGPU(), arithmetic():
        there = x.to("cuda")
        found = [torch.tensor(2.0).double() / there, there / torch.tensor(49.0).double()]
        found = [y.cpu() for y in found]
    assert all(map(torch.equal, found, expected))


def test_a_backward_pass_stays_in_its_thread(portable):
    "On a GPU it would have a thread of its own, in which nothing is known of the mode."
    before = torch._C._is_multithreading_enabled()
    with arithmetic():
        assert not torch._C._is_multithreading_enabled()
    assert torch._C._is_multithreading_enabled() == before


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_portable_training_is_training(kind, tmp_path, monkeypatch):
    "Ordinary training differs by rounding alone: the same counts, corrections and schedules."
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    losses = {}
    for determinism in ("deterministic", "portable"):
        small = dict(steps=8, eval_every=8, save_every=8, monitor=False, threads=1)
        cfg = RunConfig.from_preset("smoke", optimizer=kind, determinism=determinism, **small)
        corpus, tokenizer, dataset = prepare_data(cfg)
        parents = dict(corpus=corpus, tokenizer=tokenizer, tokens=dataset.store)
        run = start_run("train", cfg, None, **parents)
        train_model(run, corpus, tokenizer, dataset, model_for(run.cfg, tokenizer))
        records = read_metrics(run.folder / "metrics.ndjson")
        losses[determinism] = [r["values"]["loss"] for r in records if r["split"] == "train"]
    assert losses["portable"] == pytest.approx(losses["deterministic"], rel=5e-4)


def test_gradients_beyond_their_grid_are_refused(portable):
    "From 512 on their sum would depend on its order."
    from codex_nb.model.portable_functions import LARGEST_GRADIENT
    from codex_nb.train.engine import train_step

    model, batch = model_of("llama"), batch_of_documents()
    objective = LMLoss(model)

    def step(factor):
        def loss(_, b):
            return objective(b.ids_BT, b.targets_BT, b.positions_BT, b.cu_seqlens) * factor

        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with arithmetic(model):
            return float(train_step(model, [batch], loss, optimizer, 0.0, None)["grad_norm"])

    norm = step(1)
    assert step(0.9 * LARGEST_GRADIENT / norm) < LARGEST_GRADIENT
    with pytest.raises(PortableError, match="the norm .* below 512: lower lr"):
        step(1.1 * LARGEST_GRADIENT / norm)


def test_experts_are_refused_when_they_are_trained(portable):
    "Their tokens come from several rows, in numbers that depend on all of them."
    with pytest.raises(PortableError):
        gradients(model_of("qwen3_moe"), batch_of_documents(), 6)


@pytest.mark.parametrize(
    "settings,said",
    [
        (dict(dropout=0.1), "dropout: 0.1 is not possible with determinism=portable"),
        (dict(dtype="bf16"), "dtype: bf16 is not possible with determinism=portable"),
        (dict(compile="on"), "compile: on is not possible with determinism=portable"),
        (dict(parallel="fsdp", nproc=2), "give parallel=ddp"),
    ],
)
def test_settings_that_are_not_portable_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        RunConfig.from_preset("smoke", determinism="portable", **settings)


def test_a_portable_run_is_replayed_bit_for_bit_elsewhere(tmp_path):
    given = ["-p", "determinism=portable", "-p", "steps=4", "-p", "monitor=false"]
    fast = ["-p", "eval_documents=2", "-p", "max_documents=4", "-p", "resamples=100"]
    folder = tmp_path / "runs" / "a"
    done = codex("run", "train", *given, *fast, "--folder", folder, home=tmp_path)
    assert done.returncode == 0, done.stderr
    env = MACHINES["default"] if counts(False, True) else {}
    assert "portable: a replay on any machine" in codex("verify", folder, home=tmp_path).stdout
    done = codex("replay", folder, home=tmp_path, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "proven: L3, portable\n" in done.stdout
    assert "L3 holds" in done.stdout and "give on any machine" in done.stdout
