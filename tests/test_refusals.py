"""What would stop a run is said before it, in the same words, by `data check` and `preflight`."""

import gzip
import importlib
import io
import json
import os
import threading
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import pytest
from helpers import codex, flags

import codex_nb.data.readers as readers
import codex_nb.data.tokenizer as tokenizers
from codex_nb.cli.main import main
from codex_nb.core.artifacts import ArtifactError
from codex_nb.data.corpus import CorpusConfig, open_corpus, split_of
from codex_nb.data.documents import Document, Message
from codex_nb.data.tokenizer_training import TokenizerConfig, train_tokenizer
from codex_nb.experiments.launch import check_parameters
from codex_nb.run.judging import train_and_judge
from codex_nb.run.settings import RunConfig

SMALL = dict(
    width=32,
    layers=1,
    seq_len=32,
    batch_size=4,
    vocab_size=300,
    steps=2,
    eval_documents=2,
    max_documents=2,
    max_new_tokens=2,
    resamples=100,
    monitor=False,
    device="cpu",
)


def command(*words):
    "Exit code and output of a command in this process."
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([*map(str, words)])
        except SystemExit as e:
            code = e.code or 0
    return code, out.getvalue() + err.getvalue()


def refusal_of_training(given):
    "What stops `train.ipynb`, which calls the same functions in the same order; None if nothing."
    with redirect_stdout(io.StringIO()):
        try:
            train_and_judge(check_parameters(RunConfig, given).resolve_auto())
        except (ValueError, ArtifactError) as e:
            return str(e)
    return None


# --- inputs


def lines(*records):
    return "".join(f"{json.dumps(r)}\n" for r in records)


TEXTS = [{"text": f"letter number {n} to a friend"} for n in range(120)]
TALK = [
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "well, thank you"},
]
SYSTEM = [{"role": "system", "content": "be kind"}, *TALK]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def talks(n, of=lambda n: TALK, **more):
    return [
        {"messages": [{**m, "content": f"{m['content']} {i}"} for m in of(i)]} for i in range(n)
    ]


def held_out(record):
    "Whether a conversation is a validation document."
    doc = Document(messages=tuple(Message(**m) for m in record["messages"]))
    return split_of(doc, CorpusConfig(data="x")) == "validation"


def only_in_validation():
    "Conversations of which those with a system message are validation documents."
    plain = [r for r in talks(150) if not held_out(r)]
    return plain + [r for r in talks(150, lambda n: SYSTEM) if held_out(r)]


FILES = {  # name -> content, what is said
    "syntax.jsonl": (lines(*TEXTS) + "{bad}\n", "syntax.jsonl:121: expected a name"),
    "field.jsonl": (lines({"txt": "a"}), "did you mean text?"),
    "both.jsonl": (lines({"text": "a", "prompt": "b"}), "has `text` and `prompt`"),
    "no answer.jsonl": (lines({"messages": TALK[:1]}), "nothing could be learned from it"),
    "turns.jsonl": (lines({"messages": TALK[::-1]}), "message 1: assistant cannot come first"),
    "tool.jsonl": (
        lines({"messages": [{"role": "tool", "content": "a"}]}),
        "message 1: tool cannot come first",
    ),
    "surrogate.jsonl": ('{"text": "\\ud800"}\n', "surrogate"),
    "empty.jsonl": ("", "the file is empty"),
    "blank.jsonl": (lines({"text": "a"}) + "\n" + lines({"text": "b"}), "an empty line"),
    "long.jsonl": (lines({"text": "a" * 5000}), "the line is longer than 4,096 bytes"),
    "latin.txt": (b"caf\xe9", "byte 0xe9 is not UTF-8"),
    "wide.txt": ("text".encode("utf-16"), "this is UTF-16"),
    "binary.txt": (b"abc\0def", "this is a binary file"),
    "cut.txt.gz": (gzip.compress(b"a" * 10_000)[:-4], "the compressed data is damaged"),
    "cut.parquet": (b"PAR1", "not a complete Parquet file"),
    "names.csv": ("a,b\n1,2\n", "the columns 'a', 'b' are of no known format"),
    "cells.csv": ("text\na\nb,c\n", "2 cells in a row of 1 columns"),
    "few.jsonl": (lines(*TEXTS[:3]), "7 tokens cannot fill a row of 32"),
    "copies.jsonl": (lines(*TEXTS[:1] * 200), "split is empty (1 documents"),
    "one.txt": ("a", "too little text: the validation split is empty"),
}
STOP = "schema: 1\nrules:\n  - {kind: email, action: stop}\n"
IDLE = "schema: 1\nrules:\n  - {kind: a, action: drop, pattern: b, matches: [c], passes: [d]}\n"
MAIL = {"text": "write to ada@example.org"}
SETTINGS = {  # what is wrong -> settings, with paths below the folder; what is said; about data?
    "no file": (dict(data="none.jsonl"), "there is no such file or folder", True),
    "no text": (dict(data="pictures"), "no text in this folder (skipped: .png: 1)", True),
    "nothing included": (dict(include=["*.md"]), "no text in this folder", True),
    "half saved": (dict(data="saved"), "not a complete folder saved by datasets", True),
    "a policy that stops": (
        dict(data="mail.jsonl", policy="stop.yaml"),
        "the policy says stop",
        True,
    ),
    "a policy that is not there": (dict(policy="none.yaml"), "No such file or directory", True),
    "a policy that finds nothing": (dict(policy="idle.yaml"), "finds nothing in its own", True),
    "an unknown setting": (dict(learning_rate=1), "here it is called lr", True),
    "a setting out of range": (dict(test_fraction=0.7), "must be float, >= 0, < 0.5", True),
    "a setting without effect": (dict(near_threshold=0.9), "it belongs to dedup=near", True),
    "no validation": (dict(validation_fraction=0.0), "leaves no documents to evaluate on", True),
    "near copies": (dict(data="alike.jsonl", dedup="near"), "split is empty (1 documents", True),
    "by position": (
        dict(data="few.jsonl", split_by="position", test_fraction=0.0),
        "21 tokens cannot fill",
        True,
    ),
    "no test": (dict(split="test", test_fraction=0.0), "the test split of the corpus has no", True),
    "an unknown slice": (dict(slices=["author"]), "slices: no document has 'author'", True),
    "rows too long": (dict(seq_len=10_000), "tokens cannot fill a row of 10000", True),
    "a vocabulary too large": (
        dict(tokenizer="sp-unigram", vocab_size=5000),
        "vocab_size: 5000 does not suit this text",
        True,
    ),
    "no tokenizer": (dict(tokenizer_path="none"), "tokenizer", True),
    "a role refused": (
        dict(data="system.jsonl", tokenizer_path="kind", vocab_size=None),
        "there is no system role",
        True,
    ),
    "a role refused in validation": (
        dict(data="late.jsonl", tokenizer_path="kind", vocab_size=None),
        "there is no system role",
        True,
    ),
    "heads": (dict(width=30, heads=4), "width 30 cannot be divided among 4 heads", False),
    "processes": (dict(nproc=3), "4 rows cannot be divided equally among 3 processes", False),
    "an empty stop": (dict(stop_strings=[""]), "an empty one would end every text", False),
    "no base": (dict(base="nowhere", width=None, layers=None, vocab_size=None), "nowhere", False),
    "an adapter without a base": (dict(adapter="lora"), "an adapter needs a base", False),
    "strides": (dict(stride=33), "stride: 33 is more than the model's context 32", False),
    "graphs": (dict(graphs="on"), "CUDA graphs are for GPUs", False),
    "a secret": (dict(data="https://a:" + "secret-word@b"), "looks like a secret", False),
}
PATHS = ("data", "policy", "tokenizer_path")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "All inputs, in a workspace of its own."
    folder = tmp_path_factory.mktemp("inputs")
    for name, (content, _) in FILES.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    alike = [{"text": " ".join(f"word{i}" for i in range(100)) + f" {n}"} for n in range(100)]
    for name, records in {
        "good": TEXTS,
        "mail": [*TEXTS, MAIL],
        "alike": alike,
        "system": talks(150, lambda n: SYSTEM if n % 2 else TALK),
        "late": only_in_validation(),
    }.items():
        (folder / f"{name}.jsonl").write_text(lines(*records))
    (folder / "stop.yaml").write_text(STOP)
    (folder / "idle.yaml").write_text(IDLE)
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"\x89PNG")
    (folder / "saved").mkdir()
    (folder / "saved" / "dataset_dict.json").write_text("{")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("a text of many lines\n" * 300)
    with patch.dict(os.environ, {"CODEX_NB_HOME": str(folder / "home")}):
        corpus = open_corpus(CorpusConfig(data=str(folder / "good.jsonl")))
        made = train_tokenizer(corpus, TokenizerConfig(vocab_size=300)).path
    kind = folder / "kind"
    kind.mkdir()
    (kind / "tokenizer.json").write_bytes((made / "tokenizer.json").read_bytes())
    config = json.loads((made / "tokenizer_config.json").read_text())
    (kind / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


class SameProcess:
    "For `LimitedProcess`, which takes seconds to start: what it limits is tested elsewhere."

    lock = threading.Lock()

    def __init__(self, name):
        module, _, attribute = name.partition(":")
        self.call = getattr(importlib.import_module(module), attribute)

    def __call__(self, *args, **more):
        from transformers.utils import chat_template_utils

        with self.lock:  # a template that has refused leaves its environment unusable
            chat_template_utils._compile_jinja_template.cache_clear()
            return self.call(*args, **more)


def refused_alike(folder, given, expected, about_data, monkeypatch):
    "Whether all of them say what training says."
    monkeypatch.setenv("CODEX_NB_HOME", str(folder / "home"))
    monkeypatch.setattr(tokenizers, "LimitedProcess", SameProcess)
    monkeypatch.chdir(folder)
    given = {k: v for k, v in (SMALL | given).items() if v is not None}
    refusal = refusal_of_training(given)
    if expected is None:
        assert refusal is None
    else:
        assert refusal and expected in refusal, refusal
    code, said = command("preflight", *flags(given))
    assert (code != 0) == (expected is not None) and (refusal or "") in said, said
    if not about_data:
        return
    path = given.pop("data")
    code, said = command("data", "check", path, "--no-near", *flags(given))
    assert (code != 0) == (expected is not None) and (refusal or "") in said, (refusal, said)
    stored = {p for p in (folder / "home").rglob(".tmp-*") if p.is_dir()}
    assert not stored, stored


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_alike_by_check_preflight_and_training(name, folder, monkeypatch):
    if name == "long.jsonl":
        monkeypatch.setattr(readers, "MAX_LINE", 4096)
    refused_alike(folder, {"data": name}, FILES[name][1], True, monkeypatch)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_bad_setting_is_refused_alike_by_check_preflight_and_training(name, folder, monkeypatch):
    given, expected, about_data = SETTINGS[name]
    data = "text" if "include" in given else "good.jsonl"
    refused_alike(folder, {"data": data} | given, expected, about_data, monkeypatch)


def test_good_data_pass_all_and_the_check_leaves_nothing(folder, tmp_path, monkeypatch):
    refused_alike(folder, {"data": "good.jsonl"}, None, True, monkeypatch)
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    code, said = command("data", "check", "good.jsonl", "--json", *flags(SMALL))
    report = json.loads(said)
    assert code == 0 and report["problem"] is None and not list(tmp_path.iterdir())
    corpus = open_corpus(CorpusConfig(data="good.jsonl"))
    assert report["splits"] == corpus.counts


def test_the_commands_say_it_too(folder, tmp_path):
    given = flags(SMALL | {"data": str(folder / "copies.jsonl")})
    training = codex("run", "train", *given, home=tmp_path)
    check = codex("data", "check", folder / "copies.jsonl", home=tmp_path)
    said = "copies.jsonl: too little text: the "
    assert training.returncode == check.returncode == 1
    assert said in training.stderr and said in check.stdout, training.stderr + check.stdout
    chats = flags(SMALL | {"data": "chat", "vocab_size": 512})
    done = codex("run", "train", *chats, home=tmp_path)
    assert done.returncode == 0, done.stderr
