"""SIGTERM and SIGINT at any moment: a verified checkpoint, the documented exit code, and a run that goes on to the same end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
PROVE = bool(os.environ.get("PROVE"))
SMALL = "-p width 32 -p seq_len 32 -p batch_size 4 -p eval_every 7 -p save_every 9 -p keep_last 2 -p eval_documents 4 -p max_documents 4 -p max_new_tokens 4 -p resamples 100".split()


def start(folder, home, steps=120):
    return subprocess.Popen(
        [
            BIN / "codex-nb",
            "run",
            "train",
            *SMALL,
            "-p",
            "steps",
            str(steps),
            "--folder",
            str(folder),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CODEX_NB_HOME": str(home), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def resume(folder, home, *more):
    return subprocess.run(
        [BIN / "codex-nb", "resume", str(folder), *more],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CODEX_NB_HOME": str(home), "OMP_NUM_THREADS": "1"},
    )


def steps(folder):
    return (
        [
            r["step"]
            for l in (folder / "metrics.ndjson").read_text().splitlines()
            if (r := json.loads(l))["split"] == "train"
        ]
        if (folder / "metrics.ndjson").exists()
        else []
    )


def kernels(folder):
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if (
                f"CODEX_NB_RUN={folder}".encode() in (p / "environ").read_bytes()
                and (p / "stat").read_text().split(")")[1].split()[0] != "Z"
            ):
                found.append(int(p.name))
        except OSError:
            continue
    return found


def digest(folder):
    return {
        n: f["sha256"]
        for n, f in json.loads(
            (folder / "checkpoints" / "step-00000120" / "manifest.json").read_text()
        )["files"].items()
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    home = tmp_path_factory.mktemp("straight")
    p = start(home / "runs" / "straight", home)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    return digest(home / "runs" / "straight")


@pytest.mark.parametrize("n", range(50 if PROVE else 2))
def test_a_signal_at_any_moment(n, tmp_path, straight):
    from codex_nb.train.checkpoint import latest_checkpoint

    rng, folder = random.Random(n), tmp_path / "runs" / "stopped"
    sent = (signal.SIGTERM, signal.SIGINT)[n % 2]
    p = start(folder, tmp_path)
    if n % 3:  # some time after training has begun; otherwise at any time, start included
        end = time.monotonic() + 120
        while time.monotonic() < end and not steps(folder):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.5))
    else:
        time.sleep(rng.uniform(1, 9))
    p.send_signal(sent)
    out, err = p.communicate(timeout=120)
    if p.returncode == 0:
        assert "finished: " in out
        assert digest(folder) == straight
        return  # it had ended already
    assert p.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[sent], (p.returncode, err)
    assert "Traceback" not in err and "zmq" not in err.lower(), err
    assert kernels(folder) == []
    if not folder.exists():
        assert "stopped by" in err or "nothing was written" in err or "stopping" in err, err
        return  # the run had not begun
    newest, skipped = latest_checkpoint(folder / "checkpoints")
    newest = newest and newest.path
    assert skipped == []
    if newest:
        assert int(newest.name[5:]) == steps(folder)[-1], "the checkpoint is that of the last step"
    else:
        assert not steps(folder)
    if not (folder / "config.json").exists():
        return
    again = resume(folder, tmp_path)
    assert again.returncode == 0, again.stderr
    assert steps(folder) == list(range(1, 121)) and digest(folder) == straight


def test_the_second_signal_ends_at_once(tmp_path):
    folder = tmp_path / "runs" / "twice"
    p = start(folder, tmp_path, 100_000)
    end = time.monotonic() + 120
    while time.monotonic() < end and p.poll() is None and not steps(folder):
        time.sleep(0.05)
    p.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    p.send_signal(signal.SIGTERM)
    assert p.wait(timeout=20) == 143
    time.sleep(0.5)
    assert kernels(folder) == []


def test_a_killed_launcher_takes_its_kernel_with_it(tmp_path):
    folder = tmp_path / "runs" / "killed"
    p = start(folder, tmp_path)
    end = time.monotonic() + 120
    while time.monotonic() < end and not list(folder.glob("checkpoints/step-*")):
        time.sleep(0.05)
    p.kill()
    p.wait()
    again = resume(folder, tmp_path)  # waits for the lock by itself
    assert again.returncode == 0, again.stderr
    assert steps(folder) == list(range(1, 121))


def test_what_resume_may_change(tmp_path):
    folder = tmp_path / "runs" / "part"
    p = start(folder, tmp_path)
    end = time.monotonic() + 120
    while time.monotonic() < end and not list(folder.glob("checkpoints/step-*")):
        time.sleep(0.05)
    p.send_signal(signal.SIGTERM)
    p.wait(60)
    refused = resume(folder, tmp_path, "-p", "lr", "0.1")
    assert refused.returncode == 1 and "lr: belongs to what the run is" in refused.stderr
    checkpoint = sorted(folder.glob("checkpoints/step-*"))[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    state["exact"]["torch"] = "1.0"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    from codex_nb.core.artifacts import seal

    seal(checkpoint, "checkpoint", manifest["config"], manifest["parents"], manifest["meta"])
    refused = resume(folder, tmp_path)
    assert (
        refused.returncode == 1
        and "torch was '1.0', now" in refused.stderr
        and "--allow torch" in refused.stderr
        and "Traceback" not in refused.stderr
    )
