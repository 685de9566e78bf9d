"""Time grows no faster than about linearly with the input, whatever its shape.

Each case is given inputs of size n, 2n and 4n of a shape that is nasty for it, and is measured in
seconds of the processor: 4n may take eight times as long as n, where quadratic growth takes
sixteen. `make prove` uses larger inputs.
"""

import gc
import gzip
import hashlib
import io
import json
import random
import string
import sys
import time
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from backports import zstd
from helpers import counts

import codex_nb.data.readers as readers
from codex_nb.core.plugins import get
from codex_nb.core.policy import PERSONAL, Policy, PolicyRule
from codex_nb.core.safety import (
    RULES,
    _find_in_long,
    find,
    redact,
    redact_json,
    redact_notebook,
)
from codex_nb.data.corpus import CorpusConfig, apply_policy, open_corpus, split_by_position
from codex_nb.data.data_report import check_data
from codex_nb.data.documents import Document, Message
from codex_nb.data.duplicates import ExactDuplicates, NearDuplicates, match_documents
from codex_nb.data.readers import Rejects, read_path
from codex_nb.data.tokenizer import Encoded, _inside, encode_document
from codex_nb.data.tokenizer_training import TokenizerConfig, _make
from codex_nb.data.tokens import best_fit
from codex_nb.eval.contamination import find_overlaps
from codex_nb.experiments.launch import RedactingStdout

TIMES = 8  # 4n against n; quadratic growth shows as 16
SHORTEST = 3e-4  # Seconds; below it, what is measured is not the size


def check_growth(make, run, n):
    "Run inputs of size n, 2n and 4n in turn, until the shortest times are close enough."
    n *= counts(1, 8)
    inputs = [make(k * n) for k in (1, 2, 4)]
    best = [float("inf")] * 3
    gc.disable()  # it looks at all objects of the process, whatever the input
    try:
        for attempt in range(20):
            for i, given in enumerate(inputs):
                _find_in_long.cache_clear()  # or a text is searched once, if it is not too long
                start = time.process_time()
                run(given)
                best[i] = min(best[i], time.process_time() - start)
            if attempt and best[2] <= TIMES * max(best[0], SHORTEST):
                return
    finally:
        gc.enable()
    raise AssertionError(f"n = {n}: {[f'{t * 1e3:.2f} ms' for t in best]} for n, 2n and 4n")


# --- shapes of text


def letters(n, seed=0):
    return "".join(random.Random(seed).choices(string.ascii_lowercase, k=n))


def words(n, seed=0):
    rng = random.Random(seed)
    return " ".join(letters(rng.randint(1, 9), rng.random()) for _ in range(n // 6))


def repeated(unit):
    return lambda n: (unit * (n // len(unit) + 1))[:n]


SHAPES = {
    "one word": letters,
    "words": words,
    "one character": repeated("a"),
    "digits": repeated("7"),
    "spaces": repeated(" "),
    "line ends": repeated("\n"),
    "marks": repeated("\u0301"),
    "reserved pieces": repeated("▁<unk> \uf8ff"),
}


def document(text, i=0):
    return Document(str(i), text)


# --- readers


def as_lines(records):
    return "".join(json.dumps(r) + "\n" for r in records)


def turns(n):
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": f"turn {i}"} for i in range(n)]


def nested(n):
    "Records whose `meta` is as deep as is allowed."
    return as_lines(
        {"text": "a", "meta": json.loads('{"a":' * 60 + "1" + "}" * 60)} for _ in range(n)
    )


def parquet(n):
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {i}" for i in range(n)]}), out)
    return out.getvalue()


FILES = {  # name -> content of size n, and n
    "one long text.jsonl": (lambda n: as_lines([{"text": letters(n)}]), 100_000),
    "escapes.jsonl": (lambda n: '{"text": "' + "\\u00e9" * n + '", "meta": {"a": 1}}\n', 20_000),
    "an open string.jsonl": (lambda n: '{"text": "' + "a" * n, 100_000),
    "a number of many digits.jsonl": (
        lambda n: '{"text": "a", "meta": {"a": 1%s}}' % ("7" * n),
        20_000,
    ),
    "a fraction.jsonl": (lambda n: '{"text": "a", "meta": {"a": 0.1%s}}' % ("7" * n), 20_000),
    "open brackets.jsonl": (lambda n: "[" * n, 10_000),
    "empty lines.jsonl": (lambda n: '{"text": "a"}\n' + "\n" * n + '{"text": "b"}\n', 1_000),
    "empty lines at the end.jsonl": (lambda n: '{"text": "a"}\n' + "\n" * n, 20_000),
    "many records.jsonl": (lambda n: as_lines({"text": f"text {i}"} for i in range(n)), 3_000),
    "bad lines.jsonl": (lambda n: "{bad}\n" * n, 1_000),
    "deeply nested.jsonl": (nested, 100),
    "many turns.jsonl": (lambda n: as_lines([{"messages": turns(n + n % 2)}]), 2_000),
    "a long prompt.jsonl": (
        lambda n: as_lines([{"prompt": letters(n), "completion": "a"}]),
        100_000,
    ),
    "an array.json": (lambda n: json.dumps([{"text": "a"}] * n), 5_000),
    "one cell.csv": (lambda n: "text\n" + letters(n) + "\n", 50_000),
    "a cell of many lines.csv": (lambda n: 'text\n"' + "a\n" * n + '"\n', 5_000),
    "many rows.csv": (lambda n: "text\n" + "a row\n" * n, 1_000),
    "empty rows.csv": (lambda n: "text\na\n" + "\n" * n, 5_000),
    "rows.tsv": (lambda n: "a\tb\n" * n, 20_000),
    "one line.txt": (repeated("a"), 200_000),
    "lines as long as a block.txt": (lambda n: ("a" * 4097 + "\n") * (n // 4098 + 1), 200_000),
    "rows.parquet": (parquet, 2_000),
}


@pytest.mark.parametrize("name", FILES)
def test_readers_take_linear_time(name, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE", 4096 if name.endswith(".txt") else readers.MAX_LINE)
    make, n = FILES[name]

    def write(size, pack=bytes, suffix=""):
        content = make(size)
        data = content if isinstance(content, bytes) else content.encode()
        path = tmp_path / f"{size} {name}{suffix}"
        path.write_bytes(pack(data))
        return path

    def read(path):
        for _ in read_path(path, rejects=Rejects("quarantine")):
            pass

    check_growth(write, read, n)
    if name.startswith("one l"):
        check_growth(partial(write, pack=gzip.compress, suffix=".gz"), read, n)
        check_growth(partial(write, pack=zstd.compress, suffix=".zst"), read, n)


def test_a_folder_is_read_in_linear_time(tmp_path):
    def make(n):
        folder = tmp_path / str(n)
        for i in range(n):
            path = folder / f"{i % 7}" / f"{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("a")
        return folder

    check_growth(make, lambda f: list(read_path(f, include=("*.txt",), exclude=("*.py",))), 40)


# --- rules

UNITS = """a. a.a@ aaa@a. a@b. :// a:// a://b: a://b:c@ ://b:/ eyJ- eyJaaaaaaaaaa- eyJaaaaaaaaaa.
    sk- sk-ant- hf_ ghp_ glpat- xoxb- AIza pypi- npm_ AKIA sk_live_ -----BEGIN -----END bearer
    passw_ord=' passw_ord=" key='" secret= token: awssecret= aws_secret api_key
    1- 1.1. +1 +11111111 1234- 12345678901 AA11 AA11BBBB (1) 123-45- \\' = ' " - _""".replace(
    "w_o", "wo"
).split()


@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_rules_take_linear_time(space):
    private = "-----BEGIN A " + "PRIVATE KEY-----\n"
    units = [*UNITS, private] if space else [*UNITS, "a", "1", "A", " ", "\t", "-", "."]
    for rule in RULES + PERSONAL:  # each alone, so that the others do not hide it
        hints = " ".join(rule.hints) + "\n"
        for unit in units:
            text = repeated(unit + space)

            def start(n, hints=hints, text=text):
                return hints + text(n)

            def search(text, rule=rule):
                return find(text, [rule])

            try:
                check_growth(start, search, 1000)
            except AssertionError as e:
                raise AssertionError(f"{rule.kind} in {unit + space!r}: {e}") from None


SECRET = "AKIA" + "ABCDEFGHIJKLMNOP"


def test_what_is_redacted_is_replaced_in_linear_time():
    many = repeated(f"{SECRET} \n")
    check_growth(many, redact, 40_000)
    check_growth(lambda n: [many(800)] * (n // 800), redact_json, 40_000)
    outputs = lambda n: {"cells": [{"source": [f"{SECRET}\n"] * (n // 21)}]}  # noqa: E731
    check_growth(outputs, redact_notebook, 40_000)
    with open("/dev/null", "w") as nowhere, pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "stdout", nowhere)
        check_growth(letters, RedactingStdout().write, 50_000)


def test_a_policy_takes_linear_time():
    rule = PolicyRule(kind="secrets", action="redact")
    allowed = PolicyRule(
        kind="aws-key-id", action="allow", pattern="AKIA[A-Z]{16}", matches=[SECRET], passes=["a"]
    )
    text = repeated(f"{SECRET} \n")
    for policy in (Policy([rule]), Policy([rule, allowed])):
        check_growth(text, policy.apply, 20_000)
    documents = lambda n: [document("a b c", i) for i in range(n)]  # noqa: E731
    check_growth(documents, lambda d: list(apply_policy(d, Policy([rule]), {})), 100)


# --- duplicates


def test_exact_duplicates_are_found_in_linear_time(tmp_path):
    def run(n, same):
        exact = ExactDuplicates(tmp_path / "hashes", bucket_size=64)
        for i in range(n):
            exact.add(hashlib.sha256(b"" if same else str(i).encode()).digest())
        assert len(exact.find()) == (n - 1 if same else 0)

    for same in (False, True):
        check_growth(lambda n: n, partial(run, same=same), 2_000)


CROWDS = {
    "equal": lambda i: "the same text of some words, again and again",
    "nearly equal": lambda i: words(300) + f" {i}",
    "alike, but not enough": lambda i: words(120) + " " + words(100, i),
    "all different": lambda i: words(60, i),
    "one word each": lambda i: letters(200, i),
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_near_duplicates_are_found_in_linear_time(crowd):
    def make(n):
        return [document(CROWDS[crowd](i), i) for i in range(n)]

    def run(documents):
        list(match_documents(documents, near=NearDuplicates(0.8, max_candidates=10)))

    check_growth(make, run, 25)
    check_growth(lambda n: [document(words(n))], run, 10_000)


def test_a_report_takes_linear_time(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))

    def make(n):
        (tmp_path / f"{n}.txt").write_text(f"{SECRET}\n" * n)
        return CorpusConfig(data=str(tmp_path / f"{n}.txt"))

    check_growth(make, partial(check_data, near=False), 2_000)
    check_growth(make, open_corpus, 5_000)


def test_a_text_is_split_in_linear_time():
    cfg = CorpusConfig(data="x")
    pieces = lambda n: [document("a" * 10, i) for i in range(n)]  # noqa: E731
    check_growth(pieces, lambda d: list(split_by_position(d, 10 * len(d), cfg)), 2_000)
    line = lambda n: [document("a" * n)]  # noqa: E731
    check_growth(line, lambda d: list(split_by_position(d, len(d[0].text), cfg)), 200_000)


# --- tokenizers

KINDS = ["bpe", "bpe-gpt2", "sp-unigram", "sp-bpe", "bytes", "chars"]


@cache
def trained(kind):
    folder = TemporaryDirectory()
    cfg = TokenizerConfig(tokenizer=kind, vocab_size=300)
    texts = [words(400, i) + "\n" for i in range(30)]
    return _make(iter(texts), cfg, Path(folder.name)), folder


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_take_linear_time(kind):
    tokenizer, _ = trained(kind)
    for name, shape in SHAPES.items():
        try:
            check_growth(shape, tokenizer.array, 12_000 if kind.startswith("sp") else 5_000)
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from None
    ids = tokenizer.encode(words(1000))
    check_growth(lambda n: (ids * (n // len(ids) + 1))[:n], tokenizer.decode, 4_000)


TRAINERS = {
    **{f"bpe: {shape}": ("bpe", make) for shape, make in SHAPES.items()},
    "bpe: long words": ("bpe", lambda n: "\n".join(letters(999, i) for i in range(n // 999))),
    "sp-bpe: long words": ("sp-bpe", lambda n: "\n".join(letters(999, i) for i in range(n // 999))),
    "sp-bpe: one word": ("sp-bpe", letters),
    "sp-unigram: words": ("sp-unigram", words),
    "sp-unigram: one word": ("sp-unigram", letters),
    "chars: words": ("chars", words),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_take_linear_time(name, tmp_path):
    kind, make = TRAINERS[name]
    cfg = TokenizerConfig(tokenizer=kind, vocab_size=300)
    n = 5_000 if kind.startswith("sp") else 20_000
    check_growth(make, lambda text: get("tokenizer", kind)(iter([text]), cfg, tmp_path), n)


def test_conversations_are_encoded_in_linear_time():
    tokenizer, _ = trained("bpe")

    def talk(n):
        return Document("a", messages=tuple(Message(**m) for m in turns(n + n % 2)))

    assert isinstance(encode_document(tokenizer, talk(4)), Encoded)
    check_growth(talk, partial(encode_document, tokenizer), 200)

    def places(n):
        return np.array([(i, i + 1) for i in range(n)]), [(i, i + 1) for i in range(n)]

    check_growth(places, lambda given: _inside(*given), 4_000)


def test_tokens_inside_of_spans_are_those_that_share_a_character():
    fast = trained("bpe")[0].fast
    for text in ("a ☂ b é 👩‍👩‍👧 c", words(20), "\u0301" * 20):
        offsets = np.array(fast.encode(text).offsets)
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                expected = (offsets[:, 0] < end) & (offsets[:, 1] > start)
                assert (_inside(offsets, [(start, end)]) == expected).all(), (text, start, end)


# --- rows and n-grams


def test_rows_are_packed_in_linear_time():
    for sizes in (np.ones, partial(np.full, fill_value=33), lambda n: np.arange(n) % 64 + 1):
        check_growth(lambda n: sizes(n).astype(np.int64), partial(best_fit, capacity=64), 2_000)


def test_overlaps_are_found_in_linear_time():
    for shape in SHAPES.values():
        text = lambda n: [document(shape(n))]  # noqa: B023, E731
        check_growth(text, lambda d: find_overlaps([d[0].text], d), 20_000)
    equal = lambda n: [document(words(200), i) for i in range(n)]  # noqa: E731
    check_growth(equal, lambda d: find_overlaps([d[0].text], d, portion=1000), 50)
