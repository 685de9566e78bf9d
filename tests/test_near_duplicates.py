"""Near duplicates are found on disk as they are in memory, with memory that does not grow."""

import hashlib
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from helpers import PROVE, ROOT, counts

from codex_nb.data.documents import Document
from codex_nb.data.duplicates import ExactDuplicates, NearDuplicates, match_documents
from codex_nb.data.near_duplicates import find_near_duplicates, write_sketches

NO_COPIES = np.empty((0, 2), np.int64)


def made_texts(n, seed):
    "Texts that are new, copies, changes of others and of changes of others, or boilerplate."
    rng, texts = random.Random(seed), []
    vocabulary = [f"word{i}" for i in range(500)]

    def new():
        return [rng.choice(vocabulary) for _ in range(rng.choice((3, 40, 200)))]

    def change():
        words = list(rng.choice(texts[-50:]))
        for _ in range(rng.randrange(1, 4)):
            words[rng.randrange(len(words))] = rng.choice(vocabulary)
        return words

    def boilerplate():
        day = rng.randrange(n)
        text = "On day {} the station {} reported nothing and the weather was fair all day long"
        return text.format(day, day * 7).split()

    for _ in range(n):
        kinds = [new, change, change, boilerplate, lambda: rng.choice(texts)]
        texts.append((rng.choice(kinds) if texts else new)())
    return [" ".join(words) for words in texts]


def exact_copies(texts, folder):
    exact = ExactDuplicates(folder / "hashes")
    for text in texts:
        exact.add(hashlib.sha256(text.encode()).digest())
    return exact.find()


def in_memory(documents, copies, *settings):
    matches = match_documents(documents, dict(copies.tolist()), NearDuplicates(*settings))
    return {i: m[:2] for i, _, m in matches if m and not m.is_copy}


def on_disk(paths, copies, folder, *settings):
    found = find_near_duplicates(paths, copies, folder, *settings)
    assert found.pairs.dtype == np.int64 and found.similarity.dtype == np.float32
    assert (np.diff(found.pairs[:, 0]) > 0).all()
    return {
        int(i): (int(j), round(float(similarity), 3))
        for (i, j), similarity in zip(found.pairs, found.similarity, strict=True)
    }


@pytest.mark.parametrize("shards", [1, 4])
def test_found_on_disk_as_in_memory(shards, tmp_path):
    texts = made_texts(counts(600, 4000), shards)
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    copies = exact_copies(texts, tmp_path)
    paths = [tmp_path / f"sketches-{i}" for i in range(shards)]
    size = -(-len(documents) // shards)
    for i, path in enumerate(paths):
        write_sketches(documents[i * size : (i + 1) * size], path)
    found = []
    for threshold, candidates, block in ((0.8, 1000, 1 << 18), (0.5, 1000, 500), (0.7, 2, 3000)):
        expected = in_memory(documents, copies, threshold, 128, candidates)
        given = on_disk(paths, copies, tmp_path, threshold, candidates, block)
        assert given == expected
        found.append(given)
    assert len(found[0]) > 20 and len(copies) > 100
    assert found[1].keys() - found[0].keys()
    without_limit = on_disk(paths, copies, tmp_path, 0.7, 10**6)
    assert without_limit != found[2], "the limit of candidates was not reached"


def test_of_equally_similar_documents_the_first_is_named(tmp_path):
    a, b = np.random.default_rng(0).integers(2**32, size=(2, 128), dtype=np.uint32)
    b[30:] = a[30:]  # too different to be near duplicates
    between = np.concatenate([b[:15], a[15:]])
    np.stack([a, b, between, b]).astype("<u4").tofile(tmp_path / "sketches")
    found = on_disk([tmp_path / "sketches"], NO_COPIES, tmp_path)
    assert found == {2: (0, round(113 / 128, 3)), 3: (1, 1.0)}


def test_copies_take_no_part(tmp_path):
    text = " ".join(f"word{i}" for i in range(300))
    write_sketches([Document(str(i), text) for i in range(5)], tmp_path / "sketches")
    copies = np.array([[1, 0], [2, 0], [4, 0]])
    for block in (1, 1 << 18):
        found = on_disk([tmp_path / "sketches"], copies, tmp_path, 0.8, 1000, block)
        assert found == {3: (0, 1.0)}


def test_only_the_result_is_left(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    for i in range(2):
        write_sketches([Document("a", "a b c d e f")], tmp_path / str(i))
    find_near_duplicates([tmp_path / "0", tmp_path / "1"], NO_COPIES, folder)
    assert {p.name for p in folder.iterdir()} == {"near-pairs.bin", "near-similarity.bin"}
    assert (tmp_path / "0").stat().st_size == 512


@pytest.mark.skipif(not PROVE, reason="the chapter shows it at a small count")
def test_memory_does_not_grow_with_the_documents():
    "At most 64 bytes a document, besides some megabytes."
    program = ROOT / "tests/programs/memory_of_near_duplicates.py"
    words = [sys.executable, program, "10000", "100000", "1000000"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    for row in json.loads(done.stdout):
        assert 0.25 < row["found"] / row["documents"] < 0.35
        assert row["bytes"] < 30e6 + 64 * row["documents"], row
