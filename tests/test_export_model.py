"""An exported model computes elsewhere what it computes here, or is refused."""

import json
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from described import find
from forger import MANIFEST, copy
from helpers import codex, counts, files_below, program, write_model, write_tokenizer

TALK = [{"role": "user", "content": "2 + 2?"}]
TEMPLATE = """{% for m in messages %}{% if m.role == "assistant" %}{% generation %}{{ m.content }}
<turn>{% endgeneration %}{% else %}{{ m.content }}<turn>{% endif %}{% endfor %}"""
COMMON = dict(vocab_size=0, bos_token_id=0, eos_token_id=0, pad_token_id=0)
HEADS = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
BASES = {
    "llama": HEADS | dict(num_hidden_layers=1, tie_word_embeddings=True),
    "biased": HEADS | dict(attention_bias=True, tie_word_embeddings=False, head_dim=16),
    "mistral": HEADS | dict(sliding_window=None, head_dim=8),
    "qwen2": HEADS | dict(tie_word_embeddings=True),
    "qwen3": HEADS | dict(head_dim=16),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma2": HEADS | dict(head_dim=16),
    "stretched": HEADS
    | dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0)),
}
TEXTS = ["It's a cat, and 12 dogs.", "The end\n\n of  it"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "A folder with a model of random weights for each entry of `BASES`."
    root = tmp_path_factory.mktemp("bases")
    for name, shape in BASES.items():
        special = ["<end>", "<turn>"]
        n = write_tokenizer(root / name, TEXTS, special, "<end>", True, TEMPLATE, 300)
        kind = name if name not in ("biased", "stretched") else "llama"
        write_model(root / name, kind, 8, **(COMMON | dict(vocab_size=n + 3) | shape))
    return root


@pytest.fixture
def home(described_runs, monkeypatch):
    "A workspace with runs that were trained, tuned, stopped and judged."
    monkeypatch.setenv("CODEX_NB_HOME", str(described_runs / "plain"))
    return described_runs / "plain"


def to_hub(name, target, **more):
    from codex_nb.deploy.hub_folder import export_hub, find_source

    return export_hub(find_source(str(name)), target, **more)


def to_gguf(name, target, *more):
    from codex_nb.deploy.gguf_file import export_gguf
    from codex_nb.deploy.hub_folder import find_source

    return export_gguf(find_source(str(name)), target, *more)


def read_gguf(path):
    "Key -> value, and name -> tensor, as the library `gguf` reads them."
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def greedy(name, prompts):
    "What `generate` of this package continues, with the prompt in front."
    from codex_nb.data.documents import Message
    from codex_nb.data.tokenizer import chat_ids, prompt_ids
    from codex_nb.deploy.hub_folder import find_source, open_source, stop_ids
    from codex_nb.eval.eval_config import GenerateConfig
    from codex_nb.eval.generate import generate_batch

    model, tokenizer = open_source(find_source(name))
    ids = [
        prompt_ids(tokenizer, p)
        if isinstance(p, str)
        else chat_ids(tokenizer, [Message(**m) for m in p])[0]
        for p in prompts
    ]
    ends = stop_ids(model, tokenizer)
    stop = [tokenizer.fast.id_to_token(i) for i in ends]
    made = generate_batch(
        model, tokenizer, ids, GenerateConfig(temperature=0.0, max_new_tokens=12), stop=stop
    )
    return [[*p, *g.ids] for p, g in zip(ids, made)], ends


def test_a_pipeline_without_this_package_and_a_network_answers_as_here(home, tmp_path):
    prompts = ["Tale", " 12 bees\n", TALK]
    assert to_hub("tuned", tmp_path / "out") == 0
    expected, ends = greedy("tuned", prompts)
    done = program("open_exported.py", tmp_path / "out", json.dumps(prompts), home=home)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(ends) == 2 and found["ends"] == ends
    for ids, whole in zip(found["ids"], expected):
        assert ids[: len(whole)] == whole and len(ids) - len(whole) <= 1
        assert set(ids[len(whole) :]) <= {*ends}


def test_a_folder_is_as_the_hub_wants_it_and_the_same_every_time(home, tmp_path):
    from safetensors import safe_open

    for name in ("a", "b"):
        to_hub("trained", tmp_path / name, base="maker/small-base")
    a, b = ({f: (tmp_path / n / f).read_bytes() for f in files_below(tmp_path / n)} for n in "ab")
    assert a == b and "tokenizer_config.json" in a and "special_tokens_map.json" in a
    assert {Path(f).suffix for f in a} == {".json", ".md", ".jinja", ".safetensors"}
    for file, data in a.items():
        for place in (home, tmp_path, Path(__file__).parent):
            assert str(place).encode() not in data, (file, place)
    run = find(home, "trained")
    digest = json.loads((run / MANIFEST).read_text())["digest"]
    made = json.loads(a["codex_nb.json"])
    assert made["run"] == {"name": run.name, "digest": digest} and made["parents"]["corpus"]
    with safe_open(tmp_path / "a" / "model.safetensors", "np") as f:
        assert json.loads(f.metadata()["codex_nb"]) == made
    card = a["README.md"].decode()
    values = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    assert values["library_name"] == "transformers" and made["model"] in card


def test_weights_are_split_as_transformers_reads_them(home, tmp_path):
    import torch

    from codex_nb.deploy.hub_folder import find_source as source
    from codex_nb.deploy.hub_folder import open_source, write_weights
    from codex_nb.model.causal_lm import open_model
    from codex_nb.train.checkpoint import model_tensors

    to_hub("trained", tmp_path / "out")
    model, _ = open_source(source("trained"))
    (tmp_path / "out" / "model.safetensors").unlink()
    write_weights(model_tensors(model), tmp_path / "out", {}, max_bytes=60_000)
    assert len(list((tmp_path / "out").glob("model-0*-of-0*.safetensors"))) > 1
    opened = dict(open_model(tmp_path / "out").named_parameters())
    assert all(torch.equal(opened[n], p) for n, p in model.named_parameters())


def test_an_adapter_names_its_base_and_opens_with_peft(home, tmp_path):
    assert to_hub("tuned", tmp_path / "out", merge=False, base="maker/small") <= 1e-4
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "maker/small"
    card = (tmp_path / "out" / "README.md").read_text()
    values = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    assert (values["library_name"], values["base_model"]) == ("peft", "maker/small")
    assert not list((tmp_path / "out").glob("model*"))


def test_an_adapter_on_an_adapter_leaves_as_one_model(home, tmp_path, capsys):
    import torch

    from codex_nb.core.artifacts import publish, read_manifest
    from codex_nb.core.tensors import write_tensors
    from codex_nb.model.adapters import adapter_settings, adapter_tensors, add_adapter
    from codex_nb.model.model_config import AdapterConfig
    from codex_nb.model.model_registry import load_model
    from codex_nb.run.bases import find_base, model_sizes
    from codex_nb.run.settings import FinetuneConfig

    below = find_base(str(find(home, "tuned")))
    lora = AdapterConfig(adapter="lora", rank=2)
    adapted = add_adapter(load_model(below), lora, 0, str(below))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.fill_(0.02)
    ids = torch.arange(1, 9)[None]
    expected = adapted.eval()(input_ids=ids).logits
    second = tmp_path / "second"
    with publish(second, "checkpoint", parents={"base": read_manifest(below).digest}) as draft:
        tensors = adapter_tensors(adapted)
        write_tensors(draft.path / "adapter_model.safetensors", tensors, {"format": "pt"})
        (draft.path / "adapter_config.json").write_text(json.dumps(adapter_settings(adapted)))
    assert to_hub(second, tmp_path / "merged") <= 1e-5
    logits = load_model(tmp_path / "merged")(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert to_hub(second, tmp_path / "adapter", merge=False) <= 1e-4
    assert (
        f"is an adapter itself, merged: export {below.parent.parent.name}"
        in capsys.readouterr().err
    )
    cfg = FinetuneConfig.from_preset("smoke", base=str(second))
    assert model_sizes(cfg).parameters > 10 * sum(t.numel() for t in tensors.values())


def test_gguf_holds_every_tensor_where_llama_cpp_looks_for_it(bases, tmp_path):
    import numpy as np
    from gguf import dequantize
    from safetensors.numpy import load_file

    path = tmp_path / "out.gguf"
    to_gguf(bases / "llama", path, "F32")
    values, tensors = read_gguf(path)
    ours = load_file(bases / "llama" / "model.safetensors")
    pick = "model.layers.0.{}.weight".format
    # As llama.cpp's converter orders a head: element i beside element i + half
    order = [8 * head + i + 4 * half for head in range(4) for i in range(4) for half in (0, 1)]
    expected = {
        "token_embd.weight": ours["model.embed_tokens.weight"],
        "blk.0.attn_q.weight": ours[pick("self_attn.q_proj")][order],
        "blk.0.attn_k.weight": ours[pick("self_attn.k_proj")][order[:16]],
        "blk.0.attn_v.weight": ours[pick("self_attn.v_proj")],
        "blk.0.attn_output.weight": ours[pick("self_attn.o_proj")],
        "blk.0.ffn_gate.weight": ours[pick("mlp.gate_proj")],
        "blk.0.ffn_up.weight": ours[pick("mlp.up_proj")],
        "blk.0.ffn_down.weight": ours[pick("mlp.down_proj")],
        "blk.0.attn_norm.weight": ours[pick("input_layernorm")],
        "blk.0.ffn_norm.weight": ours[pick("post_attention_layernorm")],
        "output_norm.weight": ours["model.norm.weight"],
    }
    assert tensors.keys() == expected.keys()
    for name, x in expected.items():
        assert np.array_equal(dequantize(tensors[name].data, tensors[name].tensor_type), x), name
    sizes = ("block_count", "context_length", "embedding_length", "feed_forward_length")
    assert [values[f"llama.{s}"] for s in sizes] == [1, 64, 32, 48]
    heads = ("head_count", "head_count_kv", "key_length")
    assert [values[f"llama.attention.{h}"] for h in heads] == [4, 2, 8]
    assert values["codex_nb.digest"] == json.loads(values["codex_nb.origin"])["model"]
    assert [values[f"tokenizer.ggml.{k}_token_id"] for k in ("bos", "eos", "eot")] == [0, 0, 1]
    assert values["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert values["tokenizer.ggml.pre"] == "gpt-2" and values["tokenizer.ggml.add_bos_token"]
    assert "generation" not in values["tokenizer.chat_template"]


@pytest.mark.parametrize("kind", counts(["Q8_0"], ["F16", "BF16", "Q8_0"]))
def test_rounded_gguf_is_the_same_every_time_and_within_the_rounding(bases, tmp_path, kind):
    from codex_nb.deploy.gguf_file import TOLERANCES

    for name in ("a", "b") if kind == "Q8_0" else ("a",):
        assert 0 < to_gguf(bases / "llama", tmp_path / name, kind) <= TOLERANCES[kind][1]
    if kind == "Q8_0":
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    _, tensors = read_gguf(tmp_path / "a")
    types = {t.tensor_type.name for t in tensors.values()}
    assert types == ({kind, "F32"} if kind != "Q8_0" else {kind, "F16", "F32"})


REFUSED = {
    "gemma2": "'gemma2' cannot be checked here.*--to hf",
    "stretched": "rope_type: 'linear' is not written here.*--to hf",
}


@pytest.mark.parametrize("name", counts(["qwen3", "gpt2"], [n for n in BASES if n not in REFUSED]))
def test_each_architecture_comes_back_from_gguf(bases, tmp_path, name):
    assert to_gguf(bases / name, tmp_path / "out.gguf", "F32") <= 1e-5
    values, _ = read_gguf(tmp_path / "out.gguf")
    assert values["tokenizer.ggml.tokens"][-1].startswith("[PAD")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_checked_is_refused_by_name(bases, tmp_path, name):
    from codex_nb.core.config import ConfigError

    with pytest.raises(ConfigError, match=REFUSED[name]):
        to_gguf(bases / name, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(home, bases, tmp_path):
    from codex_nb.data.tokenizer import TokenizerError

    with pytest.raises(TokenizerError, match="cuts words by a rule.*tokenizer=bpe-gpt2"):
        to_gguf("trained", tmp_path / "out.gguf")
    # As one that merges across words
    other = tmp_path / "other"
    shutil.copytree(bases / "qwen2", other)
    spec = json.loads((other / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["use_regex"] = False
    (other / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match="cuts words by a rule"):
        to_gguf(other, tmp_path / "out.gguf")
    spec["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match=r"changes texts .*Lowercase"):
        to_gguf(other, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_rule_that_is_not_that_of_the_tokenizer_is_noticed(bases, monkeypatch):
    from codex_nb.data.tokenizer import Tokenizer, TokenizerError
    from codex_nb.deploy import gguf_file

    tokenizer = Tokenizer(bases / "llama", "")
    assert gguf_file.require_tokenizer(tokenizer) == "gpt-2"
    monkeypatch.setattr(gguf_file, "word_rule", lambda spec: "qwen2")
    with pytest.raises(TokenizerError, match=r"llama\.cpp would give other ids"):
        gguf_file.require_tokenizer(tokenizer)


def louder(answers):
    "The answers of another model: its logits are larger."

    def changed(*args, **options):
        found = answers(*args, **options)
        return replace(found, logits=found.logits * 1.001)

    return changed


@pytest.mark.parametrize("fault", ["heads", "norm", "logits"])
def test_a_file_that_opens_as_another_model_is_refused_and_gone(
    bases, tmp_path, monkeypatch, fault
):
    from codex_nb.core.artifacts import ArtifactError
    from codex_nb.deploy import gguf_file

    (tmp_path / "out.gguf").write_text("of before")
    if fault == "heads":
        monkeypatch.setattr(gguf_file, "interleave_halves", lambda x, heads: x)
    elif fault == "norm":
        plain = gguf_file.shape_values
        wrong = {"attention.layer_norm_rms_epsilon": 1e-3}
        monkeypatch.setattr(gguf_file, "shape_values", lambda *a: plain(*a) | wrong)
    else:
        monkeypatch.setattr(gguf_file, "answers_of", louder(gguf_file.answers_of))
    message = {"heads": "q_proj.weight is off", "norm": "rms_norm_eps", "logits": "logits differ"}
    with pytest.raises(ArtifactError, match=message[fault]):
        to_gguf(bases / "biased", tmp_path / "out.gguf", "F32")
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    assert (tmp_path / "out.gguf").read_text() == "of before"


@pytest.mark.parametrize("fault", ["ids", "logits", "answers"])
def test_a_folder_that_opens_as_another_model_is_refused_and_gone(
    home, tmp_path, monkeypatch, fault
):
    from codex_nb.core.artifacts import ArtifactError
    from codex_nb.deploy import hub_folder

    plain = hub_folder.answers_of
    if fault == "ids":  # as transformers encodes without the beginning
        monkeypatch.setattr(
            hub_folder, "write_tokenizer_files", lambda t, folder, n: copy_tokenizer(t, folder)
        )
    elif fault == "logits":
        monkeypatch.setattr(hub_folder, "answers_of", louder(plain))
    else:
        wrong = lambda *a: (b := plain(*a)) and replace(b, generated=[[9] * 12] * 2)  # noqa: E731
        monkeypatch.setattr(hub_folder, "answers_of", wrong)
    with pytest.raises(ArtifactError, match="logits differ" if fault == "logits" else "other ids"):
        to_hub("trained", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def copy_tokenizer(tokenizer, folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer.path / name, folder / name)


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_full_disk_leaves_nothing(bases, tmp_path, form):
    from codex_nb.core.artifacts import DiskError

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(DiskError, match="out"):
            (to_hub if form == "hf" else to_gguf)(bases / "llama", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_what_does_not_verify_is_refused(home, tmp_path):
    from codex_nb.core.artifacts import ArtifactError
    from codex_nb.run.run_record import RunError

    run = copy(find(home, "trained"), tmp_path / "changed")
    log = run / "metrics.csv"
    log.write_text(log.read_text() + "\n")
    with pytest.raises(RunError, match="does not hold at L0.*an export takes only what holds"):
        to_hub(run, tmp_path / "out")
    (run / MANIFEST).unlink()
    with pytest.raises(RunError, match="is interrupted.*an export takes finished runs"):
        to_hub(run, tmp_path / "out")
    # Its checkpoint is whole, and may be exported for itself ...
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    assert to_hub(checkpoint, tmp_path / "out") == 0
    # ... unless it was changed
    with (checkpoint / "model.safetensors").open("r+b") as f:
        f.seek(-2, 2)
        f.write(b"\x11\x11")
    with pytest.raises(ArtifactError, match="has changed"):
        to_hub(checkpoint, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_the_command_prints_what_opens_it_and_replaces_only_what_it_has_made(home, bases, tmp_path):
    def export(*words):
        return codex("export", *words, home=home, cwd=tmp_path)

    base = str(bases / "llama")
    done = export(base, "--to", "gguf", "--type", "Q8_0")
    path = tmp_path / "llama-Q8_0.gguf"
    assert done.returncode == 0 and path.is_file(), done.stderr
    assert done.stdout.splitlines()[-1] == f"open it with: llama-cli -m {path}"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refused = {
        (base, "--to", "gguf", "--type", "Q8_0"): "exists already",
        (base, "--to", "hf", "-o", "mine", "--force"): "was not made by this command",
        (base, "--to", "hf", "-o", f"{base}/x"): "inside of what",
        ("nothing", "--to", "hf"): "nothing",
    }
    for words, message in refused.items():
        done = export(*words)
        assert done.returncode == 1 and message in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
