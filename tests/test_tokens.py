"""Tokenizers of every kind, isolated documents, the entropy limit, upkeep of the store, memory."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import PROVE, counts, program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codex_nb.core.artifacts import MANIFEST
from codex_nb.core.config import ConfigError
from codex_nb.core.store import remove_unused, store_folder, stored_artifacts
from codex_nb.core.types import IGNORE
from codex_nb.data.batches import BatchSampler, order_digest, to_batch
from codex_nb.data.builtin_datasets import MarkovSource
from codex_nb.data.corpus import CorpusConfig, build_corpus, open_corpus, split_of
from codex_nb.data.documents import Document
from codex_nb.data.tokenizer_training import TokenizerConfig, train_tokenizer
from codex_nb.data.tokens import PackedDataset, best_fit, build_tokens
from codex_nb.eval.statistics import bootstrap_ratio
from codex_nb.model.causal_lm import ModelConfig, build_model, logits_of

KINDS = ["bpe", "bpe-gpt2", "sp-unigram", "sp-bpe", "bytes", "chars"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CODEX_NB_HOME", str(tmp_path_factory.mktemp("home")))
        yield open_corpus(CorpusConfig(data="sample"))


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != MANIFEST}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [100_000, 1 << 26])
def test_streamed_training_makes_the_same_tokenizer_and_a_dry_run_makes_none(sample, kind, limit):
    cfg = TokenizerConfig(tokenizer=kind, vocab_size=390, max_train_bytes=limit)
    before = {a["digest"] for a in stored_artifacts()}
    plans = [train_tokenizer(sample, cfg, streaming=s, dry_run=True) for s in (True, False)]
    assert {a["digest"] for a in stored_artifacts()} == before and plans[0]["train_bytes"] == plans[
        1
    ]["train_bytes"] <= limit
    streamed = train_tokenizer(sample, cfg, streaming=True)
    held = files(streamed.path)
    shutil.rmtree(streamed.path)
    eager = train_tokenizer(sample, cfg, streaming=False)
    assert files(eager.path) == held and eager.digest == streamed.digest
    with pytest.raises(ConfigError):
        train_tokenizer(
            sample, TokenizerConfig(tokenizer="sp-bpe", vocab_size=90_000), dry_run=False
        )


@pytest.mark.parametrize("kind", KINDS)
def test_fast_and_plain_encoding_agree_on_every_character(sample, kind):
    tok = train_tokenizer(sample, TokenizerConfig(tokenizer=kind, vocab_size=390))
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    if not PROVE:
        points = random.Random(kind).sample(points, 6000) + list(range(0x500))
    for i in range(0, len(points), 2000):
        some = [f"a{chr(c)}b {chr(c)}{chr(c)} 1{chr(c)}" for c in points[i : i + 2000]]
        slow = [e.ids for e in tok.fast.encode_batch_fast(some, add_special_tokens=False)]
        assert [a.tolist() for a in tok.arrays(some)] == slow
        assert [tok.decode(ids) for ids in slow] == some


@pytest.mark.parametrize(
    "module",
    ["core.types", "data.tokens", "data.tokenizer_training", "eval.eval_config", "eval.statistics"],
)
def test_settings_are_imported_without_the_heavy_libraries(module):
    heavy = ["torch", "transformers", "pandas", "matplotlib"]
    code = f"import sys, codex_nb.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def words(rng, n):
    return " ".join(
        rng.choice("ada mends the old clock by a harbour in rain".split()) for _ in range(n)
    )


@pytest.fixture(scope="module")
def tales(sample):
    rng = random.Random(1)
    return build_corpus(
        [Document(str(i), words(rng, rng.randint(1, 40)) + str(i)) for i in range(300)],
        CorpusConfig(data="tales"),
    )


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("packing", ["stream", "best-fit"])
def test_documents_do_not_see_each_other(tales, arch, packing):
    tok = train_tokenizer(tales, TokenizerConfig(vocab_size=300))
    store = build_tokens(tales, tok)
    model = build_model(
        ModelConfig(arch=arch, width=32, layers=2, heads=2, seq_len=64, device="cpu"),
        tok.vocab_size,
        tok.eot,
        0,
        "cpu",
    ).eval()
    for keep in (True, False):
        seen = 0
        rows = PackedDataset(store, 64, packing, isolate_documents=keep)
        for r in range(len(rows)):
            b, of = to_batch(rows, np.array([r])), torch.from_numpy(rows.documents(np.array([r])))
            docs = [d for d in of.unique().tolist() if d >= 0]
            if len(docs) < 2:
                continue
            for one, other in zip(docs, docs[1:]):
                ids = b.ids_BT.clone()
                ids[of == one] = (ids[of == one] + 7) % tok.vocab_size
                changed = b._replace(ids_BT=ids)
                with torch.no_grad():
                    x, y = (logits_of(model, v)[0][of[0] == other] for v in (b, changed))
                assert torch.equal(x, y) == keep
                seen += 1
            if seen > (400 if PROVE else 30):
                break
        assert seen > 20


@settings(max_examples=2000 if PROVE else 100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 80))
def test_best_fit_fills_no_row_too_full(sizes, room):
    row = best_fit(np.array(sizes), room)
    filled = np.bincount(row, sizes)
    assert (
        filled.max() <= room
        and (filled > 0).all()
        and len(filled) <= 1.7 * math.ceil(sum(sizes) / room) + 1
    )


@settings(
    max_examples=500 if PROVE else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(1, 90), st.sampled_from(["stream", "best-fit", "pad"]), st.booleans())
def test_every_prediction_is_made_once(tales, seq_len, packing, keep):
    tok = train_tokenizer(tales, TokenizerConfig(vocab_size=300))
    store = build_tokens(tales, tok)
    rows = PackedDataset(store, seq_len, packing, keep)
    (ids, targets, _), documents = (
        rows.gather(np.arange(len(rows))),
        rows.documents(np.arange(len(rows))),
    )
    want = np.sort(np.asarray(store.ids[1 : len(store.ids) - rows.tail], np.int64))
    assert (np.sort(targets[targets != IGNORE]) == want).all()
    assert ((targets != IGNORE) == (documents >= 0)).all() and ids.shape == targets.shape == (
        len(rows),
        seq_len,
    )
    if packing == "best-fit":
        for d, n in enumerate(np.diff(store.offsets)):
            if n <= seq_len:
                assert len(set(np.argwhere(documents == d)[:, 0])) == 1
    assert rows.report()["supervised"] == (targets != IGNORE).sum()


def test_nothing_to_learn_from_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    corpus = build_corpus(
        [Document(str(i), prompt=f"question {i}", completion="x") for i in range(60)],
        CorpusConfig(data="asked"),
    )
    store = build_tokens(corpus, train_tokenizer(corpus, TokenizerConfig(tokenizer="bytes")))
    assert (
        PackedDataset(store, 8).report()["tokens_left_out"] > 0
        and (PackedDataset(store, 4).gather(np.arange(len(PackedDataset(store, 4))))[1] != IGNORE)
        .any(1)
        .all()
    )
    store.supervised = 0  # as a mask that is all zero would have it
    for packing in ("stream", "best-fit", "pad"):
        with pytest.raises(ConfigError, match="no token of this corpus is a training target"):
            PackedDataset(store, 8, packing)


@settings(max_examples=1000 if PROVE else 50, deadline=None)
@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=8), st.integers(0, 6)), min_size=1),
    st.text(max_size=5),
)
def test_group_stays_in_one_split(docs, salt):
    cfg = CorpusConfig(data="x", salt=salt, validation_fraction=0.3, test_fraction=0.3)
    side = {}
    for text, g in docs:
        assert side.setdefault(g, split_of(Document("d", text, group=str(g)), cfg)) == split_of(
            Document("e", text + "!", group=str(g)), cfg
        )


def test_order_of_samples_does_not_depend_on_the_number_of_processes(tales):
    rows = PackedDataset(
        build_tokens(tales, train_tokenizer(tales, TokenizerConfig(vocab_size=300))), 16
    )

    def order(world, micro):
        return [
            sorted(
                i
                for r in range(world)
                for b in BatchSampler(rows, 8, 3, micro, r, world).step(p)
                for i in b.sample_ids_B.tolist()
            )
            for p in range(0, 400, 8)
        ]

    assert len({str(order(w, m)) for w in (1, 2, 4, 8) for m in (None, 1, 2, 3)}) == 1
    assert order_digest(len(rows), 3, 400) != order_digest(len(rows), 4, 400)


def below(records, bits):  # bits per symbol above the source, with its interval
    top = np.array([r.nll / math.log(2) for r in records]) - np.array(bits)
    return bootstrap_ratio(top, np.array([float(r.bytes) for r in records]))


def test_trained_model_reaches_but_does_not_beat_the_entropy_of_its_source(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    from codex_nb.eval.scoring import score
    from codex_nb.run.recipe import train_model
    from codex_nb.run.settings import RunConfig
    from codex_nb.run.training_inputs import start_run

    cfg = RunConfig.from_preset(
        "smoke",
        data="markov",
        tokenizer="bytes",
        steps=600 if PROVE else 150,
        eval_every=1000,
        save_every=1000,
    )
    corpus = open_corpus(cfg.corpus)
    tok = train_tokenizer(corpus, cfg.tokenizer)
    rows = PackedDataset(build_tokens(corpus, tok), cfg.model.seq_len)
    model = build_model(cfg.model, tok.vocab_size, tok.eot, cfg.seed, "cpu")
    train_model(start_run("train", cfg), corpus, tok, rows, model)
    docs = list(corpus.split("validation"))
    source, records = MarkovSource(), score(model, tok, docs)
    above = below(records, [source.bits(d.text) for d in docs])
    assert above.high >= 0, f"the model is below the limit: {above}"
    assert above.value < (0.01 if PROVE else 0.03), f"the model has not learned the source: {above}"
    leaked = [replace(r, nll=r.nll * 0.97) for r in records]
    assert below(leaked, [source.bits(d.text) for d in docs]).high < 0, (
        "the limit would not notice three per cent"
    )


def test_store_upkeep_spares_what_an_unfinished_run_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    from codex_nb.run.run_folder import in_use
    from codex_nb.run.settings import RunConfig
    from codex_nb.run.training_inputs import start_run

    cfg = RunConfig.from_preset("smoke")
    corpora = [open_corpus(CorpusConfig(data="sample", salt=s)) for s in "abc"]
    monkeypatch.setenv("CODEX_NB_RUN", str(tmp_path / "elsewhere" / "run"))
    run = start_run("train", cfg, corpus=corpora[0])
    monkeypatch.delenv("CODEX_NB_RUN")
    done = start_run("train", cfg, corpus=corpora[1])
    done.finish()
    for p in store_folder("corpus").glob(f"*/{MANIFEST}"):
        os.utime(p, (0, 0))
    assert in_use() == {corpora[0].digest}
    assert {g["digest"] for g in remove_unused(days=1, keep=in_use())} == {
        c.digest for c in corpora[1:]
    }
    assert [a["digest"] for a in stored_artifacts()] == [corpora[0].digest]
    run.finish()
    assert in_use() == set()


def many_documents(folder, kind, megabytes):
    block = " ".join(str(random.Random(1).random()) for _ in range(50))
    rows = ({"text": f"{i} {block}"} for i in range(megabytes * 1_000_000 // (len(block) + 8)))
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        with open(path, "w") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)
    elif kind == "csv":
        with open(path, "w") as f:
            f.write("text\n")
            f.writelines(r["text"] + "\n" for r in rows)
    elif kind == "txt":
        with open(path, "w") as f:
            f.writelines(r["text"] + "\n" for r in rows)
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as w:
            while some := [r["text"] for r, _ in zip(rows, range(5000))]:
                w.write_table(pa.table({"text": some}))
    elif kind == "folder":
        path.mkdir()
        for i, r in enumerate(rows):
            (path / f"{i}.txt").write_text(r["text"] * 40) if i % 40 == 0 else None
    return path


@pytest.mark.parametrize(
    "kind,then",
    [
        ("jsonl", "tokens"),
        *counts([], [("jsonl", "check")]),
        ("csv", ""),
        ("txt", ""),
        ("parquet", ""),
        ("folder", ""),
    ],
)
def test_memory_does_not_grow_with_the_input(tmp_path, kind, then):
    size, bound = counts((60, 220), (1000, 1000))
    path = many_documents(tmp_path, kind, size)
    home = tmp_path / "home"
    done = program("memory_of_a_corpus.py", path, then, home=home, fresh=True)
    assert done.returncode == 0, done.stderr
    n, to_read, in_all = map(int, done.stdout.split())
    print(f"{kind}: {n} documents of {size} MB, {to_read} MiB to read, {in_all} MiB in all")
    assert in_all < bound
