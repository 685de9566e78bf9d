"""Properties of readers, splits, tokenizers and the sample order."""

import json
import os
import shutil

import numpy as np
import pytest
from helpers import LIB, PROVE, counts, program
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import codex_nb.data.readers as readers
from codex_nb.core.safety import RULES, find_secrets
from codex_nb.data.batches import permute, sample_order
from codex_nb.data.corpus import CorpusConfig, open_corpus, split_by_position, split_of
from codex_nb.data.documents import Document
from codex_nb.data.readers import read_path
from codex_nb.data.tokenizer_training import TokenizerConfig, train_tokenizer

many = settings(
    max_examples=counts(150, 2000),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
texts = st.text(st.characters(codec="utf-8"))
hard = st.one_of(
    texts,
    st.lists(
        st.sampled_from(
            [
                "▁",
                "\uf8ff",
                "\uf8ff0",
                "<0x0A>",
                "<unk>",
                "<|endoftext|>",
                " ",
                "\n",
                "\r",
                "\x00",
                "e\u0301",
                "👩‍👧",
                "ש",
                "<",
                "a",
            ]
        )
    ).map("".join),
)


@pytest.fixture(
    scope="module", params=["bpe", "bpe-gpt2", "sp-unigram", "sp-bpe", "bytes", "chars"]
)
def tokenizer(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CODEX_NB_HOME", str(tmp_path_factory.mktemp("home")))
        cfg = TokenizerConfig(tokenizer=request.param, vocab_size=400)
        yield train_tokenizer(open_corpus(CorpusConfig(data="sample")), cfg)


@many
@given(hard)
def test_tokenizers_give_every_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert (
        tokenizer.decode(ids) == text
        and ids == tokenizer.fast.encode(text, add_special_tokens=False).ids
    )


def test_megabyte_of_one_character_is_encoded(tokenizer):
    text = counts(1 << 18, 1 << 20)  # characters
    for c in " ax☂":
        assert tokenizer.decode(tokenizer.encode(c * text)) == c * text


@pytest.mark.parametrize("kind", ["bpe", "sp-unigram", "sp-bpe", "chars"])
def test_tokenizer_is_the_same_in_another_process(kind, tmp_path):
    digests = {
        program(
            "train_a_tokenizer.py",
            kind,
            home=tmp_path / str(i),
            RAYON_NUM_THREADS=str(i),
            PYTHONHASHSEED=str(i),
            fresh=PROVE or i < 3,  # the third is forked: another beginning, too
        ).stdout
        for i in (1, 2, 3)
    }
    assert len(digests) == 1 and digests != {""}


@many
@given(st.integers(1, 10**12), st.integers(0, 2**62), st.data())
def test_permutation_stays_inside_and_repeats_nothing(n, key, data):
    index = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=40))), np.int64)
    out = permute(index, n, key)
    assert len(set(out.tolist())) == len(index) and ((out >= 0) & (out < n)).all()


@many
@given(st.integers(1, 500), st.integers(0, 2**62))
def test_permutation_is_a_bijection(n, key):
    assert sorted(permute(np.arange(n), n, key)) == list(range(n))


@many
@given(st.integers(1, 60), st.integers(0, 5), st.integers(0, 200), st.integers(1, 50))
def test_order_is_a_function_of_the_position(n, seed, start, length):
    whole = sample_order(np.arange(start + length), n, seed)
    assert (whole[start:] == sample_order(np.arange(start, start + length), n, seed)).all()


@many
@given(st.lists(st.text(min_size=1), min_size=1, unique=True), st.text())
def test_split_does_not_depend_on_company(docs, salt):
    cfg = CorpusConfig(data="x", salt=salt, validation_fraction=0.3, test_fraction=0.3)
    docs = [Document(str(i), d) for i, d in enumerate(docs) if d.isprintable()]
    assert [split_of(d, cfg) for d in docs] == [
        split_of(Document("other", d.text), cfg) for d in docs
    ]


@many
@given(
    st.text(min_size=1, max_size=3000), st.sampled_from([0.1, 0.25]), st.sampled_from([0.0, 0.1])
)
def test_position_split_joins_to_the_whole(text, v, t):
    cfg = CorpusConfig(data="x", validation_fraction=v, test_fraction=t)
    whole = [*split_by_position([Document("x", text)], len(text), cfg)]
    assert "".join(p.text for _, p in whole) == text
    pieces = [
        *split_by_position(
            [
                Document(f"x#{i}", text[i : i + n])
                for n in [max(1, len(text) // 3)]
                for i in range(0, len(text), n)
            ],
            len(text),
            cfg,
        )
    ]
    assert "".join(p.text for _, p in pieces) == text and [s for s, _ in pieces] == sorted(
        (s for s, _ in pieces), key=["train", "validation", "test"].index
    )


@many
@given(st.text(st.sampled_from("a\né☂👩"), min_size=1, max_size=200), st.integers(8, 40))
def test_pieces_of_a_long_text_file_join_to_it(tmp_path_factory, text, limit):
    path = tmp_path_factory.getbasetemp() / "long.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as m:
        m.setattr(readers, "MAX_LINE", limit)
        pieces = list(readers.read_text(path))
    assert "".join(d.text for d in pieces) == text
    assert all(0 < len(d.text.encode()) <= limit for d in pieces)
    if len(pieces) > 1:
        assert [(d.id, d.group) for d in pieces] == [
            (f"long.txt#{n}", "long.txt") for n in range(1, len(pieces) + 1)
        ]


def test_reading_holds_no_more_than_a_few_lines(tmp_path):
    with open(tmp_path / "big.jsonl", "w") as f:
        for i in range(60_000):
            f.write(json.dumps({"text": f"{i} " + "word " * 200}) + "\n")  # 60 MB
    done = program("memory_of_reading.py", tmp_path / "big.jsonl", home=tmp_path, fresh=True)
    n, grown = map(int, done.stdout.split())
    assert n == 60_000 and grown < 20  # MiB


def test_links_and_loops_are_not_followed(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    assert [d.id for d in read_path(tmp_path)] == ["a.txt"]


def test_store_key_follows_content_not_dates(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"document number {i} " * 5)
    cfg = CorpusConfig(data=str(folder), validation_fraction=0.2, test_fraction=0.2)
    first = open_corpus(cfg)
    for p in folder.iterdir():
        os.utime(p, (1, 1))
    assert open_corpus(cfg).digest == first.digest
    (folder / "07.txt").write_text("another text")
    assert open_corpus(cfg).digest != first.digest


def test_changed_code_makes_a_new_store(tmp_path):
    package = shutil.copytree(LIB, tmp_path / "other" / "codex_nb")

    def made():
        where = dict(home=tmp_path / "home", cwd=package.parent, PYTHONPATH=str(package.parent))
        return program("build_tokens.py", **where).stdout.split()

    first = made()
    assert first[2].startswith(str(package))
    tokens = package / "data" / "tokens.py"
    os.utime(tokens, (1, 1))
    assert made() == first
    tokens.write_text(tokens.read_text() + "# one line more\n")
    again = made()
    assert again[0] != first[0] and again[1] == first[1]  # made anew, and its content is the same


def test_another_version_of_a_package_makes_a_new_artifact(tmp_path, monkeypatch):
    import codex_nb.core.store as store

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    made = []

    def ask():
        store.cached(
            "thing",
            {},
            {},
            ("data.tokens",),
            lambda d: (made.append(1), (d.path / "x").write_text("x")),
            ("numpy",),
        )

    ask()
    ask()
    assert len(made) == 1
    monkeypatch.setattr(store, "version", lambda package: "0.0")
    ask()
    assert len(made) == 2


@pytest.mark.parametrize("rule", RULES, ids=[r.kind for r in RULES])
def test_no_secret_is_without_its_hint(rule):
    @settings(
        max_examples=counts(60, 1000),
        deadline=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(
        st.from_regex(
            rule.pattern,
            alphabet=st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Z"]),
        )
    )
    def each(text):
        assume(rule.check is None or rule.check(rule.pattern.search(text)[rule.group]))
        assert any(
            f.start <= m.start(rule.group) and m.end(rule.group) <= f.end
            for f in find_secrets(text, {})
            for m in [rule.pattern.search(text)]
        )

    each()
