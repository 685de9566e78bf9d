"""Checkpoints under attack: kills, faults at file operations, damage, full disks, histories."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from helpers import PROGRAMS, counts, environment, start
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from small_checkpoint import make, metadata, save

from codex_nb.core.artifacts import ArtifactError, clear_leftovers, problems, publish
from codex_nb.train.checkpoint import checkpoints, latest_checkpoint, load_checkpoint
from codex_nb.train.retention import CheckpointConfig, plan, prune


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tokenizer"))


def damage(path, rng, kind):
    "Flip a bit of, or cut, one file of a checkpoint."
    f = rng.choice(sorted(p for p in path.iterdir() if p.stat().st_size))
    data = bytearray(f.read_bytes())
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        data = data[: rng.randrange(len(data))]
    f.write_bytes(data)
    return f


@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_no_damage_is_silent(kind, made, tmp_path):
    first, second = tmp_path / "step-00000001", tmp_path / "step-00000002"
    save(first, made, 1)
    save(second, made, 2)
    shutil.copytree(second, tmp_path / "kept")
    model, optimizer, _ = made
    for i in range(counts(60, 500)):
        f = damage(second, random.Random(i), kind)
        newest, skipped = latest_checkpoint(tmp_path)
        assert newest and newest.path == first, (i, f)
        assert len(skipped) == 1 and "step-00000002" in skipped[0], (i, f)
        with pytest.raises(ArtifactError):
            load_checkpoint(second, model, optimizer, metadata(2))
        shutil.copyfile(tmp_path / "kept" / f.name, f)
    assert latest_checkpoint(tmp_path)[0].path == second


def test_fault_at_any_operation_of_a_save_leaves_a_whole_checkpoint_or_none(made, tmp_path):
    folder = tmp_path / "checkpoints"
    old, new = folder / "step-00000001", folder / "step-00000002"
    save(old, made, 1)
    p = start("python", PROGRAMS / "save_with_faults.py", folder, home=tmp_path)

    def fault(at, how):
        "Exit code and output of a save with a fault."
        p.stdin.write(f"{at} {how}\n")
        p.stdin.flush()
        lines = []
        while not lines or not lines[-1].startswith("ended"):
            lines.append(p.stdout.readline())
            assert lines[-1], p.stderr.read()
        return int(lines[-1].split()[1]), "".join(lines[:-1])

    code, out = fault(-1, "none")
    total = int(out.split()[-1])
    assert code == 0 and total > 20 and problems(new) == []
    shutil.rmtree(new)
    seen = set()
    for how in ("error", "exit"):
        for at in range(1, total + 1):
            code, out = fault(at, how)
            assert code == (9 if how == "exit" else 0), (how, at, out)
            if new.exists():
                assert problems(new) == [], (how, at)
            elif how == "error":
                assert "error DiskError" in out and "bytes free" in out, (at, out)
            seen.add(new.exists())
            assert latest_checkpoint(folder)[0] is not None and problems(old) == []
            shutil.rmtree(new, ignore_errors=True)
    assert seen == {True, False}
    p.stdin.close()
    p.wait()


def test_kill_while_saving_loses_no_acknowledged_checkpoint(tmp_path):
    folder, rng = tmp_path / "checkpoints", random.Random(0)
    folder.mkdir()
    p = start("python", PROGRAMS / "save_forever.py", folder, home=tmp_path)
    for i in range(counts(10, 200)):
        p.stdin.write("go\n")
        p.stdin.flush()
        pid, names = None, []
        while not pid or not names:
            line = p.stdout.readline()
            assert line, p.stderr.read()
            if line.startswith("pid"):
                pid = int(line.split()[1])
            else:
                names.append(line)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        while names[-1] != "ended\n":
            names.append(p.stdout.readline())
        acknowledged = max(int(n.strip()[5:]) for n in names if n.startswith("step-"))
        newest, skipped = latest_checkpoint(folder)
        assert newest is not None and not skipped, (i, skipped)
        assert int(newest.path.name[5:]) >= acknowledged, i
    clear_leftovers(folder)
    assert not list(folder.glob(".tmp-*"))
    p.stdin.close()
    p.wait()


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="no mount namespace allowed here",
)
def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    small_disk = 'mount -t tmpfs -o size=4m tmpfs /mnt && exec "$@"'
    words = ["unshare", "--mount", "sh", "-c", small_disk, "sh", sys.executable]
    done = subprocess.run(
        [*words, PROGRAMS / "save_on_a_full_disk.py", tmp_path, "20"],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
    )
    assert done.returncode == 0 and "all 20" in done.stdout, done.stderr


class Histories(RuleBasedStateMachine):
    "Saving, damaging and pruning in any order."

    def __init__(self):
        super().__init__()
        self.folder, self.step = Path(tempfile.mkdtemp()), 0

    def teardown(self):
        shutil.rmtree(self.folder)

    def undamaged(self):
        return {p for p in checkpoints(self.folder) if not problems(p)}

    @rule(loss=st.floats(0.1, 9))
    def save(self, loss):
        self.step += 1
        path = self.folder / f"step-{self.step:08}"
        with publish(path, "checkpoint", config={"step": self.step}) as d:
            (d.path / "model.safetensors").write_text(f"weights {self.step}")
            d.meta.update(step=self.step, metrics={"validation.loss": loss})

    @precondition(lambda self: checkpoints(self.folder))
    @rule(i=st.integers(0, 99), cut=st.booleans())
    def corrupt(self, i, cut):
        if len(self.undamaged()) < 2:  # leave one to go on from
            return
        there = checkpoints(self.folder)
        f = there[i % len(there)] / ("manifest.json" if cut else "model.safetensors")
        if f.exists():
            f.write_bytes(f.read_bytes()[:-1])

    @rule(
        keep_last=st.integers(1, 3),
        keep_best=st.integers(0, 2),
        keep_every=st.sampled_from([None, 2, 3]),
        i=st.integers(0, 99),
    )
    def prune(self, keep_last, keep_best, keep_every, i):
        before, there = self.undamaged(), checkpoints(self.folder)
        protected = {there[i % len(there)].name} if there else set()
        cfg = CheckpointConfig(keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
        planned = plan(self.folder, cfg, protected)
        done = prune(self.folder, cfg, protected)
        assert [(v.path, v.keep) for v in planned] == [(v.path, v.keep) for v in done]
        after = checkpoints(self.folder)
        assert after == [v.path for v in done if v.keep]
        if before:
            assert max(before) in self.undamaged()
        assert {self.folder / name for name in protected} <= set(after)

    @invariant()
    def one_is_undamaged(self):
        if self.step:
            assert self.undamaged()


def test_no_history_of_saves_damage_and_pruning_loses_the_last_checkpoint():
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=counts(15, 1000),
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
