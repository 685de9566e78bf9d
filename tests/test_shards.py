"""A corpus in shards is the same whoever builds it, and gives what one stream would have given."""

import csv
import json
import os
import random
import shutil
import signal
import time
import tracemalloc
from functools import partial

import numpy as np
import pytest
from helpers import PROVE, checkpoint_files, codex, counts, start, train_losses, write_tokenizer

from codex_nb.cli.data_build import data_build
from codex_nb.core.artifacts import Artifact, Manifest
from codex_nb.core.brief_errors import UserError
from codex_nb.core.config import ConfigError
from codex_nb.core.processes import run_tasks
from codex_nb.core.store import FileDigests, stored_artifacts
from codex_nb.data import corpus as corpus_module
from codex_nb.data import shards, tokens
from codex_nb.data.corpus import SPLITS, CorpusConfig, open_corpus
from codex_nb.data.data_report import check_data
from codex_nb.data.documents import ReadError
from codex_nb.data.readers import import_pyarrow
from codex_nb.data.shards import build_shards, name_corpus
from codex_nb.data.tokenizer_training import TokenizerConfig, import_tokenizer, train_tokenizer
from codex_nb.data.tokens import PackedDataset, TokenStore, build_tokens
from codex_nb.run.run_folder import in_use


def write_texts(folder, seed=0, files=24):
    "Files of several formats, with copies within and across them."
    rng = random.Random(seed)
    lines = [f"Text {i}: " + "word " * rng.randrange(1, 30) for i in range(400)]
    (folder / "deep").mkdir(parents=True)
    for k in range(files):
        some = [
            rng.choice(lines) + rng.choice(["", f" of {k}"]) for _ in range(rng.randrange(1, 40))
        ]
        if k % 8 == 3:
            some += ["long " * 600, "long " * 601, "long " * 600, f"{k} " * 6000]
        parent = folder / "deep" if k % 3 else folder
        if k % 4 == 0:
            rows = [{"text": t, "group": rng.choice("abcdefgh")} for t in some]
        elif k % 4 == 1:
            turns = [("user", "assistant") * rng.randrange(1, 3) for _ in some]
            rows = [
                {"messages": [{"role": r, "content": f"{t} {i}"} for i, r in enumerate(roles)]}
                for t, roles in zip(some, turns)
            ]
        elif k % 4 == 2:
            with open(parent / f"{k:02}.csv", "w", newline="") as f:
                csv.writer(f).writerows([["text"], *([t] for t in some)])
            continue
        else:
            rows = [{"text": t} for t in some]
        (parent / f"{k:02}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tail.txt").write_text("\n".join(lines))


@pytest.fixture
def texts(tmp_path, monkeypatch):
    "A folder of which several shards are made, in a new workspace."
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shards, "group_files", partial(shards.group_files, least=4000, most=6000))
    write_texts(tmp_path / "texts", files=counts(12, 40))
    return tmp_path / "texts"


CHOICES = [
    {},
    {"dedup": "off"},
    {"dedup": "near", "near_threshold": 0.6},
    {"validation_fraction": 0.3, "test_fraction": 0, "salt": "other"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_shards_give_the_documents_of_one_stream(texts, choice, in_place):
    sharded = build_shards([texts], CorpusConfig(**choice), in_place=in_place)
    single = open_corpus(CorpusConfig(data=str(texts), **choice))
    assert len(sharded.shards) > 4
    for split in SPLITS:
        assert list(sharded.split(split)) == list(single.split(split))
    assert sharded.meta == single.meta
    assert not choice.get("dedup") == "near" or sharded.meta["near_duplicates"] > 3


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    "One that shares an id between documents, and one that opens each with another id."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CODEX_NB_HOME", str(tmp_path_factory.mktemp("tokenizers")))
        own = train_tokenizer(
            open_corpus(CorpusConfig(data="sample")), TokenizerConfig(vocab_size=400)
        )
        folder = tmp_path_factory.mktemp("foreign")
        template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
        write_tokenizer(folder, ["some text"], ["<end>", "<begin>"], "<begin>", True, template)
        yield own, import_tokenizer(folder)


@pytest.mark.parametrize("which", [0, 1])
def test_the_store_of_shards_reads_as_the_store_of_one_stream(texts, tokenizers, which):
    tokenizer = tokenizers[which]
    sharded = build_tokens(build_shards([texts]), tokenizer)
    single = build_tokens(open_corpus(CorpusConfig(data=str(texts))), tokenizer)
    assert len(sharded.ids.parts) > 4
    for name in ("ids", "mask", "offsets", "ends", "sizes"):
        assert np.array_equal(getattr(sharded, name)[:], getattr(single, name)[:]), name
    for name in ("tokens", "documents", "bytes", "supervised"):
        assert getattr(sharded, name) == getattr(single, name), name
    rng = np.random.default_rng(0)
    for packing in ("stream", "best-fit", "pad"):
        for isolate in (True, False):
            some, others = (
                PackedDataset(store, 96, packing, isolate) for store in (sharded, single)
            )
            assert some.report() == others.report()
            for _ in range(20):
                index = rng.integers(0, len(some), 16)
                for a, b in zip(some.gather(index), others.gather(index)):
                    assert np.array_equal(a, b)
                assert np.array_equal(some.documents(index), others.documents(index))


def test_all_workers_build_the_same(texts, tokenizers, tmp_path):
    digests = set()
    for workers in counts((1, 2), (1, 2, 4)):
        shutil.rmtree(tmp_path / "home" / "store", ignore_errors=True)
        corpus = build_shards([texts], workers=workers)
        digests.add((corpus.digest, build_tokens(corpus, tokenizers[0], workers=workers).digest))
    assert len(digests) == 1


@pytest.mark.skipif(not PROVE, reason="starts a cluster: in make prove")
def test_a_dask_cluster_builds_the_same(texts, tokenizers, tmp_path):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    here = build_shards([texts])
    tokens = build_tokens(here, tokenizers[0])
    shutil.rmtree(tmp_path / "home" / "store")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options, silence_logs=50) as cluster:
        there = build_shards([texts], scheduler=cluster.scheduler_address)
        assert there.digest == here.digest
        encoded = build_tokens(there, tokenizers[0], scheduler=cluster.scheduler_address)
        assert encoded.digest == tokens.digest
        if PROVE:  # the client looks for its scheduler for ten seconds
            outcomes = run_tasks(time.sleep, [0, 3], scheduler=cluster.scheduler_address)
            assert next(outcomes) == (0, None, None)
            cluster.close()
            with pytest.raises(UserError, match="the connection was lost; what is finished"):
                next(outcomes)


def test_a_build_that_is_killed_goes_on_and_gives_the_same(tmp_path):
    for k in range(12):  # each a shard of its own
        lines = [json.dumps({"text": f"{i} of {k} " * 20}) for i in range(5000)]
        (tmp_path / f"{k}.jsonl").write_text("\n".join(lines))
    words = ["codex-nb", "data", "build", *sorted(tmp_path.glob("*.jsonl"))]
    words += ["-o", "killed", "--workers", "2", "--json"]
    home, rng, kills = tmp_path / "other", random.Random(1), 0
    began = time.monotonic()
    whole = codex(*words[1:], home=tmp_path / "third", fresh=True)
    assert whole.returncode == 0, whole.stderr
    seconds = time.monotonic() - began
    for _ in range(counts(1, 20)):
        process = start(*words, home=home)
        time.sleep(rng.uniform(0.3, 1) * seconds)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
    assert kills
    made = codex(*words[1:], home=home)
    assert made.returncode == 0, made.stderr
    digests = {json.loads(run.stdout.splitlines()[-1])["digest"] for run in (whole, made)}
    assert len(digests) == 1
    left = [p for p in (home / "store").rglob(".tmp-*") if p.is_dir()]
    assert not left, left


def kind_counts():
    found = {}
    for row in stored_artifacts():
        found.setdefault(row["kind"], set()).add(row["digest"])
    return found


def test_a_changed_file_costs_that_file(texts, tokenizers):
    build_tokens(build_shards([texts]), tokenizers[0])
    before = kind_counts()
    with open(texts / "deep" / "11.jsonl", "a") as f:
        f.write('\n{"text": "One more."}')
    corpus = build_shards([texts])
    build_tokens(corpus, tokenizers[0])
    after = kind_counts()
    for kind in ("corpus_shard", "token_shard"):
        assert len(after[kind] - before[kind]) == 1, kind


def test_what_is_dropped_elsewhere_changes_a_part(texts, tokenizers):
    "A text that appears in an earlier file drops its copy in a later one: that part is new too."
    build_tokens(build_shards([texts]), tokenizers[0])
    last = (texts / "tail.txt").read_text()
    (texts / "00.jsonl").write_text(json.dumps({"text": last}))
    corpus = build_shards([texts])
    assert (
        corpus.shards[-1].kept["train"]
        < build_shards([texts / "tail.txt", texts / "deep"]).counts["train"]["documents"]
    )
    assert "tail.txt" not in {doc.id for split in SPLITS for doc in corpus.split(split)}
    single = open_corpus(CorpusConfig(data=str(texts)))
    assert list(corpus) == list(single)
    tokens, other = (build_tokens(c, tokenizers[0]) for c in (corpus, single))
    assert np.array_equal(tokens.ids[:], other.ids[:])


def test_one_bad_file_is_named_and_the_others_are_kept(texts):
    (texts / "deep" / "11.jsonl").write_text('{"text": 3}')
    with pytest.raises(ReadError, match=r"(?s)1 of \d+ shards.*deep/11.jsonl") as e:
        build_shards([texts], workers=2)
    assert "on_error=quarantine" in str(e.value)
    kept = kind_counts()["corpus_shard"]
    corpus = build_shards([texts], CorpusConfig(on_error="quarantine"))
    assert corpus.meta["rejects"] == 1
    (texts / "deep" / "11.jsonl").write_text('{"text": "3"}')
    mended = build_shards([texts])
    assert len({shard.digest for shard in mended.shards} - kept) == 1


def test_a_file_read_in_place_must_not_change(texts):
    corpus = build_shards([texts], in_place=True)
    documents = list(corpus.split("train"))
    path = texts / "deep" / "11.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"long", b"lang", 1))
    with pytest.raises(ReadError, match="11.jsonl: no file is known that has its content"):
        list(corpus.split("train"))
    path.write_bytes(content)  # another time, the same content
    assert list(corpus.split("train")) == documents
    path.rename(texts.parent / "moved.jsonl")
    with pytest.raises(ReadError, match="build the corpus again"):
        list(corpus.split("train"))


def change_before_reading(path):
    "A reader of files that finds this one changed, just after it was hashed."

    def read_file(*args):
        if args[0] == path:
            path.write_text(path.read_text().replace("Text", "Next"))
        return shards_read_file(*args)

    shards_read_file = shards.read_file
    return read_file


def test_a_file_that_changes_while_it_is_read_makes_no_shard(texts, monkeypatch):
    monkeypatch.setattr(shards, "read_file", change_before_reading(texts / "tail.txt"))
    with pytest.raises(ReadError, match="tail.txt: it changed while it was read"):
        build_shards([texts])
    monkeypatch.undo()
    monkeypatch.setenv("CODEX_NB_HOME", str(texts.parent / "home"))
    assert list(build_shards([texts])) == list(open_corpus(CorpusConfig(data=str(texts))))


def test_a_file_that_is_gone_after_it_was_read_is_not_missed(texts, monkeypatch):
    lost = texts / "tail.txt"
    monkeypatch.setattr(shards, "run_tasks", lambda *_: [*run_tasks(*_), lost.unlink()][:-1])
    assert "tail.txt" in {doc.id for doc in build_shards([texts])}


def test_the_hash_of_a_file_that_was_not_looked_up_is_not_remembered(tmp_path):
    (tmp_path / "a").write_text("one")
    known = FileDigests(tmp_path / "table")
    one = known.sha256(tmp_path / "a")
    assert known.lookup(tmp_path / "a") == one
    (tmp_path / "a").write_text("other")
    known.record(tmp_path / "a", one)  # what a shard gives back that did not hash it
    assert known.lookup(tmp_path / "a") is None


def test_in_place_reads_the_same_content_in_the_same_format(texts):
    table = "text\n" + "\n".join(f"row {i}" for i in range(100))
    (texts / "a.md").write_text(table)
    (texts / "b.csv").write_text(table)
    assert list(build_shards([texts], in_place=True)) == list(build_shards([texts]))


def test_in_place_a_file_may_not_change_while_it_is_read(texts, monkeypatch):
    corpus = build_shards([texts], in_place=True)
    read_file = change_before_reading(texts / "deep" / "11.jsonl")
    monkeypatch.setattr(corpus_module, "read_file", read_file)
    with pytest.raises(ReadError, match="11.jsonl: it changed while it was read"):
        list(corpus.split("train"))


def test_pipes_and_saved_datasets_in_place_are_refused(texts):
    os.mkfifo(texts / "pipe")
    with pytest.raises(ReadError, match="pipe: not a regular file"):
        build_shards([texts / "pipe"])
    for name in ("state.json", "dataset_info.json"):
        (texts / name).write_text("{}")
    with pytest.raises(ConfigError, match="in_place: .* saved by datasets"):
        build_shards([texts], in_place=True)


@pytest.mark.parametrize("choice", [{"include": ["*.py"]}, "policy"])
def test_settings_that_a_named_corpus_would_ignore_are_refused(texts, choice):
    rules = texts.parent / "rules.yaml"
    rules.write_text("schema: 1\nrules:\n  - {kind: email, action: redact}\n")
    by_policy = CorpusConfig(policy=str(rules))
    name_corpus(build_shards([texts]), "plain")
    pairs = CorpusConfig(data="plain", record_format="pairs")  # as prefer asks for it
    with pytest.raises(ConfigError, match="was not read as pairs; .* -p record_format=pairs"):
        open_corpus(pairs)
    choice = {"policy": str(rules)} if choice == "policy" else choice
    with pytest.raises(ConfigError, match=f"{[*choice][0]}: the corpus plain is built"):
        open_corpus(CorpusConfig(data="plain", **choice))
    if "policy" in choice:
        name_corpus(made := build_shards([texts], by_policy), "redacted")
        opened = open_corpus(CorpusConfig(data="redacted", **choice))
        assert opened.digest == made.digest


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"mixture": {"a": 1.0, "b": 1.0}}, "mixture"),
        ({"split_by": "position"}, "split_by"),
        ({"policy": "x"}, "policy"),
    ],
)
def test_what_shards_cannot_do_is_refused(texts, choice, message):
    with pytest.raises(ConfigError, match=message):
        build_shards([texts], CorpusConfig(**choice), in_place=True)
    assert not stored_artifacts()


def test_too_little_text_is_refused_and_two_files_of_one_name(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    with pytest.raises(ReadError, match="would be empty"):
        build_shards([tmp_path / "a"])
    with pytest.raises(ConfigError, match="two files would be called x.txt"):
        build_shards([tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt"])


def test_ids_of_several_folders_begin_with_their_names(texts, monkeypatch):
    (texts.parent / "more").mkdir()
    (texts.parent / "more" / "x.txt").write_text("one more")
    monkeypatch.chdir(texts)
    ids = {doc.id for doc in build_shards([".", "../more"])}
    assert {"texts/tail.txt", "more/x.txt"} <= ids


def test_a_name_keeps_its_corpus_from_being_cleaned_away(texts):
    corpus = build_shards([texts])
    name_corpus(corpus, "kept")
    assert corpus.digest in in_use()
    assert open_corpus(CorpusConfig(data="kept")).digest == corpus.digest


def test_a_corpus_with_a_name_is_checked_as_a_run_takes_it(texts, tokenizers):
    made = build_shards([texts], CorpusConfig(validation_fraction=0.2), in_place=True)
    name_corpus(made, "kept")
    before = kind_counts()
    encode = partial(build_tokens, tokenizer=tokenizers[0])
    report = check_data(CorpusConfig(data="kept"), prepare=encode)
    assert (report["problem"], report["splits"]) == (None, made.counts)
    assert kind_counts() == before


def test_a_name_that_a_run_would_take_for_a_folder_is_refused(texts, monkeypatch):
    monkeypatch.chdir(texts.parent)
    with pytest.raises(ConfigError, match="data=texts would read the file or folder"):
        data_build([texts], "texts")
    assert not stored_artifacts()


def test_a_name_that_gets_another_corpus_says_so(texts, capsys):
    data_build([texts], "kept")
    (texts / "more.txt").write_text("one more")
    data_build([texts], "kept")
    assert capsys.readouterr().out.count("note: kept was") == 1


def test_rows_of_ten_billion_tokens_take_no_memory(tmp_path):
    tokens, documents = 10**10, 10**6
    with open(tmp_path / "ids.bin", "wb") as f:
        f.truncate(2 * (tokens + 1))
    (np.arange(documents + 1) * (tokens // documents)).tofile(tmp_path / "offsets.bin")
    np.ones(documents, np.int64).tofile(tmp_path / "sizes.bin")
    counted = {"tokens": tokens, "documents": documents, "bytes": tokens, "supervised": tokens}
    meta = counted | {"dtype": "uint16"}
    artifact = Artifact(tmp_path, Manifest("tokens", "0" * 64, {}, {}, {}, meta=meta))
    tracemalloc.start()
    began = time.perf_counter()
    rows = PackedDataset(TokenStore(artifact), 1024)
    seconds = time.perf_counter() - began
    ids, targets, positions = rows.gather(np.array([0, len(rows) // 2, len(rows) - 1]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == tokens // 1024 and ids.shape == targets.shape == (3, 1024)
    assert positions.max() == 1023 and peak < 2 << 20 and seconds < 0.5


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_large_file_is_built_in_parts(tmp_path, monkeypatch, kind, in_place):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shards, "PART_BYTES", 3000)
    rows = [{"text": f"Row {i % 700}\n{{'" + "x" * (i % 50)} for i in range(1000)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        lines = "\n".join(map(json.dumps, rows)) + "\n\n"
        path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    else:
        pa = import_pyarrow()
        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=60)
    corpus = build_shards([path], in_place=in_place, workers=counts(1, 2))
    assert len(corpus.shards) > 4 and len({shard.digest for shard in corpus.shards}) > 4
    single = open_corpus(CorpusConfig(data=str(path)))
    for split in SPLITS:
        assert list(corpus.split(split)) == list(single.split(split))
    assert corpus.meta == single.meta


def test_a_bad_line_of_a_part_is_named_by_its_line_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shards, "PART_BYTES", 3000)
    lines = [json.dumps({"text": f"Row {i}"}) for i in range(1000)]
    lines[876] = '{"text": 1}'
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(ReadError, match="rows.jsonl:877: "):
        build_shards([tmp_path / "rows.jsonl"])


@pytest.mark.skipif(not PROVE, reason="two runs: in make prove")
def test_a_run_from_shards_equals_one_from_a_single_store(tmp_path):
    home = tmp_path / "home"
    write_texts(tmp_path / "texts", files=60)
    built = codex("data", "build", tmp_path / "texts", "-o", "texts", "--workers", 2, home=home)
    assert built.returncode == 0, built.stderr
    weights = []
    for k, data in enumerate(("texts", tmp_path / "texts")):
        folder = tmp_path / f"run{k}"
        words = ("-p", f"data={data}", "-p", "steps=20", "--folder", folder)
        run = codex("run", "train", *words, home=home)
        assert run.returncode == 0, run.stderr
        weights.append((checkpoint_files(folder, 20)["model.safetensors"], train_losses(folder)))
    assert weights[0] == weights[1]
    replayed = codex("replay", tmp_path / "run0", home=home)
    assert replayed.returncode == 0 and "L3" in replayed.stdout, replayed.stdout + replayed.stderr


@pytest.mark.parametrize("packing", ["best-fit", "pad"])
@pytest.mark.parametrize("which", [0, 1])
def test_places_of_pieces_are_kept_on_disk(texts, tokenizers, monkeypatch, packing, which):
    store = build_tokens(open_corpus(CorpusConfig(data=str(texts))), tokenizers[which])
    rows = PackedDataset(store, 96, packing)
    monkeypatch.setattr(tokens, "LARGE", 1)
    kept = PackedDataset(store, 96, packing)
    monkeypatch.setattr(tokens, "best_fit", None)  # not computed a second time
    again = PackedDataset(store, 96, packing)
    assert {row["kind"] for row in stored_artifacts()} >= {"rows"}
    for other in (kept, again):
        assert other.report() == rows.report() and other.tail == rows.tail
        index = np.arange(len(rows))
        for a, b in zip(rows.gather(index), other.gather(index)):
            assert np.array_equal(a, b)
        assert np.array_equal(rows.documents(index), other.documents(index))
