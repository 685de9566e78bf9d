"""Faults of the disk and of the process: an artifact is complete, or the fault is named."""

import ctypes
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import PROGRAMS, command, counts, environment, start

from codex_nb.core import artifacts
from codex_nb.core.artifacts import (
    ArtifactError,
    DiskError,
    clear_leftovers,
    open_artifact,
    problems,
    publish,
    write_file,
)
from codex_nb.core.config import digest_of
from codex_nb.core.store import Lock, find_stored, store_by_content


def publish_seconds(folder):
    "How long one artifact of the writers takes here and now: kills must fall into a few of them."
    begun = time.perf_counter()
    with publish(folder, "numbers") as d:
        for i in range(6):
            (d.path / f"{i}.bin").write_bytes(bytes(200_000))
    return time.perf_counter() - begun


def kill_after(program, folder, seconds):
    "Start a program that publishes, and kill it so long after its first line."
    p = start("python", PROGRAMS / program, folder, home=folder)
    p.stdout.readline()
    time.sleep(seconds)
    p.send_signal(signal.SIGKILL)
    p.communicate()


def test_kill_while_replacing_leaves_the_old_artifact_or_the_new(tmp_path):
    rng, seen, seconds = random.Random(0), set(), publish_seconds(tmp_path / "probe")
    for _ in range(counts(10, 200)):
        kill_after("publish_for_ever.py", tmp_path / "a", rng.random() * 3 * seconds)
        a = open_artifact(tmp_path / "a", "numbers")  # raises if anything in it is damaged
        n = a.manifest.config["n"]
        for i in range(6):
            assert (a.path / f"{i}.bin").read_bytes() == n.to_bytes(4, "big") * 50_000
        seen.add(n)
    assert len(seen) > 1  # kills fell at different moments
    with publish(tmp_path / "b", "numbers"):
        pass
    assert not list(tmp_path.glob(".tmp-*"))  # leftovers of dead processes are cleared


def test_kill_while_publishing_for_the_first_time_leaves_no_part(tmp_path):
    rng, complete, seconds = random.Random(1), 0, publish_seconds(tmp_path / "probe")
    for k in range(counts(10, 60)):
        folder = tmp_path / str(k)
        kill_after("publish_many.py", folder, rng.random() * 6 * seconds)
        made = [p for p in folder.glob("*") if not p.name.startswith(".tmp-")]
        assert [problems(p) for p in made] == [[]] * len(made)
        complete += len(made)
    assert complete  # kills fell into the writing of a later one, too


def test_limit_of_file_size_leaves_the_old_artifact(tmp_path):
    with publish(tmp_path / "a", "numbers") as d:
        (d.path / "x").write_text("old")
    program = PROGRAMS / "publish_beyond_a_limit.py"
    out = command("python", program, tmp_path / "a", home=tmp_path, fresh=True).stdout
    assert f"cannot write {tmp_path / 'a'}" in out and "too large" in out and "bytes free" in out
    assert (open_artifact(tmp_path / "a").path / "x").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_store_that_cannot_be_written_is_read(number, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    made = store_by_content("number", {}, lambda draft: (draft.path / "n.txt").write_text("42"))

    def refuse(*args, **more):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("codex_nb.core.store.FileLock.acquire", refuse)
    assert find_stored("number", made.digest).digest == made.digest
    monkeypatch.undo()
    monkeypatch.setattr("codex_nb.core.artifacts.os.fsync", refuse)
    with pytest.raises(OSError, match="one"):
        write_file(tmp_path / "one", "text")
    if number == errno.ENOSPC:
        with Lock(tmp_path / "lock"), pytest.raises(ArtifactError, match="an unknown process"):
            Lock(tmp_path / "lock", timeout=0).acquire()


def test_a_name_that_no_disk_takes_is_a_short_line(tmp_path, capsys):
    from codex_nb.cli.main import main

    for words in (["verify", "x" * 5000], ["verify", "a\nb"], ["export", "x", "--to", ""]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        err = capsys.readouterr().err
        assert ended.value.code == 1 and err.count("\n") == 1, err
        assert "Traceback" not in err and len(err) < 2000


def test_a_deleted_working_folder_is_named(tmp_path, monkeypatch, capsys):
    from codex_nb.cli.main import main

    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit):
        main(["runs"])
    assert capsys.readouterr().err == (
        "codex-nb: the current folder is not there any more; cd to another\n"
    )


def on_small_disk(size):
    "The beginning of a command that has a tmpfs of `size` on /mnt."
    mount = f'mount -t tmpfs -o size={size} tmpfs /mnt && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mount, "sh"]


def mounts_allowed():
    if not shutil.which("unshare"):
        return False
    return subprocess.run([*on_small_disk("1m"), "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not mounts_allowed(), reason="no mount namespace allowed here")
@pytest.mark.parametrize("writer", ["bytes", "torch", "safetensors"])
def test_full_disk_is_named(writer, tmp_path):
    words = [sys.executable, PROGRAMS / "publish_on_a_full_disk.py", writer]
    done = subprocess.run(
        [*on_small_disk("4m"), *words], capture_output=True, text=True, env=environment(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{errno.ENOSPC} ")
    assert "/mnt/a" in done.stdout and "bytes free" in done.stdout


@pytest.mark.skipif(not mounts_allowed(), reason="no mount namespace allowed here")
def test_disk_without_room_for_a_file_says_so(tmp_path):
    "Bytes are free, and no inode is."
    program = "from codex_nb.core.artifacts import write_file\nwrite_file('/mnt/x', 'text')"
    full = (
        f"for i in 1 2 3 4 5 6 7 8; do touch /mnt/$i; done 2> /dev/null; exec {sys.executable} -c"
    )
    words = [*on_small_disk("4m,nr_inodes=8"), "sh", "-c", f'{full} "$0"', program]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(tmp_path))
    message = done.stderr.splitlines()[-1]
    assert message.startswith("codex_nb.core.artifacts.DiskError"), done.stderr
    assert "no files (inodes) are left there, all 8 are in use" in message
    assert "bytes free" not in message


def flip(f, rng, folder):
    data = bytearray(f.read_bytes())
    data[rng.randrange(1000)] ^= 1 << rng.randrange(8)
    f.write_bytes(data)


def truncate(f, rng, folder):
    f.write_bytes(f.read_bytes()[: rng.randrange(1, 1000)])


def empty(f, rng, folder):
    f.write_bytes(b"")


def remove(f, rng, folder):
    f.unlink()


def add(f, rng, folder):
    (f.parent / "new.bin").write_bytes(b"")


def link(f, rng, folder):
    elsewhere = folder / f"moved-{rng.random()}"
    f.rename(elsewhere)
    f.symlink_to(elsewhere)


def manifest(f, rng, folder):
    "Change one character; a space that becomes another is no change of content."
    m = f.parent / "manifest.json"
    text = bytearray(m.read_bytes())
    at = rng.choice([i for i, c in enumerate(text) if not chr(c).isspace()])
    text[at] ^= 1
    m.write_bytes(text)


@pytest.mark.parametrize("damage", [flip, truncate, empty, remove, add, link, manifest])
def test_damage_is_found(tmp_path, damage):
    rng = random.Random(damage.__name__)
    for _ in range(counts(8, 50)):
        with publish(tmp_path / "a", "numbers", replace=True) as d:
            for i in range(3):
                (d.path / f"{i}.bin").write_bytes(rng.randbytes(1000))
        assert problems(tmp_path / "a") == []
        damage(tmp_path / "a" / f"{rng.randrange(3)}.bin", rng, tmp_path)
        assert len(problems(tmp_path / "a")) == 1
        with pytest.raises(ArtifactError):
            open_artifact(tmp_path / "a")


class OtherSystem:
    "A C library without `renameat2`, or one whose disk cannot exchange names."

    def __init__(self, libc, kind):
        self.calls = 0
        if kind == "macOS":
            self.renamex_np = lambda a, b, swap: self.call(libc.renameat2(-100, a, -100, b, swap))
        elif kind == "disk":
            self.renameat2 = lambda *names: self.call(libc.renameat2(*names[:4], 1 << 20))

    def call(self, result):
        self.calls += 1
        return result


@pytest.mark.parametrize("kind", ["macOS", "disk", "neither"])
def test_replacing_on_another_system(kind, tmp_path, monkeypatch):
    "One artifact is replaced by the next, and a failure in between restores it."
    system = OtherSystem(ctypes.CDLL(None, use_errno=True), kind)
    monkeypatch.setattr(artifacts.ctypes, "CDLL", lambda *_, **__: system)

    def write(text):
        with publish(tmp_path / "a-b", "words", replace=True) as d:
            (d.path / "text").write_text(text)

    write("one")
    write("two")
    assert (tmp_path / "a-b" / "text").read_text() == "two"
    assert problems(tmp_path / "a-b") == [] and os.listdir(tmp_path) == ["a-b"]
    assert system.calls == (kind != "neither")
    if kind == "macOS":  # it is one step
        return
    rename, moved = os.rename, []

    def fail_once(source, target):
        moved.append(target)
        if len(moved) == 2:  # the old one is aside
            raise OSError(errno.EIO, "a fault")
        rename(source, target)

    with monkeypatch.context() as m, pytest.raises(OSError):
        m.setattr(os, "rename", fail_once)
        write("three")
    assert (tmp_path / "a-b" / "text").read_text() == "two" and os.listdir(tmp_path) == ["a-b"]
    child = os.fork()
    if not child:  # it dies between the two steps
        moved.clear()
        m.setattr(os, "rename", lambda s, t: os._exit(7) if moved else moved.append(rename(s, t)))
        write("four")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not (tmp_path / "a-b").exists()
    clear_leftovers(tmp_path)
    assert (tmp_path / "a-b" / "text").read_text() == "two" and os.listdir(tmp_path) == ["a-b"]
    assert problems(tmp_path / "a-b") == []


def test_second_writer_is_refused_within_a_second(tmp_path):
    p = start("python", PROGRAMS / "hold_lock.py", tmp_path / ".lock", home=tmp_path)
    p.stdout.readline()
    begun = time.monotonic()
    with pytest.raises(ArtifactError, match=f"in use by process {p.pid} on"):
        Lock(tmp_path / ".lock").acquire()
    assert time.monotonic() - begun < 1
    p.kill()
    p.communicate()
    with Lock(tmp_path / ".lock"):  # freed by the system
        pass


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_file(tmp_path / "x", "old")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="no space left"):
        write_file(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_newer_schema_is_refused(tmp_path):
    with publish(tmp_path / "a", "numbers"):
        pass
    m = json.loads((tmp_path / "a" / "manifest.json").read_text())
    m["schema"] = 99
    m.pop("check")
    m["check"] = digest_of(m)
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(m))
    with pytest.raises(ArtifactError, match="schema 99, this version reads up to 1"):
        open_artifact(tmp_path / "a")
