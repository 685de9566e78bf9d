"""A known warning of a library is what the table says; its words are still in its source."""

import ast
import contextlib
import importlib
import importlib.util
import json
import logging
import os
import warnings
from functools import lru_cache
from pathlib import Path

import pytest

import codex_nb.core.library_warnings as heard_by
from codex_nb.core.library_warnings import KNOWN_WARNINGS, LibraryError, library_warnings
from codex_nb.model.adapters import import_peft

LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
HEAD = "lm_head.weight"


def small(folder, arch="llama", edit=None, weights=None, generation=None, tie=True):
    "A model of two layers, changed after it was saved."
    from safetensors.torch import load_file, save_file

    from codex_nb.model.causal_lm import build_model, hide_progress_bars
    from codex_nb.model.model_config import ModelConfig

    shape = ModelConfig(arch=arch, width=32, layers=2, heads=2, seq_len=16, tie_embeddings=tie)
    with hide_progress_bars():
        build_model(shape, 50, 0, 1).save_pretrained(folder)
    if edit:
        config = json.loads((folder / "config.json").read_text())
        config.update(edit)
        (folder / "config.json").write_text(json.dumps(config))
    if weights:
        tensors = load_file(folder / "model.safetensors")
        weights(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def opened(**changes):
    "Open a model with a fault."

    def act(folder):
        from codex_nb.model.causal_lm import open_model

        return open_model(small(folder / "base", **changes))

    return act


def rope(**settings):
    return opened(edit={"rope_parameters": {"rope_theta": 1e4, **settings}})


def untied(tensors):
    import torch

    tensors[HEAD] = torch.ones(50, 32)


def trained(folder):
    "One step with recomputed activations, as the model's own loss is called."
    import torch

    model = opened(edit={"loss_type": "Mine"})(folder).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()


def padded(folder):
    import torch

    model = opened()(folder)
    ids = torch.zeros(1, 4, dtype=torch.long)
    model.warn_if_padding_and_no_attention_mask(ids, None)


def tokenizer(folder, name="PreTrainedTokenizerFast"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer

    fast = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    folder.mkdir(exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    given = {"tokenizer_class": name, "model_max_length": 2, "clean_up_tokenization_spaces": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return AutoTokenizer.from_pretrained(folder)


def masked(folder):
    talk = [{"role": "user", "content": "a"}]
    tokenizer(folder).apply_chat_template(
        talk,
        chat_template="{{ messages[0]['content'] }}",
        return_assistant_tokens_mask=True,
        return_dict=True,
    )


def adapted(folder, arch="llama", **settings):
    peft = import_peft()
    model = opened(arch=arch)(folder)
    given = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]} | settings
    return peft.get_peft_model(model, peft.LoraConfig(**given))


def adding(**settings):
    return lambda folder: adapted(folder, **settings)


def adapter(config=None, tensors=None, **settings):
    "An adapter in a folder, changed after it was saved, and merged."

    def act(folder):
        from safetensors.torch import load_file, save_file

        from codex_nb.model.model_registry import load_model

        to = folder / "adapter"
        adapted(folder, **settings).save_pretrained(to)
        stored = json.loads((to / "adapter_config.json").read_text())
        stored |= {"base_model_name_or_path": str(folder / "base"), **(config or {})}
        (to / "adapter_config.json").write_text(json.dumps(stored))
        if tensors:
            held = load_file(to / "adapter_model.safetensors")
            tensors(held)
            save_file(held, to / "adapter_model.safetensors", {"format": "pt"})
        return load_model(to)

    return act


def twice(folder):
    peft = import_peft()
    model = adapted(folder)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def elsewhere(folder):
    from codex_nb.model.adapters import adapter_tensors

    model = adapted(folder)
    model.peft_config["default"].base_model_name_or_path = str(folder / "gone")
    adapter_tensors(model)


def without_gradients(folder):
    import torch
    from torch.utils.checkpoint import checkpoint

    checkpoint(lambda x: x * 2, torch.ones(2), use_reentrant=True)


def compiler_without_gpu(folder):
    from unittest import mock

    from torch.utils import cpp_extension

    with mock.patch.dict(os.environ, CUDA_HOME=str(folder)):
        with mock.patch("torch.cuda.is_available", lambda: False):
            cpp_extension._find_cuda_home()


def one_process(folder):
    import torch
    from safetensors.torch import save_file

    from codex_nb.train.distributed import load_shards, shard_filename, this_world

    (folder / "part").mkdir()
    save_file({"x": torch.ones(2)}, folder / shard_filename("part", this_world()))
    load_shards(folder / "part", lambda name: torch.ones(2), this_world())


def long_value(folder):
    from mlflow.utils.validation import _validate_length_limit

    _validate_length_limit("Param value", 10, "x" * 20, truncate=True)


# The beginning of a row -> what makes it happen
HAPPENS = {
    "* LOAD REPORT": opened(weights=lambda t: t.pop("model.norm.weight")),
    "The tied weights": opened(weights=untied),
    "This checkpoint seem": opened(weights=lambda t: t.pop("model.embed_tokens.weight")),
    "Model config: ": opened(edit={"pad_token_id": -1}),
    "You passed `num_labels": opened(edit={"num_labels": 3, "id2label": {"0": "a", "1": "b"}}),
    "`rope_scaling` is": opened(arch="gpt2", edit={"rope_scaling": LINEAR}),
    "`rope_parameters`'s": rope(rope_type="linear", factor=0.5),
    "Missing validation function": rope(rope_type="nonsense", factor=2.0),
    "Unrecognized keys": rope(**LINEAR, speed=1),
    "The explicitly set RoPE": opened(
        edit={"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": YARN}
    ),
    "The following generation": opened(generation={"temperature": 0.5, "do_sample": False}),
    "`use_cache=True`": trained,
    "We strongly recommend": padded,
    "Token indices": lambda folder: tokenizer(folder)("abab"),
    "`tokenizer_class` is": lambda folder: tokenizer(folder, "LlamaTokenizer"),
    "return_assistant_tokens_mask": masked,
    "Found missing adapter": adapter(tensors=lambda t: t.pop(sorted(t)[0])),
    "Unexpected keyword": adapter(config={"brand_new": 1}),
    "The configuration file": adapter(config={"runtime_config": {}}),
    "You are trying to modify": twice,
    "Already found": twice,
    "The following * keys": adding(rank_pattern={"nothing": 4}),
    "You have passed exclude": adding(exclude_modules=["nothing"]),
    "Model with `tie": adapter(target_modules=["q_proj", "embed_tokens"]),
    "Model has `tie": adding(target_modules=["q_proj", "embed_tokens"]),
    "Input and output": adapter(modules_to_save=["lm_head"]),
    "fan_in_fan_out is set to True": adding(fan_in_fan_out=True),
    "fan_in_fan_out is set to False": adding(arch="gpt2", target_modules=["c_attn"]),
    "`lora_bias=True`": adding(lora_bias=True),
    "Could not find a config": elsewhere,
    "`is_gradient": adding(),
    "None of the inputs": without_gradients,
    "No CUDA runtime": compiler_without_gpu,
    "torch.distributed is": one_process,
    "* is truncated": long_value,
}


def provocation(row):
    found = [act for start, act in HAPPENS.items() if row.start.startswith(start)]
    return found[0] if found else None


@lru_cache
def strings_in(module):
    "All strings in the source of a module, those around a value apart."
    library, *names = module.split(".")
    folder = importlib.util.find_spec(library).submodule_search_locations[0]
    source = Path(folder, *names).with_suffix(".py").read_text()
    nodes = ast.walk(ast.parse(source))
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def flat(text):
    return " ".join(text.split())


@pytest.mark.parametrize("row", KNOWN_WARNINGS, ids=lambda row: f"{row.library}: {row.start[:40]}")
def test_known_warning_becomes_what_the_table_says(row, tmp_path, monkeypatch, capsys):
    texts = [flat(text) for text in strings_in(row.module)]
    missing = [p for p in row.start.split("*") if not any(flat(p) in t for t in texts)]
    assert not missing, f"{row.module} no longer warns in these words"
    if (act := provocation(row)) is None:
        return
    importlib.import_module(row.library)  # importing some sets their loggers up
    heard, take = [], heard_by._Block.take

    def listen(block, library, message):
        heard.append((library, heard_by.plain_words(message)))
        take(block, library, message)

    monkeypatch.setattr(heard_by._Block, "take", listen)
    with contextlib.suppress(Exception), library_warnings("here"):
        act(tmp_path)
    words = [message for _, message in heard if row.matches(message)]
    assert words, heard
    heard_by._printed.clear()
    capsys.readouterr()
    block = heard_by._Block("here")
    take(block, row.library, words[0])
    printed = capsys.readouterr().err
    if row.becomes == "error":
        assert block.errors == [f"here: {row.library}: {words[0]}; {row.text}"] and not printed
    elif row.becomes == "note":
        assert printed == f"note: here: {row.text} ({row.library}: {words[0]})\n"
        take(block, row.library, words[0])
        assert not capsys.readouterr().err and not block.errors
    else:
        assert not printed and not block.errors


def test_rows_are_distinct_and_every_provocation_has_one():
    assert len({(row.module, row.start) for row in KNOWN_WARNINGS}) == len(KNOWN_WARNINGS)
    starts = [row.start for row in KNOWN_WARNINGS]
    assert not [s for s in HAPPENS if not any(start.startswith(s) for start in starts)]


def test_unknown_warning_is_shown_with_the_name_of_its_library(capsys):
    import transformers  # noqa: F401

    heard_by._printed.clear()
    with library_warnings("models/mine"):
        for _ in range(2):
            logging.getLogger("transformers.modeling_utils").warning("the moon\n is full")
            warnings.warn_explicit("it rains", UserWarning, "/x/site-packages/peft/a.py", 3)
    assert capsys.readouterr().err.splitlines() == [
        "note: models/mine: transformers warns: the moon is full",
        "note: models/mine: peft warns: it rains",
    ]


FAULTS = {
    "rotary positions": (rope(rope_type="linear", factor=0.5), "got 0.5; correct it in config"),
    "tied and different": (opened(weights=untied), "set tie_word_embeddings to false"),
    "a layer too many": (opened(edit={"num_hidden_layers": 1}), "the weights have model.layers.1."),
    "an adapter's tensor": (
        adapter(tensors=lambda t: t.pop(sorted(t)[0])),
        "Found missing adapter",
    ),
    "an unused tensor": (adapter(config={"target_modules": ["q_proj"]}), "the base has no place"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_that_is_only_warned_of_stops_each_time(fault, tmp_path):
    from codex_nb.core.artifacts import ArtifactError

    act, words = FAULTS[fault]
    for k in range(2):  # the second is refused as the first
        (tmp_path / str(k)).mkdir()
        with pytest.raises(ArtifactError) as refused:
            act(tmp_path / str(k))
        assert words in str(refused.value) and str(tmp_path / str(k)) in str(refused.value)


def test_tensor_of_another_part_is_named(tmp_path, capsys):
    import torch

    heard_by._printed.clear()
    opened(weights=lambda t: t.update({"score.weight": torch.zeros(2, 32)}))(tmp_path)
    printed = capsys.readouterr().err
    assert "1 tensors belong to no part of this model and are left out: score.weight" in printed


def test_warnings_go_where_they_went_before(recwarn):
    logger = logging.getLogger("transformers")
    before = logger.handlers[:], logger.level, warnings.showwarning, warnings.filters[:]
    with pytest.raises(LibraryError), library_warnings("x"):
        logging.getLogger("peft.a").warning("Found missing adapter keys while loading")
    assert (logger.handlers, logger.level, warnings.showwarning, warnings.filters) == before
    with library_warnings():
        warnings.warn("mine", stacklevel=1)
    assert [str(w.message) for w in recwarn] == ["mine"]
