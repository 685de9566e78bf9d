"""SIGTERM, SIGINT and SIGHUP at any moment: a checkpoint, the exit code, and the same end."""

import contextlib
import fcntl
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
from helpers import (
    BIN,
    PROVE,
    checkpoint_files,
    codex,
    counts,
    environment,
    flags,
    shared_folder,
    start,
    train_steps,
    wait_until,
)

STEPS = 120
SMALL = dict(
    width=32,
    seq_len=32,
    batch_size=4,
    eval_every=7,
    save_every=9,
    keep_last=2,
    eval_documents=4,
    max_documents=4,
    max_new_tokens=4,
    resamples=100,
)


def training(folder, steps=STEPS):
    "The words of a command that trains."
    return ["codex-nb", "run", "train", *flags(SMALL | dict(steps=steps)), "--folder", folder]


def launch(folder, home, steps=STEPS, fresh=True):
    return start(*training(folder, steps), home=home, session=True, fresh=fresh)


def kernels(folder):
    "Processes that work for a run, zombies apart."
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"CODEX_NB_RUN={folder}".encode() in (p / "environ").read_bytes()
            if ours and (p / "stat").read_text().split(")")[1].split()[0] != "Z":
                found.append(int(p.name))
        except OSError:
            continue
    return found


def has_checkpoint(folder, process):
    return lambda: process.poll() is not None or list(folder.glob("checkpoints/step-*"))


def has_begun(folder, process):
    return lambda: process.poll() is not None or train_steps(folder)


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    "What a run that nobody stopped ends with."

    def make(home):
        done = codex(*training(home / "runs" / "straight")[1:], home=home)
        assert done.returncode == 0, done.stderr

    home = shared_folder(tmp_path_factory, "never-stopped", make)
    return result(home / "runs" / "straight")


def result(folder):
    "The files of the last checkpoint, and the digest of the run."
    digest = json.loads((folder / "manifest.json").read_text())["digest"]
    return checkpoint_files(folder, STEPS) | {"run": digest}


@pytest.mark.parametrize("n", range(counts(2, 50)))
def test_signal_at_any_moment_leaves_a_run_that_resumes_bitwise(n, tmp_path, straight):
    from codex_nb.train.checkpoint import latest_checkpoint

    rng, folder = random.Random(n), tmp_path / "runs" / "stopped"
    sent = (signal.SIGTERM, signal.SIGINT)[n % 2]
    p = launch(folder, tmp_path)
    if n % 3:  # some time after training has begun
        wait_until(has_begun(folder, p))
        time.sleep(rng.uniform(0, 1.5))
    else:  # at any time, start included
        time.sleep(rng.uniform(1, 9))
    p.send_signal(sent)
    out, err = p.communicate(timeout=120)
    if p.returncode == 0:  # it had ended already
        assert "finished: " in out
        assert result(folder) == straight
        return
    assert p.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[sent], (p.returncode, err)
    assert "Traceback" not in err and "zmq" not in err.lower(), err
    assert kernels(folder) == []
    if not folder.exists():  # the run had not begun
        assert "stopped by" in err or "nothing was written" in err or "stopping" in err, err
        return
    newest, skipped = latest_checkpoint(folder / "checkpoints")
    assert skipped == []
    if newest:  # it is that of the last step
        assert int(newest.path.name[5:]) == train_steps(folder)[-1]
    else:
        assert not train_steps(folder)
    if not (folder / "config.json").exists():
        return
    again = codex("resume", folder, home=tmp_path)
    assert again.returncode == 0, again.stderr
    assert train_steps(folder) == list(range(1, STEPS + 1))
    assert result(folder) == straight


def test_closed_terminal_stops_a_run_as_a_signal_does(tmp_path):
    from codex_nb.train.checkpoint import latest_checkpoint

    folder = tmp_path / "runs" / "hung-up"
    ours, theirs = pty.openpty()

    def own_terminal():
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    command = [BIN / "codex-nb", *training(folder, 100_000)[1:]]
    ends = dict(stdin=theirs, stdout=theirs, stderr=theirs)
    p = subprocess.Popen(command, env=environment(tmp_path), preexec_fn=own_terminal, **ends)
    os.close(theirs)
    os.set_blocking(ours, False)

    def begun():
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 65536)  # a terminal that nobody reads would hold the run up
        return has_checkpoint(folder, p)()

    wait_until(begun)
    os.close(ours)
    assert p.wait(60) == 129
    newest, _ = latest_checkpoint(folder / "checkpoints")
    assert int(newest.path.name[5:]) == train_steps(folder)[-1]
    assert kernels(folder) == []


def test_second_signal_ends_at_once(tmp_path):
    folder = tmp_path / "runs" / "twice"
    p = launch(folder, tmp_path, 100_000)
    wait_until(has_begun(folder, p))
    p.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    p.send_signal(signal.SIGTERM)
    assert p.wait(timeout=20) == 143
    time.sleep(0.5)
    assert kernels(folder) == []


def test_killed_launcher_takes_its_kernel_with_it(tmp_path):
    folder = tmp_path / "runs" / "killed"
    p = launch(folder, tmp_path, fresh=PROVE)
    wait_until(has_checkpoint(folder, p))
    p.kill()
    p.wait()
    again = codex("resume", folder, home=tmp_path)  # waits for the lock by itself
    assert again.returncode == 0, again.stderr
    assert train_steps(folder) == list(range(1, STEPS + 1))


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    "A workspace with a run that SIGTERM has stopped."

    def make(home):
        folder = home / "runs" / "part"
        p = launch(folder, home, fresh=PROVE)
        wait_until(has_checkpoint(folder, p))
        p.send_signal(signal.SIGTERM)
        p.wait(60)

    return shared_folder(tmp_path_factory, "stopped-run", make)


def test_resume_refuses_what_would_make_another_run(stopped, tmp_path):
    from codex_nb.core.artifacts import seal

    shutil.copytree(stopped, tmp_path / "home")
    home = tmp_path / "home"
    folder = home / "runs" / "part"
    refused = codex("resume", folder, "-p", "lr", "0.1", home=home)
    assert refused.returncode == 1 and "lr: part of the run's identity" in refused.stderr
    refused = codex("resume", folder, "-p", "save_every", "7", home=home)
    assert refused.returncode == 1 and "save_every: part of the run" in refused.stderr
    # as if another torch had made the checkpoint
    checkpoint = sorted(folder.glob("checkpoints/step-*"))[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    state["exact"]["torch"] = "1.0"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, "checkpoint", manifest["config"], manifest["parents"], manifest["meta"])
    refused = codex("resume", folder, home=home)
    assert refused.returncode == 1 and "torch was '1.0', now" in refused.stderr
    assert "--allow torch" in refused.stderr and "Traceback" not in refused.stderr
