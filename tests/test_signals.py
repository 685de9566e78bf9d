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
    command,
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


@pytest.mark.parametrize("n", range(counts(1, 50)))
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


@pytest.mark.skipif(not PROVE, reason="SIGHUP is handled as the signals above; in `make prove`")
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


def reseal(checkpoint, change):
    "Change the state of a checkpoint, as if it had been made elsewhere."
    from codex_nb.core.artifacts import seal

    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, "checkpoint", manifest["config"], manifest["parents"], manifest["meta"])


def from_elsewhere(stopped, to, change):
    "The stopped run, on another machine than that of its record and its last checkpoint."
    shutil.copytree(stopped, to)
    folder = to / "runs" / "part"
    reseal(sorted(folder.glob("checkpoints/step-*"))[-1], change)
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"machine": "another"}))
    return folder


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_resume_refuses_what_would_make_another_run(stopped, tmp_path):
    from codex_nb.run.run_folder import run_status

    home = tmp_path / "home"
    folder = from_elsewhere(stopped, home, lambda state: state["exact"].update(torch="1.0"))
    before = contents(folder)
    refused = codex("resume", folder, "-p", "lr", "0.1", home=home)
    assert refused.returncode == 1 and "lr: part of the run's identity" in refused.stderr
    refused = codex("resume", folder, "-p", "save_every", "7", home=home)
    assert refused.returncode == 1 and "save_every: part of the run" in refused.stderr
    refused = codex("resume", folder, home=home)
    assert refused.returncode == 1 and "torch was '1.0', now" in refused.stderr
    assert "--allow torch" in refused.stderr and "Traceback" not in refused.stderr
    assert "go on with" not in refused.stderr  # it would be refused again
    assert contents(folder) == before and run_status(folder) == "interrupted"
    done = codex("resume", folder, "--allow", "torch", home=home)
    assert done.returncode == 0 and "no longer bit for bit: torch was" in done.stdout, done.stderr


def set_in(*path):
    def change(state):
        inner = state
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = "another"

    return change


EXACT = (
    "cpu",
    "instructions",
    "threads",
    "torch",
    "world_size",
    "parallel",
    "dtype",
    "micro_batch",
)
REFUSED = {
    **{f"exact {name}": set_in("exact", name) for name in EXACT},
    "data": set_in("data", "order"),
    "schedule": set_in("schedule", "total_steps"),
    "identity": set_in("identity", "seed"),
    "incomplete": lambda state: state.pop("rng"),
    "a generator": lambda state: state["rng"][0].pop("torch"),
    "no generators": lambda state: state.update(rng=0),
    "scaler": set_in("scaler", "kind"),
}


@pytest.mark.parametrize("kind", random.Random(1).sample(sorted(REFUSED), counts(3, len(REFUSED))))
def test_refused_resume_changes_no_file(kind, stopped, tmp_path):
    "As a cluster resumes it, and a notebook: the same run is refused and stays as it was."
    from codex_nb.run.run_folder import run_status

    folder = from_elsewhere(stopped, tmp_path / "home", REFUSED[kind])
    before = contents(folder)
    words = ["python", "-m", "codex_nb.run.recipe", folder / "config.json"]
    refused = command(*words, home=tmp_path / "home")
    assert refused.returncode == 1 and "CheckpointError" in refused.stderr.replace(
        "InexactResumeError", "CheckpointError"
    ), refused.stderr
    assert contents(folder) == before and run_status(folder) == "interrupted"


def kill_kernel(process, folder, condition):
    "Kill a run's kernel as the out-of-memory killer does; the lines that its launcher ends with."
    wait_until(condition)
    for number in kernels(folder):
        if b"ipykernel" in Path(f"/proc/{number}/cmdline").read_bytes():
            os.kill(number, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    return process.returncode, err.strip().splitlines()


def test_killed_kernel_is_one_line_with_the_memory_there_was(tmp_path):
    folder = tmp_path / "runs" / "killed"
    run = launch(folder, tmp_path, 100_000)
    code, lines = kill_kernel(run, folder, has_checkpoint(folder, run))
    (line,) = lines
    assert code == 75 and "GiB were available; the run is interrupted" in line
    assert line.endswith(f"go on with: codex-nb resume {folder}")
    if not PROVE:
        return
    known = len(train_steps(folder))
    run = start("codex-nb", "resume", folder, home=tmp_path, session=True)
    code, (line,) = kill_kernel(
        run, folder, lambda: run.poll() is not None or len(train_steps(folder)) > known
    )
    assert code == 75 and line.endswith(f"go on with: codex-nb resume {folder}")


@pytest.mark.skipif(not PROVE, reason="the launcher of a trial is that of a run, the test above")
def test_sweep_whose_trial_is_killed_can_be_resumed(tmp_path):
    folder = tmp_path / "runs" / "rates"
    words = ["codex-nb", "sweep", "train", *flags(SMALL | dict(steps=5000)), "-g", "seed=0,1"]
    sweep = start(*words, "--folder", folder, home=tmp_path, session=True)
    trial = tmp_path / "runs" / "rates-trial-000"
    code, (line,) = kill_kernel(sweep, trial, has_begun(trial, sweep))
    assert code == 75 and "trial 0: the kernel was killed" in line
    assert line.endswith(f"go on with: codex-nb resume {folder}")
    assert not (folder / "manifest.json").exists()
