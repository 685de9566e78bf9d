"""Every kind of run on a GPU that refuses what a real one does: see fake_gpu and strict_cuda."""

import contextlib
import re
from unittest import mock

import pytest
import torch
from fake_gpu import FakeGPU
from helpers import PROVE
from strict_cuda import RAISING, StrictCuda

SMALL = dict(
    device="cuda",
    compile="off",
    graphs="off",
    monitor=False,
    width=32,
    seq_len=32,
    steps=2,
    batch_size=4,
    micro_batch=2,
    eval_every=2,
    eval_documents=2,
    save_every=2,
    max_new_tokens=3,
    max_documents=4,
    resamples=100,
)
RUNS = {
    "muon": dict(ema=0.9),
    "adamw, gpt2, dropout": dict(optimizer="adamw", arch="gpt2", dropout=0.1, lr=1e-3),
    "best-fit, fp32": dict(packing="best-fit", dtype="fp32", on_bad="skip", spike=3.0),
    "pad": dict(packing="pad", data="chat", recompute=True),
}


class Strict:
    "Both fakes together, for a `with` block."

    def __enter__(self):
        from codex_nb.train import engine

        self.gpu, self.mode = FakeGPU(), StrictCuda()
        self.gpu.strict = self.mode
        step = self.mode.step(engine.train_step)
        self.patch = mock.patch("codex_nb.train.engine.train_step", step)
        self.gpu.__enter__()
        self.mode.__enter__()
        self.patch.__enter__()
        return self

    def __exit__(self, *exc):
        self.patch.__exit__(*exc)
        self.mode.__exit__(*exc)
        self.gpu.__exit__(*exc)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    from codex_nb.model.frozen_base import import_bitsandbytes

    with contextlib.suppress(ImportError):  # peft imports it, and it would look for the GPU then
        import_bitsandbytes()
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def strict(home, monkeypatch):
    from codex_nb.core.repro import determinism, set_determinism

    monkeypatch.setenv("CODEX_NB_HOME", str(home))
    before, state = determinism(), torch.get_rng_state()
    with Strict() as found:
        yield found
    set_determinism(before)
    torch.set_rng_state(state)


def test_the_list_is_that_of_this_torch():
    text = torch.use_deterministic_algorithms.__doc__.partition("operations will throw a")[2]
    text = text.partition("In addition")[0]
    assert set(re.findall(r"\* :\w+:`([\w.]+)`", text)) == RAISING.keys()
    operators = {name for names in RAISING.values() for name in names}
    assert not [name for name in operators if not hasattr(torch.ops.aten, name)]


@pytest.mark.parametrize("kind", RUNS)
def test_training_and_judging_do_nothing_that_a_gpu_refuses(kind, strict, tmp_path):
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.settings import RunConfig

    cfg = RunConfig.from_preset("smoke", **SMALL | RUNS[kind])
    train_and_judge(cfg, tmp_path / "run")
    assert strict.mode.steps == 2 and strict.mode.operators > 1000
    assert strict.gpu.copies and strict.gpu.waits


@pytest.mark.skipif(not PROVE, reason="a teacher reads all rows, which takes minutes; make prove")
@pytest.mark.parametrize("k", [0, 8])
def test_distillation_does_nothing_that_a_gpu_refuses(k, small_model, strict, tmp_path):
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.settings import DistillConfig

    given = SMALL | dict(teacher=str(small_model), teacher_top_k=k)
    train_and_judge(DistillConfig.from_preset("smoke", **given), tmp_path / "run", judged=False)
    assert strict.mode.steps == 2


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_adapters_and_merging_do_nothing_that_a_gpu_refuses(dtype, small_model, strict, tmp_path):
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.recipe import export_merged
    from codex_nb.run.settings import FinetuneConfig
    from codex_nb.run.training_inputs import prepare_training

    given = {k: v for k, v in SMALL.items() if k != "width"} | dict(data="chat", dtype=dtype)
    cfg = FinetuneConfig.from_preset("smoke", base=str(small_model), rank=2, **given)
    run = train_and_judge(cfg, tmp_path / "run", judged=False)
    inputs = prepare_training(run.cfg)
    export_merged(run, inputs.model, inputs.tokenizer)
    assert strict.mode.steps == 2
