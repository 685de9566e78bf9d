"""A large file of the store that did not change is not hashed again; one that did is found."""

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from codex_nb.core import artifacts, store
from codex_nb.core.artifacts import ArtifactError, open_artifact, problems
from codex_nb.core.config import env_setting
from codex_nb.core.store import LARGE, FileDigests, cached, find_stored, remove_unused, store_folder
from codex_nb.data.tokens import TokenStore
from codex_nb.experiments import replay, segments
from codex_nb.run.run_folder import _parent_state

CHECK = "CODEX_NB_CHECK"


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    "The names of files that were hashed since the list was emptied."
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    names, sha256_file = [], artifacts.sha256_file

    def sha256(path):
        if Path(path).suffix == ".bin":
            names.append(Path(path).name)
        return sha256_file(path)

    monkeypatch.setattr(artifacts, "sha256_file", sha256)
    monkeypatch.setattr(store, "sha256_file", sha256)
    return names


def make(kind="corpus"):
    def build(draft):
        (draft.path / "large.bin").write_bytes(b"a" * LARGE)
        (draft.path / "small.bin").write_bytes(b"a" * 9)

    return cached(kind, {}, {}, ("core.store",), build)


def record_of(artifact):
    return artifact.path.with_name(f".{artifact.path.name}.verified")


def test_only_large_files_that_did_not_change_are_not_hashed(hashed):
    a = make()
    hashed.clear()
    assert make().digest == find_stored("corpus", a.digest).digest == a.digest
    assert hashed == ["small.bin"] * 2


def test_whoever_asks_for_a_proof_hashes_everything(hashed, monkeypatch):
    a = make()
    hashed.clear()
    assert problems(a.path) == [] and open_artifact(a.path).digest == a.digest
    assert hashed == ["large.bin", "small.bin"] * 2
    hashed.clear()
    monkeypatch.setenv("CODEX_NB_CHECK", "full")
    assert make().digest == find_stored("corpus", a.digest).digest
    assert hashed == ["large.bin", "small.bin"] * 2


def test_verifying_a_run_hashes_what_it_was_made_from(hashed):
    a = make()
    hashed.clear()
    assert _parent_state("corpus", a.digest) == "ok" and "large.bin" in hashed
    forge(a)
    with pytest.raises(ArtifactError, match="content has changed"):
        _parent_state("corpus", a.digest)


def test_replays_and_audits_hash_everything(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(replay, "find_stored", lambda *_: asked.append(env_setting(CHECK)))
    metrics = [{"split": "train", "step": 1, "exact": {"fed": "0"}}]
    record = SimpleNamespace(kind="train", parents={"tokens": "0" * 64})
    replay._order_level(SimpleNamespace(metrics=metrics, record=record), None)

    def look(*args):
        asked.append(env_setting(CHECK))
        return True, ""

    monkeypatch.setattr(segments, "execute_training", look)
    monkeypatch.setattr(segments, "compare_training", look)
    segments.execute(None, SimpleNamespace(of=segments.TRAINING), tmp_path, {})
    assert asked == ["full"] * 3 and env_setting(CHECK) is None


def forge(a):
    "Change the large file, and write the record that would be there if it were intact."
    file = a.path / "large.bin"
    file.write_bytes(b"b" * LARGE)
    sha256 = a.manifest.files["large.bin"]["sha256"]
    row = [*artifacts.file_stamp(file), sha256]
    record_of(a).write_text(json.dumps({"large.bin": row}))


def test_a_forged_record_deceives_a_run_and_no_proof(hashed):
    a = make()
    forge(a)
    assert find_stored("corpus", a.digest).digest == a.digest  # as the chapter says
    assert "content has changed" in problems(a.path)[0]


def change(file):
    with open(file, "r+b") as f:
        f.write(b"b")


def change_and_set_back(file):
    before = file.stat()
    change(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(file):
    "By another file of the same size and time."
    before, other = file.stat(), file.with_name("other")
    other.write_bytes(b"b" * LARGE)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(file)


def truncate(file):
    os.truncate(file, LARGE - 1)


@pytest.mark.parametrize("harm", [change, change_and_set_back, replace, truncate])
@pytest.mark.parametrize("opened_before", [False, True])
def test_change_is_found(harm, opened_before, hashed):
    a = make()
    if opened_before:
        make()
    harm(a.path / "large.bin")
    for attempt in range(2):  # a file found damaged is not remembered
        with pytest.raises(ArtifactError, match=r"content has changed|1048575 bytes"):
            find_stored("corpus", a.digest)


def test_each_part_of_the_stamp_counts(hashed):
    a = make()
    record = json.loads(record_of(a).read_text())
    for i in range(5):
        row = list(record["large.bin"])
        row[i] = row[i] + 1 if i < 4 else "0" * 64
        record_of(a).write_text(json.dumps({"large.bin": row}))
        hashed.clear()
        make()
        assert "large.bin" in hashed
        assert json.loads(record_of(a).read_text()) == record


@pytest.mark.parametrize(
    "text", [None, "", "[]", "{", '{"large.bin": 1}', '{"large.bin": [1, 2]}', "[" * 100_000]
)
def test_damaged_record_only_means_that_all_is_hashed(text, hashed):
    a = make()
    record = record_of(a).read_text()
    if text is None:
        record_of(a).unlink()
    else:
        record_of(a).write_text(text)
    hashed.clear()
    make()
    assert "large.bin" in hashed and record_of(a).read_text() == record


def test_a_copy_brings_no_record(hashed, monkeypatch, tmp_path):
    a = make()
    shutil.copytree(a.path, tmp_path / "other/store/corpus/copy")
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "other"))
    hashed.clear()
    assert find_stored("corpus", a.digest)
    assert "large.bin" in hashed


def test_removed_artifact_takes_its_record_along(hashed):
    a = make()
    assert record_of(a).exists()
    os.utime(a.path / "manifest.json", (0, 0))
    assert len(remove_unused(days=1)) == 1
    assert not record_of(a).exists()


def test_ten_billion_tokens_are_opened_in_milliseconds(hashed):
    "A sparse file: 20 GB for all who ask, of which the disk holds none."
    tokens = 10**10
    sizes = {"ids.bin": 2 * tokens, "offsets.bin": 16, "sizes.bin": 8}

    def build(draft):
        for name, size in sizes.items():
            with open(draft.path / name, "wb") as f:
                f.truncate(size)
        draft.hashed["ids.bin"] = {"sha256": "0" * 64, "size": sizes["ids.bin"]}
        counts = {"tokens": tokens, "documents": 1, "bytes": tokens, "supervised": tokens}
        draft.meta.update(counts, dtype="uint16")

    digest = cached("tokens", {}, {}, ("core.store",), build).digest
    hashed.clear()
    start = time.perf_counter()
    opened = TokenStore(find_stored("tokens", digest))
    seconds = time.perf_counter() - start
    assert len(opened.ids) == tokens and opened.ids[-1] == 0
    assert "ids.bin" not in hashed and seconds < 0.5, seconds
    shutil.rmtree(store_folder("tokens"))


def test_a_file_changed_within_a_tick_of_the_clock_is_not_trusted(hashed, monkeypatch):
    "Two changes within one tick of the file system's clock leave equal times."
    slept = []
    monkeypatch.setattr(store.time, "sleep", slept.append)
    monkeypatch.setattr(store.time, "time_ns", lambda: 10**9)
    assert store._settled([0, 0, 10**9 - 5_000_000, 0]) and slept == [0.015]
    assert store._settled([0, 0, 10**9 - 50_000_000, 0]) and len(slept) == 1
    assert not store._settled([0, 0, 10**9 + 1, 0])


def test_processes_that_save_at_once_keep_what_both_recorded(tmp_path, hashed):
    files = [tmp_path / f"{i}.bin" for i in range(2)]
    for file in files:
        file.write_bytes(np.arange(9).tobytes())
    tables = [FileDigests(tmp_path / "table") for _ in files]
    for table, file in zip(tables, files, strict=True):
        table.sha256(file)
    for table in tables:
        table.save()
    hashed.clear()
    both = FileDigests(tmp_path / "table")
    assert [both.lookup(f) for f in files] == [artifacts.sha256_file(files[0])] * 2
    change_and_set_back(files[0])
    assert both.lookup(files[0]) is None and both.lookup(files[1])
