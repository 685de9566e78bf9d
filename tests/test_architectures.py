"""Architectures as bases: imported, judged, packed, trained, exported, beside transformers."""

import json

import pytest
import torch
from architectures import (
    MORE,
    SETTINGS,
    SHAPES,
    examine,
    make_base,
    tensor_names,
    train_on,
    write_data,
)
from helpers import codex, counts, train_losses

from codex_nb.core.config import ConfigError

PADDED = {"opt", "bloom", "falcon", "mamba2", "mamba", "mpt", "rwkv", "recurrent_gemma", "zamba2"}
PADDED |= {"lfm2", "qwen3_next", "gpt_oss"}
# One that is renamed in memory, one with experts, one without SDPA, one that sees across a border
# of documents, and one that takes no positions, keeps no keys and names no length.
FEW = ["gpt_neox", "mixtral", "gemma2", "falcon", "mamba2"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    monkeypatch.setenv("CODEX_NB_MODELS", str(tmp_path / "models"))
    return tmp_path


@pytest.mark.parametrize("kind", counts(FEW, [*SHAPES, *MORE]))
def test_base_is_used_as_in_transformers(kind, home):
    row = examine(kind, home, write_data(home / "data.jsonl"))
    found = {row.pop("packed")}
    assert found == {"padded" if kind in PADDED else "apart"}
    assert row.pop("architecture") == kind and all(v is True for v in row.values()), row


def test_run_that_pads_is_recorded_as_one_and_says_so(home):
    base, data = make_base(home / "base", "falcon"), write_data(home / "data.jsonl")
    run = train_on(base, data, home / "runs" / "padded")[0]
    assert (
        json.loads((run.folder / "config.json").read_text())["config"]["rows"]["packing"] == "pad"
    )
    settings = ("-p", "base", base, "-p", "data", data, "-p", "seq_len", "40")
    done = codex("preflight", *settings, home=home)
    assert done.returncode == 0, done.stderr
    assert "packing: documents in one row of falcon see each other" in done.stdout + done.stderr
    assert "(pad)" in done.stdout


def test_fused_attention_is_refused_where_there_is_none(home):
    base, data = make_base(home / "base", "gemma2"), write_data(home / "data.jsonl")
    settings = ("-p", "base", base, "-p", "data", data, "-p", "seq_len", "40")
    done = codex("preflight", *settings, home=home)
    assert done.returncode == 0 and "so eager is used" in done.stdout + done.stderr, done.stderr
    with pytest.raises(ConfigError, match="transformers has no sdpa for gemma2; give eager"):
        train_on(base, data, home / "runs" / "sdpa", attention="sdpa")


def test_base_without_a_tokenizer_is_refused_at_import(home):
    base = make_base(home / "silent", "llama", tokenizer=False)
    done = codex("models", "import", base, home=home)
    assert done.returncode == 1 and not (home / "models").exists(), done.stdout
    (line,) = done.stderr.splitlines()
    assert f"{base}: a model without a tokenizer" in line and "put the tokenizer.json" in line


@pytest.mark.parametrize("kind", counts(["mixtral"], ["mixtral", "gpt_neox", "olmoe", "qwen3_moe"]))
def test_weights_under_the_names_of_memory_are_read(kind, home):
    "As checkpoints of earlier versions hold them."
    from safetensors.torch import load_file, save_file

    from codex_nb.model.causal_lm import open_model
    from codex_nb.train.checkpoint import model_tensors, set_weights

    model = open_model(make_base(home / "base", kind))
    stored, inside = model_tensors(model), {n: p.detach() for n, p in model.named_parameters()}
    assert stored.keys() == tensor_names(home / "base") != inside.keys()
    on_disk = load_file(home / "base" / "model.safetensors")
    assert all(torch.equal(stored[name], t) for name, t in on_disk.items())
    for tensors in (stored, inside):
        other = open_model(home / "base")
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        set_weights(other, {name: t.clone() for name, t in tensors.items()})
        assert all(map(torch.equal, model.parameters(), other.parameters()))
    save_file(inside, home / "base" / "model.safetensors", {"format": "pt"})
    old = open_model(home / "base")
    assert all(map(torch.equal, model.parameters(), old.parameters()))
    assert model_tensors(old).keys() == stored.keys()  # saved again, it has those of the files


def test_adapter_passes_layers_by_that_it_cannot_train(home):
    "Experts fused into one tensor, and what the kernels of recurrences read directly."
    from codex_nb.model.adapters import adapter_report, add_adapter
    from codex_nb.model.causal_lm import open_model
    from codex_nb.model.model_config import AdapterConfig

    lora = AdapterConfig(adapter="lora", rank=2)
    kinds = counts(["zamba2", "deepseek_v3"], ["zamba2", "deepseek_v3", "qwen3_next", "mamba"])
    for kind in kinds:
        model = open_model(make_base(home / kind, kind))
        adapted = adapter_report(add_adapter(model, lora, 0))["adapted"]
        assert adapted and not {"out_proj", "dt_proj", "gate_proj"} & adapted.keys(), kind
    one_tensor = "the experts of this model are one tensor, .*; give any of kv_a_proj_with_mqa, "
    for target, reason in {
        "gate_proj": one_tensor,
        "mlp.experts.gate_up_proj": one_tensor,
        "qproj": "no such linear layer in this model; there are kv_a_proj_with_mqa, ",
    }.items():
        experts = lora.model_copy(update={"targets": ["o_proj", target]})
        with pytest.raises(ConfigError, match=f"^targets: {target}: {reason}"):
            add_adapter(open_model(home / "deepseek_v3"), experts, 0)


def test_base_is_frozen_in_fewer_bits_or_refused(home):
    "What a kernel reads past its layer stays in fp32; four bits are refused where they are none."
    from codex_nb.model.adapters import linear_layers
    from codex_nb.model.causal_lm import open_model
    from codex_nb.model.frozen_base import freeze_in_bf16, freeze_in_nf4, nf4_tensors

    ids = torch.arange(2, 18)[None]
    for kind in ("mamba", "qwen3_moe"):
        for freeze in (freeze_in_bf16, lambda m: freeze_in_nf4(m, linear_layers(m))):
            make_base(home / "frozen" / kind, kind)
            model = open_model(home / "frozen" / kind)
            with torch.no_grad():
                expected = model(input_ids=ids, use_cache=False).logits
                freeze(model)
                found = model(input_ids=ids, use_cache=False).logits
            error = (found - expected).std() / expected.std()
            assert 0 < error < (0.8 if nf4_tensors(model) else 0.05), (kind, error)
    for kind in ("falcon", "rwkv"):
        model = open_model(make_base(home / "frozen" / kind, kind))
        with pytest.raises(ConfigError, match=f"nf4 is not for {kind}, which .*base_dtype=bf16"):
            freeze_in_nf4(model, linear_layers(model))


@pytest.mark.parametrize("preset", counts(["moe-small"], ["qwen3-1.7b", "moe-small"]))
def test_preset_trains_from_scratch(preset, home):
    from codex_nb.core.tensors import tensor_table
    from codex_nb.run.judging import require_checkpoint, train_and_judge
    from codex_nb.run.settings import RunConfig

    size = dict(data="sample", vocab_size=300, width=32, layers=2, heads=4, seq_len=32, steps=12)
    size |= dict(kv_heads=2, ffn=64) if preset == "qwen3-1.7b" else {}
    given = (
        {k: v for k, v in SETTINGS.items() if k not in {*size, "packing"}} | size | dict(lr=0.01)
    )
    cfg = RunConfig.from_preset(preset, **given | dict(micro_batch=4, eval_every=12, save_every=12))
    run = train_and_judge(cfg, home / "runs" / "scratch")
    losses = [*train_losses(run.folder).values()]
    assert losses[-1] < losses[0] - 0.3, losses
    names = tensor_table(require_checkpoint(run.folder).path / "model.safetensors").keys()
    assert any("experts.7.up_proj" in n for n in names) == (preset == "moe-small")
