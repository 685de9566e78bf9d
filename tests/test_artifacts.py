"""Faults of the disk and of the process: what is there is whole, or it is said."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from codex_nb.core.artifacts import (
    ArtifactError,
    DiskError,
    open_artifact,
    problems,
    publish,
    write_file,
)
from codex_nb.core.store import Lock

PROVE = bool(os.environ.get("PROVE"))

WRITER = textwrap.dedent("""
    import sys, itertools
    from codex_nb.core.artifacts import publish
    for n in itertools.count(1):
        with publish(sys.argv[1], "numbers", config={"n": n}, replace=True) as d:
            for i in range(6): (d.path/f"{i}.bin").write_bytes(n.to_bytes(4, "big")*50_000)
        if n == 1: print("first", flush=True)
""")


def publish_seconds(folder):
    "How long one artifact of the writers takes here and now: kills must fall into a few of them."
    start = time.perf_counter()
    with publish(folder, "numbers") as d:
        for i in range(6):
            (d.path / f"{i}.bin").write_bytes(bytes(200_000))
    return time.perf_counter() - start


def test_killed_while_publishing(tmp_path):
    rng, seen = random.Random(0), set()
    seconds = publish_seconds(tmp_path / "probe")
    for k in range(200 if PROVE else 20):
        p = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "a")], stdout=subprocess.PIPE
        )
        p.stdout.readline()
        time.sleep(rng.random() * 3 * seconds)
        p.send_signal(signal.SIGKILL)
        p.wait()
        a = open_artifact(tmp_path / "a", "numbers")  # raises if anything in it is not whole
        n = a.manifest.config["n"]
        assert all(
            (a.path / f"{i}.bin").read_bytes() == n.to_bytes(4, "big") * 50_000 for i in range(6)
        )
        seen.add(n)
    assert len(seen) > 1  # kills fell at different moments
    with publish(tmp_path / "b", "numbers"):
        pass
    assert not list(tmp_path.glob(".tmp-*"))  # leftovers of dead processes are cleared


def test_killed_while_publishing_the_first_time(tmp_path):
    code = "import sys; from codex_nb.core.artifacts import publish; print('ready', flush=True)\nfor n in range(10**6):\n    with publish(f'{sys.argv[1]}/{n}', 'numbers') as d:\n        for i in range(6): (d.path/f'{i}.bin').write_bytes(bytes([n%256])*200_000)"
    rng, whole, seconds = random.Random(1), 0, publish_seconds(tmp_path / "probe")
    for k in range(60 if PROVE else 10):
        home = tmp_path / str(k)
        p = subprocess.Popen([sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE)
        p.stdout.readline()
        time.sleep(rng.random() * 6 * seconds)
        p.send_signal(signal.SIGKILL)
        p.wait()
        for a in home.iterdir() if home.exists() else []:
            if a.name.startswith(".tmp-"):
                continue
            assert problems(a) == []
            whole += 1
    assert whole > 10


def test_size_limit_leaves_the_old_artifact(tmp_path):
    with publish(tmp_path / "a", "numbers") as d:
        (d.path / "x").write_text("old")
    code = textwrap.dedent("""
        import resource, signal, sys
        from codex_nb.core.artifacts import DiskError, publish
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            with publish(sys.argv[1], "numbers", replace=True) as d: (d.path/"x").write_bytes(bytes(1_000_000))
        except DiskError as e: print(e)
    """)
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True
    ).stdout
    assert f"cannot write {tmp_path / 'a'}" in said and "too large" in said and "bytes free" in said
    assert (open_artifact(tmp_path / "a").path / "x").read_text() == "old" and len(
        list(tmp_path.iterdir())
    ) == 1


def full_disk(size):
    "A command that runs the rest of its arguments with a tmpfs of `size` on /mnt."
    return [
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'mount -t tmpfs -o size={size} tmpfs /mnt && exec "$@"',
        "sh",
    ]


needs_mount = pytest.mark.skipif(
    subprocess.run([*full_disk("1m"), "true"], capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="no mount namespace allowed here",
)


@needs_mount
@pytest.mark.parametrize("what", ["bytes", "torch", "safetensors"])
def test_full_disk_is_named(what):
    code = textwrap.dedent("""
        import os, sys
        from codex_nb.core.artifacts import DiskError, open_artifact, publish
        with publish("/mnt/a", "numbers") as d: (d.path/"x").write_text("old")
        def write(path):
            if sys.argv[1] == "bytes": return path.write_bytes(bytes(8_000_000))
            import torch
            if sys.argv[1] == "torch": return torch.save(torch.zeros(2_000_000), path)
            from safetensors.torch import save_file
            save_file({"x": torch.zeros(2_000_000)}, path)
        try:
            with publish("/mnt/a", "numbers", replace=True) as d: write(d.path/"x")
        except DiskError as e: print(e.errno, e)
        assert (open_artifact("/mnt/a").path/"x").read_text() == "old" and os.listdir("/mnt") == ["a"]
    """)
    done = subprocess.run(
        [*full_disk("4m"), sys.executable, "-c", code, what], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith(f"{errno.ENOSPC} ")
        and "/mnt/a" in done.stdout
        and "bytes free" in done.stdout
    )


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "empty", "remove", "add", "link", "manifest"]
)
def test_damage_is_found(tmp_path, damage):
    rng = random.Random(damage)
    for trial in range(50 if PROVE else 8):
        with publish(tmp_path / "a", "numbers", replace=True) as d:
            for i in range(3):
                (d.path / f"{i}.bin").write_bytes(rng.randbytes(1000))
        assert problems(tmp_path / "a") == []
        f = tmp_path / "a" / f"{rng.randrange(3)}.bin"
        data = bytearray(f.read_bytes())
        if damage == "flip":
            data[rng.randrange(1000)] ^= 1 << rng.randrange(8)
            f.write_bytes(data)
        elif damage == "truncate":
            f.write_bytes(data[: rng.randrange(1, 1000)])
        elif damage == "empty":
            f.write_bytes(b"")
        elif damage == "remove":
            f.unlink()
        elif damage == "add":
            (tmp_path / "a" / "new.bin").write_bytes(b"")
        elif damage == "link":
            f.rename(tmp_path / f"moved{trial}")
            f.symlink_to(tmp_path / f"moved{trial}")
        else:
            m = tmp_path / "a" / "manifest.json"
            text = bytearray(m.read_bytes())
            at = rng.randrange(len(text))
            text[at] ^= 1
            m.write_bytes(text)
            if bytes(text).split() == m.read_bytes().split() and chr(text[at] ^ 1).isspace():
                continue  # a changed space is no change of content unless it breaks the JSON
        assert len(problems(tmp_path / "a")) == 1, damage
        with pytest.raises(ArtifactError):
            open_artifact(tmp_path / "a")


def test_second_writer_is_refused_within_a_second(tmp_path):
    p = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import time; from codex_nb.core.store import Lock\nl = Lock({str(tmp_path / '.lock')!r}).acquire(); print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    p.stdout.readline()
    start = time.monotonic()
    with pytest.raises(ArtifactError, match=f"in use by process {p.pid} on"):
        Lock(tmp_path / ".lock").acquire()
    assert time.monotonic() - start < 1
    p.kill()
    p.wait()
    with Lock(tmp_path / ".lock"):
        pass  # freed by the system


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_file(tmp_path / "x", "old")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="no space left"):
        write_file(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_newer_schema_is_refused(tmp_path):
    import json

    from codex_nb.core.config import digest_of

    with publish(tmp_path / "a", "numbers"):
        pass
    m = json.loads((tmp_path / "a" / "manifest.json").read_text())
    m["schema"] = 99
    m.pop("check")
    m["check"] = digest_of(m)
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(m))
    with pytest.raises(ArtifactError, match="schema 99, this version reads up to 1"):
        open_artifact(tmp_path / "a")
