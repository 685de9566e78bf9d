"""A frozen base in bf16 or four bits: what it changes, what it does not, and what it needs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import program, run_record, train_losses

SETTINGS = dict(
    data="chat",
    device="cpu",
    dtype="bf16",
    seq_len=48,
    steps=3,
    batch_size=4,
    lr=2e-2,
    rank=4,
    eval_every=3,
    eval_documents=2,
    save_every=3,
    max_new_tokens=2,
)


def finetuned(base, folder, base_dtype, **more):
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.settings import FinetuneConfig

    cfg = FinetuneConfig.from_preset(
        "smoke", base=str(base), base_dtype=base_dtype, **SETTINGS | more
    )
    return train_and_judge(cfg, folder, judged=False)


@pytest.fixture(scope="module")
def in_bf16(small_model, tmp_path_factory):
    "The small model as most public ones are: its file is in bf16."
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("bf16") / "base"
    AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(small_model) / name).read_bytes())
    return folder


def test_a_bf16_file_is_trained_on_as_if_it_were_opened_in_fp32(in_bf16, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    runs = [finetuned(in_bf16, tmp_path / dtype, dtype) for dtype in ("fp32", "bf16")]
    losses, weights = zip(
        *(
            (
                train_losses(run.folder),
                (run.folder / "checkpoints/step-00000003/adapter_model.safetensors").read_bytes(),
            )
            for run in runs
        )
    )
    assert losses[0] == losses[1] and weights[0] == weights[1]
    fp32, bf16 = (json.loads((run.folder / "config.json").read_text()) for run in runs)
    assert "base_dtype" not in fp32["identity"]["adapter"]  # the digest of earlier versions
    assert bf16["identity"]["adapter"]["base_dtype"] == "bf16"


@pytest.mark.parametrize("base_dtype", ["bf16", "nf4"])
def test_what_was_trained_beside_a_rounded_base_is_judged_and_merged_beside_it(
    base_dtype, small_model, tmp_path, monkeypatch
):
    "The file is in fp32 here, so bf16 rounds it."
    from codex_nb.data.tokenizer import Tokenizer
    from codex_nb.eval.scoring import score
    from codex_nb.model.model_registry import load_model
    from codex_nb.run.recipe import export_merged
    from codex_nb.run.training_inputs import prepare_training
    from codex_nb.train.checkpoint import read_weights, set_weights

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    run = finetuned(small_model, tmp_path / "run", base_dtype)
    checkpoint = run.folder / "checkpoints" / "step-00000003"
    inputs = prepare_training(run.cfg)
    trained, tokenizer = inputs.model, Tokenizer(checkpoint, "")
    set_weights(trained, read_weights(checkpoint))
    documents = list(inputs.corpus.split("validation"))[:4]

    def bits_per_byte(model):
        records = score(model, tokenizer, documents)
        return sum(r.bits for r in records) / sum(r.bytes for r in records)

    as_trained = bits_per_byte(trained)
    assert bits_per_byte(load_model(checkpoint)) == pytest.approx(as_trained, rel=1e-6)
    exported = export_merged(run, trained, tokenizer)
    assert bits_per_byte(load_model(exported.path)) == pytest.approx(as_trained, rel=1e-6)
    config = json.loads((exported.path / "config.json").read_text())
    assert config["dtype"] == "float32"  # as its weights are


def test_a_base_in_four_bits_is_an_artifact_that_the_run_and_its_checkpoints_name(
    in_bf16, tmp_path, monkeypatch
):
    from codex_nb.core.artifacts import ArtifactError, read_manifest
    from codex_nb.core.store import find_stored
    from codex_nb.core.tensors import tensor_table
    from codex_nb.model.model_registry import load_model, quantized_base
    from codex_nb.run.run_folder import verify_files

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    run = finetuned(in_bf16, tmp_path / "run", "nf4")
    checkpoint = run.folder / "checkpoints" / "step-00000003"
    named = [read_manifest(p).parents["quantized_base"] for p in (run.folder, checkpoint)]
    artifact = find_stored("quantized_base", named[0])
    assert named == [artifact.digest] * 2 and verify_files(run.folder)["ok"]
    assert run_record(run.folder)["identity"]["adapter"]["base_dtype"] == "nf4"
    adapter = tensor_table(checkpoint / "adapter_model.safetensors")
    assert adapter and all(".lora_" in name for name in adapter)
    # made again it is the same, and another one is refused
    shutil.rmtree(artifact.path)
    assert quantized_base(in_bf16).digest == artifact.digest
    shutil.rmtree(artifact.path)
    monkeypatch.setattr("codex_nb.model.frozen_base.BLOCK", 128)
    with pytest.raises(ArtifactError, match="in four bits it is .* beside which the adapter was"):
        load_model(checkpoint)


def test_a_base_in_four_bits_learns_nearly_as_one_in_bf16(in_bf16, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    runs = [finetuned(in_bf16, tmp_path / dtype, dtype) for dtype in ("bf16", "nf4")]
    bf16, nf4 = ([*train_losses(run.folder).values()] for run in runs)
    assert nf4 != bf16 and nf4 == pytest.approx(bf16, rel=0.02)


def test_gradients_go_through_four_bits_after_an_evaluation(in_bf16, tmp_path, monkeypatch):
    "Those of the weights that they stand for; bitsandbytes' own layer passes none then."
    from codex_nb.model.frozen_base import thaw
    from codex_nb.run.settings import FinetuneConfig
    from codex_nb.run.training_inputs import prepare_training

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    given = SETTINGS | dict(base=str(in_bf16), base_dtype="nf4", dtype="fp32")
    model = prepare_training(FinetuneConfig.from_preset("smoke", **given)).model
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ids = torch.arange(2, 34).reshape(2, 16)

    def gradients():
        for name, p in trained.items():
            p.data.fill_(0.01 if "lora_B" in name else 0.1)
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found = {name: p.grad.clone() for name, p in trained.items()}
        model.zero_grad()
        return found

    with torch.no_grad():
        model.eval()(input_ids=ids, use_cache=False)
    beside_codes = gradients()
    thaw(model)
    for name, expected in gradients().items():
        assert expected.abs().sum() > 0, name
        torch.testing.assert_close(beside_codes[name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("base_dtype", ["fp32", "bf16"])
def test_a_base_is_opened_once_though_it_is_tried_before_it_is_packed(
    base_dtype, small_model, tmp_path, monkeypatch
):
    from codex_nb.run import bases

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    opened, tried = [], []
    load, isolates = bases.load_model, bases.isolates_documents
    monkeypatch.setattr(bases, "load_model", lambda *a, **k: opened.append(k) or load(*a, **k))
    monkeypatch.setattr(bases, "isolates_documents", lambda m: tried.append(m) or isolates(m))
    for k in range(2):  # a second run has a model of its own
        finetuned(small_model, tmp_path / str(k), base_dtype)
        assert opened == [{"dtype": base_dtype}] * (k + 1) and len(tried) == k + 1


def test_what_four_bits_need_is_said(small_model, monkeypatch):
    from codex_nb.core.config import ConfigError
    from codex_nb.model.model_registry import quantized_base
    from codex_nb.run.settings import FinetuneConfig

    given = dict(base=str(small_model), device="cpu", base_dtype="nf4")
    with pytest.raises(ConfigError, match="dora divides by the norms .* which nf4 rounds"):
        FinetuneConfig.from_preset("smoke", adapter="dora", **given)
    with pytest.raises(ConfigError, match="nf4 together with parallel=fsdp"):
        FinetuneConfig.from_preset("smoke", nproc=2, parallel="fsdp", **given)
    with pytest.raises(ConfigError, match="load_in_4bit.*give base_dtype=nf4"):
        FinetuneConfig.from_preset("smoke", load_in_4bit=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"^bitsandbytes is not installed; .*codex_nb\[qlora\]"):
        quantized_base(small_model)


@pytest.mark.parametrize(
    "adapter, dtype, expected",
    [("lora", "bf16", "bf16"), ("dora", "bf16", "fp32"), ("rslora", "fp32", "fp32")],
)
def test_the_base_has_the_dtype_of_the_products(adapter, dtype, expected):
    from codex_nb.run.settings import FinetuneConfig

    given = dict(adapter=adapter, dtype=dtype, device="cpu")
    assert FinetuneConfig.from_preset("smoke", **given).adapter.base_dtype == expected


def test_a_record_from_before_there_was_a_choice_means_fp32(tmp_path):
    from codex_nb.run.run_record import RunRecord
    from codex_nb.run.settings import FinetuneConfig

    cfg = FinetuneConfig.from_preset("smoke", dtype="bf16", device="cpu", base_dtype="fp32")
    RunRecord.of("finetune", cfg, tmp_path).save(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    del record["config"]["adapter"]["base_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    settings = RunRecord.load(tmp_path).settings()
    assert settings.adapter.base_dtype == "fp32" and settings.digest() == record["digest"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_bf16_file_needs_its_own_size_while_it_is_opened(tmp_path):
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=3)
    config = LlamaConfig(vocab_size=8192, num_attention_heads=8, **shape)
    with torch.device("meta"):
        names = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    tensors = {n: torch.ones(s, dtype=torch.bfloat16) for n, s in names.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    size = sum(t.nbytes for t in tensors.values())
    del tensors
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(tmp_path)
    done = program("open_in_bf16.py", tmp_path, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    held, peak = map(int, done.stdout.split())
    assert held < 1.01 * size and peak < 1.25 * size  # in fp32 it would be twice as much


@pytest.fixture
def memory_is(monkeypatch):
    "A function that says how much memory there is, in MiB."
    from codex_nb.tracking.system_monitor import Memory

    def set_to(limit, available):
        there = Memory(int(limit * 2**20), int(available * 2**20))
        monkeypatch.setattr("codex_nb.run.bases.memory_here", lambda: there)

    return set_to


@pytest.mark.parametrize(
    "adapter, dtype, base_dtype",
    [("none", "fp32", None), ("lora", "bf16", "bf16"), ("lora", "bf16", "nf4")],
)
def test_the_estimate_is_near_what_a_step_takes(
    adapter, dtype, base_dtype, small_model, tmp_path, monkeypatch, memory_is
):
    from codex_nb.run.preflight import preflight, preflight_lines
    from codex_nb.run.settings import FinetuneConfig

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    given = {k: v for k, v in SETTINGS.items() if k != "rank"} | dict(adapter=adapter, dtype=dtype)
    given |= dict(rank=None if adapter == "none" else 4, base_dtype=base_dtype)
    cfg = FinetuneConfig.from_preset("smoke", base=str(small_model), force=True, **given)
    memory_is(limit=1000, available=0.1)
    report = preflight(cfg)
    estimated = report["memory"]
    held = sum(estimated.get(k, 0) for k in ("weights", "adapter", "gradients", "moments"))
    assert held == pytest.approx(report["state_bytes"], rel=0.01)
    assert estimated["moments"] == 8 * report["trained"]
    assert 0.5 < estimated["activations"] / report["activation_bytes"] < 2
    (line,) = (line for line in preflight_lines(report) if "memory: training needs" in line)
    assert "the least is micro_batch=1" in line
    assert ("adapter=lora" in line) == (adapter == "none")


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(
    small_model, tmp_path, monkeypatch, memory_is
):
    from codex_nb.core.config import ConfigError
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.settings import FinetuneConfig

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    full = {k: v for k, v in SETTINGS.items() if k != "rank"} | dict(adapter="none", dtype="fp32")
    cfg = FinetuneConfig.from_preset("smoke", base=str(small_model), **full, rank=None)
    memory_is(limit=0.3, available=0.3)
    with pytest.raises(ConfigError, match=r"^memory: training needs .* take a smaller model"):
        train_and_judge(cfg, tmp_path / "run", judged=False)
    assert not (tmp_path / "run").exists()


def test_what_is_free_decides_and_force_starts_a_run_nevertheless(
    small_model, tmp_path, monkeypatch, memory_is, capsys
):
    from codex_nb.core.config import ConfigError
    from codex_nb.run.bases import memory_needed
    from codex_nb.run.settings import FinetuneConfig
    from codex_nb.run.training_inputs import start_run

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    given = SETTINGS | dict(base=str(small_model), base_dtype="bf16", threads=1)
    cfg = FinetuneConfig.from_preset("smoke", **given)
    needed = sum(memory_needed(cfg).values()) / 2**20
    memory_is(limit=1e6, available=needed / 1.5)
    words = r"^memory: training needs about .*, and .* are free here .* force=true starts it"
    with pytest.raises(ConfigError, match=words):
        start_run("finetune", cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for name, available, more in (
        ("forced", needed / 1.5, dict(force=True)),
        ("near", needed / 1.1, {}),
        ("free", needed + 1, {}),
    ):
        memory_is(limit=1e6, available=available)
        chosen = FinetuneConfig.from_preset("smoke", **given, **more)
        assert chosen.digest() == cfg.digest()
        start_run("finetune", chosen, tmp_path / name).lock.release()
        assert ("note: memory: training needs" in capsys.readouterr().out) == (name != "free")
