"""Models, adapters, tokenizers and templates that were made to hang or to fill the memory.

Each is refused by one line, within seconds and within 8 GB of address space.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import ExitStack

import pytest
import warm
from helpers import BIN, PROGRAMS, ROOT, counts, environment, shared_folder

SECONDS = 30  # A hang takes longer; opening a model on a machine that is busy does not


def edit(path, **changes):
    "Change values of a JSON file."
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config(**changes):
    return lambda folder: edit(folder / "config.json", **changes)


def tokenizer(**changes):
    return lambda folder: edit(folder / "tokenizer.json", **changes)


def template(text):
    return lambda folder: edit(folder / "tokenizer_config.json", chat_template=text)


def fifo(name):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def link(name, target):
    def make(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return make


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def a_folder(name):
    def make(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return make


def tensors(table, size=64):
    "Weights whose header says what the content is not."

    def make(folder):
        head = (table if isinstance(table, str) else json.dumps(table)).encode()
        content = len(head).to_bytes(8, "little") + head + b"\0" * size
        (folder / "model.safetensors").write_bytes(content)

    return make


def grow(*contents):
    "A normalizer that replaces the letter a again and again."
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": c} for c in contents]
    return tokenizer(normalizer={"type": "Sequence", "normalizers": steps})


def split(pattern):
    how = {"behavior": "Isolated", "invert": False}
    return tokenizer(pre_tokenizer={"type": "Split", "pattern": {"Regex": pattern}} | how)


def added_token(**changes):
    def make(folder):
        tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        edit(folder / "tokenizer.json", added_tokens=[*tokens, tokens[0] | changes])

    return make


FIXED = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
FIXED |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
DOUBLE = "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(99) %}"
DOUBLE += "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"
A_TENSOR = {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 64]}

# Name -> (what is done to a model in order, the command, parts of the line that it ends with).
ATTACKS = {
    # no plain files
    "weights: FIFO": (fifo("model.safetensors"), "generate", "model.safetensors: no plain file"),
    "weights: FIFO, imported": (fifo("model.safetensors"), "import", "no plain file"),
    "weights: FIFO, verified": (fifo("model.safetensors"), "verify", "no plain file"),
    "weights: device": (link("model.safetensors", "/dev/zero"), "generate", "no plain file"),
    "weights: folder": (a_folder("model.safetensors"), "generate", "model.safetensors: a folder"),
    "more weights: FIFO": (fifo("other.safetensors"), "generate", "no plain file"),
    "configuration: FIFO": (fifo("config.json"), "generate", "config.json"),
    "generation: FIFO": (fifo("generation_config.json"), "generate", "no plain file"),
    "tokenizer: FIFO": (fifo("tokenizer.json"), "generate", "tokenizer.json: no plain file"),
    "its settings: FIFO": (fifo("tokenizer_config.json"), "generate", "no plain file"),
    "tokenizer: device": (link("tokenizer.json", "/dev/zero"), "generate", "no plain file"),
    "template: FIFO": (fifo("chat_template.jinja"), "generate", "no plain file"),
    # sizes
    "layers": (config(num_hidden_layers=10**9), "generate", "num_hidden_layers: 1,000,000,000"),
    "layers, imported": (config(num_hidden_layers=10**9), "import", "num_hidden_layers"),
    "width": (config(hidden_size=10**7), "generate", "hidden_size: 10,000,000"),
    "vocabulary": (config(vocab_size=10**10), "generate", "vocab_size: 10,000,000,000"),
    "labels": (config(num_labels=10**9), "generate", "num_labels: 1,000,000,000"),
    "widths that multiply": (
        config(hidden_size=400, intermediate_size=400, num_hidden_layers=11, head_dim=400),
        "generate",
        "config.json: describes a model of",
    ),
    "layers without weights": (config(num_hidden_layers=2), "generate", "lack"),
    "another width": (
        config(intermediate_size=128),
        "generate",
        "mlp.down_proj.weight: config.json describes a shape of [32, 128]",
    ),
    "a layer too wide for words": (config(hidden_size="wide"), "generate", "hidden_size"),
    "nested": (text("config.json", "[" * 10**6), "generate", "config.json: not JSON"),
    "a list": (text("config.json", "[]"), "import", "config.json: holds a list"),
    "shape": (tensors({"model.norm.weight": A_TENSOR}), "generate", "model.norm.weight"),
    "header": (tensors("[" * 10**6), "generate", "not a safetensors file"),
    "header, imported": (tensors("[" * 10**6), "import", "not a safetensors file"),
    "its own kernels": (
        config(attn_implementation="someone/kernel"),
        "generate",
        "attn_implementation: 'someone/kernel' names code",
    ),
    # templates
    "loop": (template("{% for i in range(999999999) %}x{% endfor %}"), "chat", "Range too big"),
    "nested loops": (template(NESTED), "chat", "chat template: more than 5 s"),
    "text of 10 GB": (template("{{ 'a' * 10000000000 }}"), "chat", "MB of memory"),
    "text that doubles": (template(DOUBLE), "chat", "chat template: more than"),
    "text of 100 MB": (template("{{ 'a' * 100000000 }}"), "chat", "its chat template: "),
    "power": (template("{{ (7 ** (10 ** 10)) % 2 }}"), "chat", "chat template: more than"),
    "its own refusal": (template("{{ raise_exception('no') }}"), "chat", "chat template: no"),
    "no template": (template("{% for %}"), "chat", "chat template: "),
    # tokenizers
    "growth": (grow("a" * 10**6), "generate", "normalizer: makes a text 1,000,000 times as long"),
    "growth in steps": (grow(*["aa" * 50] * 6), "generate", "normalizer: makes a text"),
    "growth, imported": (grow(*["aa" * 50] * 6), "import", "normalizer: makes a text"),
    "growth on a longer way": (
        tokenizer(normalizer={"type": "Prepend", "prepend": "a" * 10**6}),
        "generate",
        "normalizer: makes a text",
    ),
    "pattern": (split("(a+)+$"), "generate", "tokenizer.json: cannot encode"),
    "padding": (tokenizer(padding=FIXED), "generate", None),
    "truncation": (
        tokenizer(truncation={"max_length": 0, "strategy": "LongestFirst", "stride": 9}),
        "generate",
        None,
    ),
    "id": (added_token(id=4 * 10**9, content="<far>"), "generate", "4,000,000,000"),
    "nested tokenizer": (text("tokenizer.json", "[" * 10**6), "generate", "not JSON"),
    "no tokenizer": (text("tokenizer.json", "{}"), "generate", "tokenizer.json"),
    "no model": (tokenizer(model={"type": "BPE", "vocab": 5}), "generate", "tokenizer.json"),
    "no pattern": (split("("), "generate", "tokenizer.json"),
}
PROMPT = "a" * 60 + "!"
COMMANDS = {
    "generate": ["generate", "{}", "--prompt", PROMPT, "-p", "max_new_tokens=1"],
    "import": ["models", "import", "{}", "--name", "theirs"],
    "verify": ["models", "verify", "{}"],
    "chat": ["chat", "{}", "-p", "max_new_tokens=1"],
}


def run(folder, command, tmp_path, cwd=ROOT):
    "Run a command on a folder; its exit code and what it printed, or a failure after `SECONDS`."
    words = [w.replace("{}", str(folder)) for w in COMMANDS.get(command, command)]
    env = environment(tmp_path / "home", CODEX_NB_MODELS=str(tmp_path / "models"))
    argv = [BIN / "python", PROGRAMS / "within_limits.py", *words]
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
        files[0].write("hi\n\n")
        files[0].seek(0)
        process = warm.Warm(argv, cwd, env, *files)
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"still running after {SECONDS} s")
        for f in files:
            f.seek(0)
        _, out, error = (f.read() for f in files)
    return process.returncode, out, error


def is_one_line(error):
    "Whether a refusal is a line of ours, and not a traceback."
    lines = [line for line in error.splitlines() if line.startswith("codex-nb: ")]
    return len(lines) == 1 and "Traceback" not in error and "this is a bug" not in error


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_folder_is_refused_within_seconds(name, small_model, tmp_path):
    spoil, command, expected = ATTACKS[name]
    folder = shutil.copytree(small_model, tmp_path / "theirs")
    spoil(folder)
    code, out, error = run(folder, command, tmp_path)
    if expected is None:  # harmless: what it asks for is not done
        assert code == 0, error
        return
    if command == "verify":  # it lists what is wrong
        assert code == 1 and expected in out and not error, (code, out, error)
        return
    assert code == 1 and is_one_line(error) and expected in error, (code, error[-2000:])
    assert str(folder) in error, error


@pytest.fixture(scope="session")
def small_adapter(small_model, tmp_path_factory):
    "The folder of an adapter of the small model; not to be written to."
    from codex_nb.core.tensors import write_tensors
    from codex_nb.model.adapters import adapter_settings, adapter_tensors, add_adapter
    from codex_nb.model.causal_lm import open_model
    from codex_nb.model.model_config import AdapterConfig

    def make(folder):
        lora = AdapterConfig(adapter="lora", rank=2)
        adapted = add_adapter(open_model(small_model), lora, seed=0, base=str(small_model))
        tensors = adapter_tensors(adapted)
        write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
        settings = json.dumps(adapter_settings(adapted))
        (folder / "adapter_config.json").write_text(settings)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(small_model / name, folder / name)

    return shared_folder(tmp_path_factory, "small-adapter", make)


def settings(**changes):
    return lambda folder: edit(folder / "adapter_config.json", **changes)


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


ADAPTERS = {
    "in order": (lambda folder: None, "generate", None),
    "in order, imported": (lambda folder: None, "import", None),
    "pickled": (pickled, "generate", "its weights are pickled"),
    "pickled, imported": (pickled, "import", "its weights are pickled"),
    "FIFO": (fifo("adapter_model.safetensors"), "generate", "no plain file"),
    "settings: FIFO": (fifo("adapter_config.json"), "generate", "adapter_config.json"),
    "rank": (settings(r=10**9), "generate", "r: 1000000000, but no dimension"),
    "rank, imported": (settings(r=10**9), "import", "r: 1000000000, but no dimension"),
    "rank of a layer": (settings(rank_pattern={"q_proj": 10**9}), "generate", "r: 1000000000"),
    "rank of words": (settings(r="a"), "generate", "r: 'a'"),
    "another rank": (settings(r=3), "generate", "does not fit its base"),
    "repeated layers": (settings(layer_replication=[[0, 1]] * 10**6), "generate", "replication"),
    "pattern": (settings(target_modules="(.+)+!"), "generate", "repeats what itself repeats"),
    "alternatives": (settings(target_modules="(a|a.*)*!"), "generate", "repeats what itself"),
    "another method": (settings(peft_type="PROMPT_TUNING"), "generate", "peft_type"),
    "base": (settings(base_model_name_or_path=5), "generate", "base_model_name_or_path: 5"),
    "no base": (settings(base_model_name_or_path=None), "generate", ""),
    "nested": (text("adapter_config.json", "[" * 10**6), "generate", "not JSON"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_hostile_adapter_is_refused_within_seconds(name, small_adapter, tmp_path):
    spoil, command, expected = ADAPTERS[name]
    folder = shutil.copytree(small_adapter, tmp_path / "theirs")
    spoil(folder)
    code, out, error = run(folder, command, tmp_path)
    if expected is None:
        assert code == 0, error
        return
    assert code == 1 and is_one_line(error) and expected in error, (code, error[-2000:])


# --- what real models look like is not refused

LLAMA_3 = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- message['content'] | trim }}
{{- '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""
QWEN = """{%- if messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
{%- if ns.multi_step_tool and message.role == "user" and message.content is string and not
(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}{%- if (message.role == "user") %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- elif message.role == "assistant" %}{%- set content = message.content.split('</think>')[-1] %}
{{- '<|im_start|>' + message.role + '\n' + content.lstrip('\n') + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("chat", [LLAMA_3, QWEN, SMOLLM2], ids=["llama", "qwen", "smollm2"])
def test_real_chat_templates_render_as_transformers_renders_them(chat, small_model, tmp_path):
    from transformers import AutoTokenizer

    from codex_nb.data.documents import Message
    from codex_nb.data.tokenizer import Tokenizer, chat_ids

    folder = shutil.copytree(small_model, tmp_path / "theirs")
    template(chat)(folder)
    talk = [Message("user", "hi"), Message("assistant", "ho"), Message("user", "2+2? " * 2000)]
    hf = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = hf.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in talk],
        add_generation_prompt=True,
        return_dict=True,
    )
    assert chat_ids(Tokenizer(folder, ""), talk)[0] == expected["input_ids"]


WORDS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
WORDS += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
STEPS = {
    "llama": {"normalizer": None},
    "llama 2": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
    },
    "qwen": {"normalizer": {"type": "NFC"}},
    "t5": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Strip", "strip_left": False, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
            ],
        }
    },
    "cpm": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"String": "\n"}, "content": "</n>"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "</_>"},
            ],
        }
    },
}


@pytest.mark.parametrize("name", STEPS)
def test_the_steps_of_real_tokenizers_are_not_refused(name, small_model, tmp_path):
    from codex_nb.data.tokenizer import Tokenizer

    folder = shutil.copytree(small_model, tmp_path / "theirs")
    if STEPS[name].get("pre_tokenizer", "") == "":
        split(WORDS)(folder)
    tokenizer(**STEPS[name])(folder)
    assert Tokenizer(folder, "").encode("The 3 quick foxes aren't here.\n\n  ok " * 500)


def test_real_architectures_are_not_refused(tmp_path):
    import torch
    from transformers import (
        AutoModelForCausalLM,
        GPT2Config,
        GPTJConfig,
        GPTNeoXConfig,
        LlamaConfig,
        MixtralConfig,
        Qwen2Config,
        Qwen3Config,
    )

    from codex_nb.model.causal_lm import hide_progress_bars, open_model

    wide = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    deep = wide | dict(num_hidden_layers=3, max_position_embeddings=131072)
    configs = [
        LlamaConfig(**deep, num_key_value_heads=2, tie_word_embeddings=True),
        Qwen2Config(**deep, num_key_value_heads=2, tie_word_embeddings=True),
        Qwen3Config(**deep, num_key_value_heads=2, head_dim=16),
        MixtralConfig(**deep, num_key_value_heads=2, num_local_experts=4),
        GPTNeoXConfig(**(deep | dict(max_position_embeddings=2048))),
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=1024),
        GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=2, rotary_dim=8),
    ]
    for config in configs:
        folder = tmp_path / config.model_type
        with hide_progress_bars():
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        open_model(folder)


# --- what is packed and copied


def test_a_bundle_does_not_pack_what_links_lead_to(small_model, tmp_path):
    from codex_nb.core.artifacts import ArtifactError
    from codex_nb.deploy.bundle import make_bundle

    secret = tmp_path / "secret"
    secret.write_text("mine")
    (tmp_path / "private").mkdir()

    def refused(expected, **what):
        with pytest.raises(ArtifactError, match=expected):
            make_bundle(tmp_path / "bundle", fetch=lambda *_: pytest.fail("packed"), **what)
        assert not (tmp_path / "bundle").exists()

    for name in ("README.md", "config.json"):
        theirs = shutil.copytree(small_model, tmp_path / f"theirs-{name}")
        (theirs / name).unlink(missing_ok=True)
        (theirs / name).symlink_to(secret)
        if name == "config.json":
            secret.write_text((small_model / name).read_text())
        refused(f"{name}: a link to .*secret, outside of", models=[theirs])
    data = tmp_path / "data"
    data.mkdir()
    (data / "more").symlink_to(tmp_path / "private")
    refused("more: a link to a folder", data=[data])
    (data / "more").unlink()
    os.mkfifo(data / "pipe")
    refused("pipe: no plain file", data=[data])
    refused("pipe: no plain file", data=[data / "pipe"])


POLICY = "schema: 1\nrules:\n- kind: mine\n  action: drop\n  "
POLICIES = {
    "exponential": ("pattern: '(a+)+$'\n  matches: [aaaa]\n  passes: [b]", "repetitions inside"),
    "its own example": (
        f"pattern: '(x+)+y'\n  matches: [xxy]\n  passes: [{'x' * 60}]",
        "repetitions inside",
    ),
    "cubic": ("pattern: 'a*a*a*a*b'\n  matches: [ab]\n  passes: [c]", "repetitions inside"),
    "ambiguous": ("pattern: '[[a]b'\n  matches: ['[b']\n  passes: [c]", "Possible nested set"),
    "given twice": ("action: allow", "'action' is given twice"),
    "an alias": ("matches: &a [x]\n  passes: *a", "an alias"),
    "nowhere": ("where: []\n  pattern: a\n  matches: [a]\n  passes: [b]", "where"),
    "too many": ("pattern: a\n" + "#" * (1 << 18), "more than 262,144 bytes"),
}


@pytest.mark.parametrize("fault", POLICIES)
def test_a_policy_that_never_ends_or_says_something_else_is_refused(fault, tmp_path, monkeypatch):
    from codex_nb.core.config import ConfigError
    from codex_nb.core.policy import load_policy

    monkeypatch.setattr("codex_nb.core.policy._SECONDS", counts(1, 5))
    text, words = POLICIES[fault]
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY + text)
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        load_policy(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("schema", ["true", "1.0", "'1'"])
def test_a_schema_is_a_number(schema, tmp_path):
    from codex_nb.core.config import ConfigError
    from codex_nb.core.policy import load_policy

    path = tmp_path / "policy.yaml"
    path.write_text(f"schema: {schema}\nrules:\n- {{kind: email, action: drop}}\n")
    with pytest.raises(ConfigError, match="write `schema: 1`"):
        load_policy(path)


def test_a_pipe_is_neither_read_nor_replaced(tmp_path):
    "To open one waits for ever."
    from codex_nb.core.artifacts import write_file
    from codex_nb.core.policy import load_policy
    from codex_nb.data.readers import read_path
    from codex_nb.deploy.audit import read_evidence
    from codex_nb.experiments.segments import read_report
    from codex_nb.run.run_record import require_plain

    for suffix in ("parquet", "jsonl", "csv", "json", "txt", "zst"):
        pipe = tmp_path / f"pipe.{suffix}"
        os.mkfifo(pipe)
        for read in (load_policy, read_report, read_evidence, lambda p: list(read_path(p))):
            with pytest.raises(Exception, match="regular file|plain file"):
                read(pipe)
        with pytest.raises(Exception, match="is no plain file"):
            write_file(pipe, "text")
        assert pipe.is_fifo()
    with pytest.raises(Exception, match="pipe.csv: no plain file; codex-nb verify"):
        require_plain(tmp_path)
