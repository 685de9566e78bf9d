"""Checkpoints under attack: kills, faults at every file operation, flipped bits, cut files, full disks, random histories of saving and pruning."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
import torch

PROVE = bool(os.environ.get("PROVE"))
N = lambda small, full: full if PROVE else small

from codex_nb.core.artifacts import ArtifactError, problems
from codex_nb.model.causal_lm import ModelConfig, build_model
from codex_nb.train.checkpoint import (
    ResumeMetadata,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    snapshot,
    write_checkpoint,
)
from codex_nb.train.optim import OptimConfig, make_optimizer
from codex_nb.train.retention import CheckpointConfig, plan, prune


def make(folder):
    "A model and optimizer after a step, and a folder that looks like a tokenizer's."
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    for n in ("tokenizer.json", "tokenizer_config.json"):
        (folder / n).write_text("{}")
    model = build_model(ModelConfig(width=16, layers=1, heads=2, seq_len=8), 32, 0, 0)
    optimizer = make_optimizer(model, OptimConfig())
    model(input_ids=torch.randint(1, 32, (2, 8)), use_cache=False).logits.square().mean().backward()
    optimizer.step()
    return model, optimizer, folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tokenizer"))


def standing(step):
    return ResumeMetadata(
        {"step": step, "position": step, "tokens": step},
        {"total_steps": 9},
        {"tokens": "d"},
        {"seed": 0},
    )


def save(path, made, step=1, meta=None):
    model, optimizer, folder = made
    return write_checkpoint(path, snapshot(model, optimizer, folder, standing(step)), {}, meta)


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
    save(tmp_path / "step-00000001", made, 1)
    save(tmp_path / "step-00000002", made, 2)
    whole = tmp_path / "kept"
    shutil.copytree(tmp_path / "step-00000002", whole)
    model, optimizer, _ = made
    for i in range(N(60, 500)):
        rng = random.Random(i)
        f = damage(tmp_path / "step-00000002", rng, kind)
        newest, skipped = latest_checkpoint(tmp_path)
        newest = newest and newest.path
        assert (
            newest == tmp_path / "step-00000001"
            and len(skipped) == 1
            and "step-00000002" in skipped[0]
        ), (i, f)
        with pytest.raises(ArtifactError):
            load_checkpoint(tmp_path / "step-00000002", model, optimizer, standing(2))
        shutil.copyfile(whole / f.name, f)
    assert latest_checkpoint(tmp_path)[0].path == tmp_path / "step-00000002"


FAULTS = textwrap.dedent("""
    import os, sys, builtins, pathlib, shutil
    sys.path.insert(0, sys.argv[1])
    import test_checkpoint as t
    t.torch.set_num_threads(1)
    folder = pathlib.Path(sys.argv[2])
    made = t.make(folder.parent/"tokenizer")
    count, at, how = 0, -1, ""
    def tick():
        global count
        count += 1
        if count == at:
            if how == "exit": os._exit(9)
            raise OSError(28, "No space left on device")
    def guard(module, name):
        real = getattr(module, name)
        def f(*a, **k): tick(); return real(*a, **k)
        setattr(module, name, f)
    for m, n in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "copyfile"), (os, "mkdir"), (pathlib.Path, "write_text"), (pathlib.Path, "chmod")): guard(m, n)
    real_open = builtins.open
    def opening(f, mode="r", *a, **k):
        if any(c in mode for c in "wxa+"): tick()
        return real_open(f, mode, *a, **k)
    builtins.open = opening
    for line in sys.stdin: # a fault: at which operation, and how; each in a process of its own
        at, how = int(line.split()[0]), line.split()[1]
        pid = os.fork()
        if pid:
            print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
            continue
        try: t.save(folder/"step-00000002", made, 2)
        except OSError as e: print("said", type(e).__name__, e, flush=True)
        print("operations", count, flush=True)
        os._exit(0)
""")


def test_a_fault_at_every_operation_of_a_save(made, tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder / "step-00000001", made, 1)
    p = subprocess.Popen(
        [sys.executable, "-c", FAULTS, str(Path(__file__).parent), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def fault(at, how):
        p.stdin.write(f"{at} {how}\n")
        p.stdin.flush()
        said = []
        while not said or not said[-1].startswith("ended"):
            said.append(p.stdout.readline())
        return int(said[-1].split()[1]), "".join(said[:-1])

    code, out = fault(-1, "none")
    total, there = int(out.split()[-1]), folder / "step-00000002"
    assert code == 0 and total > 20 and problems(there) == []
    shutil.rmtree(there)
    seen = set()
    for how in ("error", "exit"):
        for at in range(1, total + 1):
            code, out = fault(at, how)
            assert code == (9 if how == "exit" else 0), (how, at, out)
            if there.exists():
                assert problems(there) == [], (how, at)  # whole, or not there
            elif how == "error":
                assert "said DiskError" in out and "bytes free" in out, (at, out)
            seen.add(there.exists())
            assert (
                latest_checkpoint(folder)[0] is not None
                and problems(folder / "step-00000001") == []
            )
            shutil.rmtree(there, ignore_errors=True)
    assert seen == {True, False}
    p.stdin.close()
    p.wait()


LOOP = textwrap.dedent("""
    import os, sys
    sys.path.insert(0, sys.argv[1])
    import test_checkpoint as t
    from pathlib import Path
    from codex_nb.train.async_checkpoint import AsyncCheckpointer
    t.torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    model, optimizer, tok = t.make(folder.parent/"tokenizer")
    def published(a): print(a.path.name, flush=True); t.prune(folder, t.CheckpointConfig(keep_last=2))
    def train():
        saver, step = AsyncCheckpointer(after=published), max([int(p.name[5:]) for p in t.checkpoints(folder)], default=0)
        while True:
            step += 1
            saver.save(folder/f"step-{step:08}", lambda buffers: t.snapshot(model, optimizer, tok, t.standing(step), buffers=buffers), {})
    for line in sys.stdin: # each in a process of its own
        pid = os.fork()
        if pid == 0: train()
        print("pid", pid, flush=True)
        os.waitpid(pid, 0)
        print("ended", flush=True)
""")


def test_killed_while_saving(tmp_path):
    "No acknowledged checkpoint is lost, and there is always one that is whole."
    folder, rng = tmp_path / "checkpoints", random.Random(0)
    folder.mkdir()
    p = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(Path(__file__).parent), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for i in range(N(10, 200)):
        p.stdin.write("go\n")
        p.stdin.flush()
        pid, said = None, []
        while not pid or not said:
            line = p.stdout.readline()
            if line.startswith("pid"):
                pid = int(line.split()[1])
            else:
                said.append(line)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        while said[-1] != "ended\n":
            said.append(p.stdout.readline())
        acknowledged = max(int(s.strip()[5:]) for s in said if s.startswith("step-"))
        newest, skipped = latest_checkpoint(folder)
        newest = newest and newest.path
        assert newest is not None and int(newest.name[5:]) >= acknowledged and not skipped, (
            i,
            newest,
            acknowledged,
            skipped,
        )
    from codex_nb.core.artifacts import clear_leftovers

    clear_leftovers(folder)
    assert not list(folder.glob(".tmp-*"))
    p.stdin.close()
    p.wait()


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="no mount namespace allowed here",
)
def test_a_full_disk_leaves_the_old_one(tmp_path):
    script = textwrap.dedent("""
        import sys, pathlib
        sys.path.insert(0, sys.argv[2])
        import test_checkpoint as t
        from codex_nb.core.artifacts import DiskError, problems
        made = t.make(pathlib.Path(sys.argv[1])/"tokenizer")
        room = pathlib.Path("/mnt")
        t.save(room/"step-00000001", made, 1)
        size = sum(f.stat().st_size for f in (room/"step-00000001").iterdir())
        for i in range(int(sys.argv[3])):
            free = __import__("shutil").disk_usage(room).free
            filler = room/"filler"
            filler.write_bytes(bytes(max(0, free-4096*(1+i*size//4096//int(sys.argv[3])))))
            try: t.save(room/"step-00000002", made, 2); sys.exit("it fitted")
            except DiskError as e: assert "/mnt/step-00000002" in str(e) and "bytes free" in str(e), e
            assert not (room/"step-00000002").exists() and problems(room/"step-00000001") == [] and not list(room.glob(".tmp-*"))
            filler.unlink()
        t.save(room/"step-00000002", made, 2)
        print("all", int(sys.argv[3]))
    """)
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            'mount -t tmpfs -o size=4m tmpfs /mnt && exec "$@"',
            "sh",
            sys.executable,
            "-c",
            script,
            str(tmp_path),
            str(Path(__file__).parent),
            "20",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "all 20" in done.stdout, done.stderr


from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)


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
        from codex_nb.core.artifacts import publish

        self.step += 1
        with publish(
            self.folder / f"step-{self.step:08}", "checkpoint", config={"step": self.step}
        ) as d:
            (d.path / "model.safetensors").write_text(f"weights {self.step}")
            d.meta.update(step=self.step, metrics={"validation.loss": loss})

    @precondition(lambda self: checkpoints(self.folder))
    @rule(i=st.integers(0, 99), cut=st.booleans())
    def corrupt(self, i, cut):
        there = checkpoints(self.folder)
        if len(self.undamaged()) < 2:
            return  # leave one to stand on
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
        resumed_from = there[i % len(there)].name if there else None
        cfg = CheckpointConfig(keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
        said = plan(self.folder, cfg, {resumed_from} if resumed_from else ())
        made = prune(self.folder, cfg, {resumed_from} if resumed_from else ())
        assert [(v.path, v.keep) for v in said] == [(v.path, v.keep) for v in made]
        after = checkpoints(self.folder)
        assert after == [v.path for v in made if v.keep]
        if before:
            assert max(before) in self.undamaged()
        if resumed_from:
            assert self.folder / resumed_from in after

    @invariant()
    def one_is_whole(self):
        if self.step:
            assert self.undamaged()


def test_histories():
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=N(40, 1000),
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
