"""Data elsewhere is read where that is allowed, through copies that are checked."""

import importlib.util
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import PROVE

from codex_nb.core.artifacts import ArtifactError
from codex_nb.core.config import ConfigError
from codex_nb.data.corpus import CorpusConfig, open_corpus
from codex_nb.data.documents import ReadError
from codex_nb.data.readers import Rejects, read_path
from codex_nb.data.record_formats import RecordReader
from codex_nb.data.remote import fetch_remote, open_remote, read_remote


@pytest.fixture
def shards(tmp_path, monkeypatch):
    "A folder of text, and an empty workspace."
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("codex_nb.core.artifacts.git_head", lambda: None)  # takes long
    folder = tmp_path / "shards"
    for name in ("b.txt", "a/z.txt", "a/b/c.jsonl", "manifest.json", "node_modules/x.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_record = path.suffix != ".txt"
        path.write_text(f'{{"text": "of {name}"}}\n' if is_record else f"of {name}")
    return folder


def read(url, include=(), exclude=()):
    skipped, records = Counter(), RecordReader()
    return list(read_remote(url, True, skipped, Rejects(), include, exclude, records)), skipped


def put(fs, folder, root):
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@pytest.fixture
def in_memory(shards):
    fs = importlib.import_module("fsspec").filesystem("memory")
    put(fs, shards, "/bucket/text")
    yield fs, "memory://bucket/text"
    fs.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    "patterns", [((), ()), (("*.txt",), ()), ((), ("a/b/",)), (("a/",), ("*.jsonl",))]
)
def test_documents_are_those_of_a_folder_here(patterns, shards, in_memory):
    skipped = Counter()
    expected = list(read_path(shards, skipped, None, *patterns))
    for url in (in_memory[1], shards.as_uri(), f"{shards.as_uri()}/"):
        assert read(url, *patterns) == (expected, skipped)


def test_nothing_elsewhere_is_read_or_imported_before_it_is_allowed(monkeypatch):
    for name in ("fsspec", "s3fs"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an error
    with pytest.raises(ConfigError, match="read with remote=true only"):
        fetch_remote("s3://bucket/text")


@pytest.mark.parametrize(
    ("url", "missing", "message"),
    [
        (
            "s3://b/t",
            "s3fs",
            r"the package that reads it is not installed, s3fs: pip install 'codex_nb\[remote\]'",
        ),
        ("gs://b/t", "gcsfs", "not installed, gcsfs: pip install gcsfs"),
        ("http://b/t", None, "http:// is not read"),
        ("s3://key:" + "hunter2@b/t", None, "has credentials in the address"),
    ],
)
def test_refusals(url, missing, message, monkeypatch):
    monkeypatch.setattr("codex_nb.data.remote.find_spec", lambda name: None if missing else name)
    with pytest.raises(ConfigError, match=message) as refused:
        open_remote(url, True)
    assert "hunter2" not in str(refused.value)


@pytest.fixture
def fetched(in_memory, monkeypatch):
    "The names of files that were fetched since the list was emptied."
    fs, names = in_memory[0], []
    get_file = type(fs).get_file

    def get(self, remote, local, *args, **more):
        names.append(Path(remote).name)
        return get_file(self, remote, local, *args, **more)

    monkeypatch.setattr(type(fs), "get_file", get)
    return names


def test_only_what_changed_is_fetched_again(in_memory, fetched):
    fs, url = in_memory
    first = fetch_remote(url, allowed=True)
    assert len(fetched) == len(first) == 4
    fetched.clear()
    assert fetch_remote(url, allowed=True) == first and not fetched
    fs.pipe_file("/bucket/text/b.txt", b"something else")
    second = fetch_remote(url, allowed=True)
    assert fetched == ["b.txt"]
    changed = {a.name for a, b in zip(first, second, strict=True) if a != b}
    assert changed == {"b.txt"}
    assert {f.name: f.path.read_text() for f in second}["b.txt"] == "something else"


def test_a_copy_whose_bytes_changed_is_not_read(in_memory, fetched):
    copy = fetch_remote(in_memory[1], allowed=True)[0]
    copy.path.write_bytes(copy.path.read_bytes().replace(b"o", b"x"))
    with pytest.raises(ArtifactError, match="content has changed"):
        read(in_memory[1])


@pytest.mark.parametrize("grows", [False, True])
def test_a_file_that_changes_while_it_is_read_is_an_error(grows, in_memory, monkeypatch):
    fs, url = in_memory
    get_file = type(fs).get_file

    def get(self, remote, local, **more):
        if not grows:
            fs.pipe_file(remote, b"x" * fs.info(remote)["size"])
        get_file(self, remote, local, **more)
        if grows:
            with open(local, "ab") as f:
                f.write(b"more")

    monkeypatch.setattr(type(fs), "get_file", get)
    with pytest.raises(ReadError, match="changed while it was read; run again"):
        fetch_remote(url, allowed=True)
    monkeypatch.undo()


def test_an_interrupted_copy_leaves_nothing_and_is_made_again(in_memory, monkeypatch):
    fs, url = in_memory
    get_file, seen = type(fs).get_file, []

    def fail_once(self, remote, local, **more):
        seen.append(remote)
        if len(seen) == 2:
            Path(local).write_text("half")
            raise OSError("connection lost")
        get_file(self, remote, local, **more)

    with monkeypatch.context() as patched:
        patched.setattr(type(fs), "get_file", fail_once)
        with pytest.raises(ReadError, match="connection lost; run again to go on"):
            fetch_remote(url, allowed=True)
        assert [f.name for f in fetch_remote(url, allowed=True)][0] == "b.txt"
    assert len(seen) == 5  # one more than there are files


@pytest.fixture
def s3(shards, tmp_path):
    "A server on loopback that speaks S3, with the shards in a bucket."
    server = PROVE and shutil.which("moto_server")
    if not server or importlib.util.find_spec("s3fs") is None:
        pytest.skip("for make prove, where moto's server and s3fs are installed")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([server, "-p", str(port)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def test_s3(s3, shards, monkeypatch):
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in (keys | {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": s3}).items():
        monkeypatch.setenv(name, value)
    import s3fs

    fs = s3fs.S3FileSystem()
    fs.mkdir("bucket")
    put(fs, shards, "bucket/text")
    assert read("s3://bucket/text") == (list(read_path(shards, skipped := Counter())), skipped)
    first = fetch_remote("s3://bucket/text", allowed=True)
    fs.pipe_file("bucket/text/b.txt", b"of c.txt"[:8])
    second = fetch_remote("s3://bucket/text", allowed=True)
    assert [a.name for a, b in zip(first, second, strict=True) if a != b] == ["b.txt"]
    one = fetch_remote("s3://bucket/text/a/z.txt", allowed=True)
    assert [(f.name, f.path.read_text()) for f in one] == [("z.txt", "of a/z.txt")]
    with pytest.raises(ReadError, match="there is no such file or folder"):
        fetch_remote("s3://bucket/nothing", allowed=True)


def test_a_corpus_is_the_same_from_here_and_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    fs = importlib.import_module("fsspec").filesystem("memory")
    fs.pipe_file("/bucket/all.jsonl", b"".join(b'{"text": "text %d"}\n' % i for i in range(40)))
    (tmp_path / "all.jsonl").write_bytes(fs.cat_file("/bucket/all.jsonl"))
    here = open_corpus(CorpusConfig(data=str(tmp_path / "all.jsonl")))
    address = "memory://bucket/all.jsonl"
    with pytest.raises(ConfigError, match="read with remote=true only"):
        open_corpus(CorpusConfig(data=address))
    elsewhere = open_corpus(CorpusConfig(data=address, remote=True, salt="another"))
    assert elsewhere.meta["remote"] == address and "remote" not in here.meta
    assert open_corpus(CorpusConfig(data=address, remote=True)).digest == here.digest
    fs.rm("/bucket", recursive=True)
