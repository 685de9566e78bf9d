"""Several processes: the same samples, the same losses to rounding, resumed with another number, ended by one that dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROVE = bool(os.environ.get("PROVE"))
SMALL = dict(
    steps=12,
    width=32,
    seq_len=32,
    batch_size=8,
    micro_batch=1,
    eval_every=6,
    save_every=6,
    keep_last=9,
    eval_documents=2,
    max_new_tokens=4,
    optimizer="adamw",
    lr=1e-3,
    dtype="fp32",
    products="torch",
    sinks="none",
)


def prepared(home, name, bare=SMALL, **change):
    from codex_nb.experiments.launch import prepare_run

    os.environ["CODEX_NB_HOME"] = str(home)
    try:
        return prepare_run("train", bare | change, home / "runs" / name)
    finally:
        del os.environ["CODEX_NB_HOME"]


def job(config, n, home, restarts=0, program=("-m", "codex_nb.run.recipe"), **env):
    words = (
        [sys.executable, *program]
        if n == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(n),
            "--max-restarts",
            str(restarts),
            *program,
        ]
    )
    return subprocess.Popen(
        [*words, str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"CODEX_NB_HOME": str(home), "OMP_NUM_THREADS": "1"} | env,
    )


def done(*args, **kw):
    p = job(*args, **kw)
    out, err = p.communicate(timeout=240)
    assert p.returncode == 0, err[-3000:]
    return out


def losses(folder):
    return {
        r["step"]: float.fromhex(r["exact"]["loss"])
        for l in (folder / "metrics.ndjson").read_text().splitlines()
        if (r := json.loads(l))["split"] == "train"
    }


def order(folder):
    return json.loads(sorted(folder.glob("checkpoints/*/state.json"))[-1].read_text())["data"][
        "order"
    ]


def close(a, b):
    assert a.keys() == b.keys() and max(abs(a[s] - b[s]) / abs(b[s]) for s in b) < 1e-4, (a, b)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    home = tmp_path_factory.mktemp("one")
    config = prepared(home, "one")
    done(config, 1, home)
    return config.parent


@pytest.mark.parametrize(
    "n,parallel", [(2, "ddp"), (2, "fsdp")] + ([(4, "ddp"), (4, "fsdp")] if PROVE else [])
)
def test_as_one(n, parallel, tmp_path, one):
    config = prepared(tmp_path, "several", parallel=parallel)
    done(config, n, tmp_path)
    assert order(config.parent) == order(one)
    close(losses(config.parent), losses(one))
    from codex_nb.run.run_folder import verify_run

    assert verify_run(config.parent)["ok"] and verify_run(config.parent)["status"] == "finished"


def cut_back(folder, step):  # as if it had been stopped there
    (folder / "manifest.json").unlink()
    for p in folder.glob("checkpoints/step-*"):
        if int(p.name[5:]) > step:
            shutil.rmtree(p)


def test_2_then_1_then_4(tmp_path, one):
    config, allow = (
        prepared(tmp_path, "changing"),
        dict(CODEX_NB_ALLOW="world_size,parallel,threads"),
    )
    done(config, 2, tmp_path)
    cut_back(config.parent, 6)
    refused = job(config, 1, tmp_path)
    _, said = refused.communicate(timeout=120)
    assert refused.returncode == 1 and "world_size was 2, now 1" in said and "--allow" in said, said
    (config.parent / "manifest.json").unlink()  # sealed as failed by the refusal
    out = done(config, 1, tmp_path, **allow)
    assert "going on from step-00000006" in out and "no longer bit for bit: " in out
    close(losses(config.parent), losses(one))
    cut_back(config.parent, 6)
    assert "going on from step-00000006" in done(config, 4, tmp_path, **allow)
    close(losses(config.parent), losses(one))


def files(folder, step):
    return {
        n: f["sha256"]
        for n, f in json.loads(
            (folder / "checkpoints" / f"step-{step:08}" / "manifest.json").read_text()
        )["files"].items()
    }


def test_shares_2_then_4_then_1(tmp_path, one):
    "Each rank writes its share of the optimizer and of the average; other numbers of ranks go on from them."
    config, allow = (
        prepared(tmp_path, "shares", parallel="fsdp", ema=0.9),
        dict(CODEX_NB_ALLOW="world_size,parallel,threads"),
    )
    done(config, 2, tmp_path)
    folder = config.parent
    here = files(folder, 12)
    assert {
        f"{part}/shard-0000{r}-of-00002.safetensors"
        for part in ("optimizer", "ema")
        for r in (1, 2)
    } <= here.keys() and "model.safetensors" in here
    watched = [
        r
        for l in (folder / "metrics.ndjson").read_text().splitlines()
        if (r := json.loads(l))["split"] == "validation_ema"
    ]
    assert [r["step"] for r in watched] == [6, 12]
    close(losses(folder), losses(one))
    cut_back(folder, 6)
    assert "going on from step-00000006" in done(config, 2, tmp_path)
    assert files(folder, 12) == here  # as many ranks: bit for bit
    for n in (4, 1):
        cut_back(folder, 6)
        said = done(config, n, tmp_path, **allow)
        assert "going on from step-00000006" in said and f"world_size was 2, now {n}" in said
        close(losses(folder), losses(one))
    from codex_nb.run.run_folder import verify_run

    assert verify_run(folder)["ok"]


def test_a_share_that_is_lost(tmp_path):
    config = prepared(tmp_path, "lost", parallel="fsdp")
    done(config, 2, tmp_path)
    (
        config.parent
        / "checkpoints"
        / "step-00000012"
        / "optimizer"
        / "shard-00002-of-00002.safetensors"
    ).unlink()
    cut_back(config.parent, 12)
    out = done(config, 2, tmp_path)
    assert (
        "passed over a damaged checkpoint" in out
        and "shard-00002-of-00002.safetensors: missing" in out
        and "going on from step-00000006" in out
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"] if PROVE else ["fsdp"])
def test_an_adapter(parallel, tmp_path, one):
    base = str(one / "checkpoints" / "step-00000012")
    given = {k: v for k, v in SMALL.items() if k not in ("width",)} | dict(
        base=base, adapter="lora", rank=2, data="chat", packing="best-fit"
    )
    folders = []
    for name, n, how in (("alone", 1, "ddp"), ("two", 2, parallel)):
        config = prepared(tmp_path, name, bare=given, parallel=how)
        done(config, n, tmp_path)
        folders.append(config.parent)
    close(losses(folders[1]), losses(folders[0]))
    assert files(folders[1], 12)["tokenizer.json"] == files(one, 12)["tokenizer.json"], (
        "another tokenizer than the base's"
    )
    here = files(folders[1], 12)
    cut_back(folders[1], 6)
    done(config, 2, tmp_path)
    assert files(folders[1], 12) == here


@pytest.mark.skipif(not PROVE, reason="two compilations; in `make prove`")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled(parallel, tmp_path, one):
    config = prepared(tmp_path, "compiled", compile="on", micro_batch=4, parallel=parallel)
    done(config, 2, tmp_path)
    close(losses(config.parent), losses(one))


def test_a_signal_to_all(tmp_path):
    config = prepared(tmp_path, "stopped", steps=100_000, eval_every=10**6, save_every=10**6)
    p = job(config, 2, tmp_path)
    end = time.monotonic() + 120
    while (
        time.monotonic() < end
        and p.poll() is None
        and not (config.parent / "metrics.ndjson").exists()
    ):
        time.sleep(0.05)
    time.sleep(0.7)
    p.send_signal(signal.SIGTERM)
    p.communicate(timeout=60)
    assert p.returncode != 0
    from codex_nb.train.checkpoint import latest_checkpoint

    newest, skipped = latest_checkpoint(config.parent / "checkpoints")
    newest = newest and newest.path
    assert newest and not skipped and int(newest.name[5:]) == max(losses(config.parent))


HURRIED = """
import os, signal, sys
from codex_nb.train.distributed import World, exit_process
from codex_nb.run.recipe import main
gather, steps = World.gather, []
def gather_and_hear(self, value):
    out = gather(self, value)
    if isinstance(value, tuple): steps.append(value)
    if len(steps) == 5 and isinstance(value, tuple) and self.rank == int(os.environ["HEARS"]): os.kill(os.getpid(), signal.SIGTERM)
    return out
World.gather = gather_and_hear
exit_process(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "parallel,rank",
    [("ddp", 1), ("fsdp", 0)] if not PROVE else [(p, r) for p in ("ddp", "fsdp") for r in (0, 1)],
)
def test_a_signal_to_one_when_all_have_just_agreed(parallel, rank, tmp_path):
    "It comes to one rank between the agreement after a step and the beginning of the next: all end together, one step later."
    config = prepared(
        tmp_path, "hurried", steps=100_000, eval_every=10**6, save_every=10**6, parallel=parallel
    )
    (tmp_path / "hurried.py").write_text(HURRIED)
    p = job(config, 2, tmp_path, program=(str(tmp_path / "hurried.py"),), HEARS=str(rank))
    try:
        p.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        raise
    assert p.returncode != 0 and list(losses(config.parent)) == [1, 2, 3, 4, 5, 6]
    assert files(config.parent, 6)


def test_a_rank_that_dies_ends_the_job(tmp_path):
    config = prepared(tmp_path, "dying", steps=100_000, eval_every=10**6, save_every=20)
    p = job(config, 2, tmp_path)
    end = time.monotonic() + 120
    while (
        time.monotonic() < end
        and p.poll() is None
        and not list(config.parent.glob("checkpoints/step-*"))
    ):
        time.sleep(0.05)
    import psutil

    ranks = [
        c for c in psutil.Process(p.pid).children(recursive=True) if c.environ().get("RANK") == "1"
    ]
    ranks[0].kill()
    began = time.monotonic()
    out, err = p.communicate(timeout=60)
    assert p.returncode != 0 and time.monotonic() - began < 40
    assert "rank" in err and "SIGKILL" in err, err[-2000:]


def test_from_the_notebook_with_a_restart(tmp_path):
    "`nproc 2` in a launched notebook; one process is killed once, and the job goes on from its last checkpoint."
    from test_launch import ROOT

    folder = tmp_path / "runs" / "two"
    words = [
        Path(sys.executable).parent / "codex-nb",
        "run",
        "train",
        "--folder",
        str(folder),
        *(
            w
            for k, v in (
                SMALL
                | dict(
                    steps=400,
                    eval_every=1000,
                    save_every=20,
                    nproc=2,
                    restarts=1,
                    max_documents=4,
                    resamples=100,
                )
            ).items()
            for w in ("-p", f"{k}={json.dumps(v) if not isinstance(v, str) else v}")
        ),
    ]
    p = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CODEX_NB_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    import psutil

    end = time.monotonic() + 120
    while (
        time.monotonic() < end and p.poll() is None and not list(folder.glob("checkpoints/step-*"))
    ):
        time.sleep(0.02)
    ranks = [
        c for c in psutil.Process(p.pid).children(recursive=True) if c.environ().get("RANK") == "1"
    ]
    for c in ranks:
        c.kill()
    out, err = p.communicate(timeout=240)
    assert p.returncode == 0, err[-3000:] + out[-2000:]
    assert list(losses(folder)) == list(range(1, 401)) and (
        not ranks or "going on from step-" in out
    )


JOIN = """
import sys, time
from codex_nb.train.distributed import init_distributed
time.sleep(float(sys.argv[1]))
with init_distributed(seconds=20) as world: print("met", world.all_gather(world.rank))
"""


def test_restarted_ranks_do_not_call_those_before(tmp_path):
    "All attempts use the table that torchrun keeps; one process comes late."
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in range(12 if PROVE else 4):
        env = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "WORLD_SIZE": "2",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "TORCHELASTIC_MAX_RESTARTS": "1",
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", JOIN, str(rank)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env | {"RANK": str(rank)},
            )
            for rank in (0, 1)
        ]
        said = [p.communicate(timeout=120) for p in ranks]
        assert [out for out, _ in said] == ["met [0, 1]\n"] * 2, said
    over = subprocess.run(
        [sys.executable, "-c", JOIN, "0"],
        capture_output=True,
        text=True,
        env=env | {"RANK": "0", "GROUP_WORLD_SIZE": "2"},
    )
    assert over.returncode and "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in over.stderr


def test_none_outlives_the_notebook(tmp_path):
    import psutil
    from test_launch import ROOT

    folder = tmp_path / "runs" / "two"
    words = [
        Path(sys.executable).parent / "codex-nb",
        "run",
        "train",
        "--folder",
        str(folder),
        *(
            w
            for k, v in (
                SMALL | dict(steps=100_000, eval_every=10**6, save_every=20, nproc=2)
            ).items()
            for w in ("-p", f"{k}={json.dumps(v) if not isinstance(v, str) else v}")
        ),
    ]
    p = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CODEX_NB_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    end = time.monotonic() + 120
    while (
        time.monotonic() < end and p.poll() is None and not list(folder.glob("checkpoints/step-*"))
    ):
        time.sleep(0.02)
    below = psutil.Process(p.pid).children(recursive=True)
    assert len([c for c in below if "RANK" in c.environ()]) == 2
    p.kill()
    p.wait()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not [c for c in alive if c.status() != psutil.STATUS_ZOMBIE]


IP = shutil.which("ip") or "/sbin/ip"


def _namespaces():
    try:
        return (
            subprocess.run([IP, "netns", "add", "codex-nb-probe"], capture_output=True).returncode
            == 0
            and subprocess.run(
                [IP, "netns", "del", "codex-nb-probe"], capture_output=True
            ).returncode
            == 0
        )
    except OSError:
        return False


@pytest.mark.skipif(
    not _namespaces(), reason="no network namespaces allowed here, or iproute2 is missing"
)
def test_two_hosts(tmp_path, one):
    "Two network namespaces joined by a cable: each is a host with one process."
    names, tag = [f"cnb{os.getpid()}{x}" for x in "ab"], os.getpid() % 1000

    def ip(*words):
        subprocess.run([IP, *words], check=True, capture_output=True)

    config = prepared(tmp_path, "hosts")
    for n in names:
        ip("netns", "add", n)
    try:
        ip(
            "link",
            "add",
            f"va{tag}",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            f"vb{tag}",
            "netns",
            names[1],
        )
        for n, dev, address in (
            (names[0], f"va{tag}", "10.99.7.1/24"),
            (names[1], f"vb{tag}", "10.99.7.2/24"),
        ):
            ip("-n", n, "addr", "add", address, "dev", dev)
            for d in (dev, "lo"):
                ip("-n", n, "link", "set", d, "up")

        def host(i, dev):
            return subprocess.Popen(
                [
                    IP,
                    "netns",
                    "exec",
                    names[i],
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nnodes",
                    "2",
                    "--node-rank",
                    str(i),
                    "--nproc-per-node",
                    "1",
                    "--master-addr",
                    "10.99.7.1",
                    "--master-port",
                    "29577",
                    "-m",
                    "codex_nb.run.recipe",
                    str(config),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ
                | {
                    "CODEX_NB_HOME": str(tmp_path),
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": dev,
                },
            )

        hosts = [host(0, f"va{tag}"), host(1, f"vb{tag}")]
        said = [p.communicate(timeout=180)[1] for p in hosts]
        assert [p.returncode for p in hosts] == [0, 0], said
        close(losses(config.parent), losses(one))
    finally:
        for n in names:
            subprocess.run([IP, "netns", "del", n], capture_output=True)
