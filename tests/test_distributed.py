"""Several processes: the same samples, losses equal to rounding, another number when resumed.

`make test` forks the ranks itself; torchrun starts them where its own behaviour counts (signals, a
rank that dies, restarts), and everywhere in `make prove`. What torchrun starts in `make test` is a
process that has a rank forked, hands its signals on, and ends as it ends.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import warm
from helpers import (
    BIN,
    PROGRAMS,
    PROVE,
    TESTS,
    checkpoint_files,
    command,
    counts,
    environment,
    flags,
    free_port,
    read_lines,
    shared_folder,
    start,
    train_losses,
    wait_until,
)

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
LONG = dict(steps=100_000, eval_every=10**6, save_every=10**6)
ALLOW = "world_size,parallel,threads"
RECIPE = ("-m", "codex_nb.run.recipe")


def prepared(home, name, bare=SMALL, **change):
    "The `config.json` of a run that has not begun."
    from codex_nb.experiments.launch import prepare_run

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODEX_NB_HOME", str(home))
        return prepare_run("train", bare | change, home / "runs" / name)


def ranks_are_forked():
    "Variables by which torchrun starts its ranks as processes of the server of tests/warm.py."
    if PROVE:
        return {}
    python = TESTS / "ranks" / "python"
    path = f"{BIN}:{os.environ['PATH']}"
    return {"PYTHON_EXEC": str(python), "WARM_SERVER": warm.server(), "PATH": path}


def torchrun(config, n, home, program=RECIPE, **env):
    "A job of `n` ranks, started."
    env = ranks_are_forked() | env
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return start(
        "python", *words, "--max-restarts", "0", *program, config, home=home, session=True, **env
    )


def forked_ranks(config, n, home, program=RECIPE, together=True, **env):
    """Exit codes and outputs of `n` forked ranks.

    When one fails the others are ended, unless they are to end by themselves.
    """
    port, ranks, files = free_port(), [], []
    for rank in range(n):
        files.append([open(home / f"rank-{rank}.{kind}", "w+") for kind in ("out", "err")])
        more = dict(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(n),
            LOCAL_WORLD_SIZE=str(n),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        argv = [sys.executable, *program, config]
        ranks.append(warm.Warm(argv, home, environment(home, **env | more), None, *files[rank]))
    end = time.monotonic() + 240
    while None in (codes := [r.poll() for r in ranks]) and not (together and any(codes)):
        assert time.monotonic() < end, "the ranks did not end"
        time.sleep(0.02)
    for r in ranks:
        r.kill()
        r.wait()
    texts = [[(f.seek(0), f.read())[1] for f in pair] for pair in files]
    return [r.returncode for r in ranks], texts


def train_on(n, config, home, **env):
    "Train on `n` processes to the end; what was printed."
    if n == 1:
        done = command("python", *RECIPE, config, home=home, **env)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    if PROVE:
        job = torchrun(config, n, home, **env)
        out, err = job.communicate(timeout=240)
        assert job.returncode == 0, err[-3000:]
        return out
    codes, texts = forked_ranks(config, n, home, **env)
    assert not any(codes), (codes, [err[-2000:] for _, err in texts])
    return "".join(out for out, _ in texts)


def sample_order(folder):
    last = sorted(folder.glob("checkpoints/*/state.json"))[-1]
    return json.loads(last.read_text())["data"]["order"]


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    worst = max(abs(ours[s] - theirs[s]) / abs(theirs[s]) for s in theirs)
    assert worst < 1e-4, (ours, theirs)


def cut_back(folder, step):
    "Make a finished run look as if it had been stopped at `step`."
    (folder / "manifest.json").unlink()
    for p in folder.glob("checkpoints/step-*"):
        if int(p.name[5:]) > step:
            shutil.rmtree(p)


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    "The run folder of the same training on one process."

    def make(home):
        train_on(1, prepared(home, "one"), home)

    return shared_folder(tmp_path_factory, "one-process", make) / "runs" / "one"


@pytest.mark.parametrize(
    "n,parallel", [(2, "ddp"), (2, "fsdp")] + ([(4, "ddp"), (4, "fsdp")] if PROVE else [])
)
def test_ranks_take_the_same_samples_to_the_same_losses(n, parallel, tmp_path, alone):
    from codex_nb.experiments.verify import verify_run

    config = prepared(tmp_path, "several", parallel=parallel)
    train_on(n, config, tmp_path)
    assert sample_order(config.parent) == sample_order(alone)
    assert_close(train_losses(config.parent), train_losses(alone))
    verified = verify_run(config.parent)
    assert verified["ok"] and verified["status"] == "finished"


def test_resume_on_1_and_on_4_processes_after_2(tmp_path, alone):
    config = prepared(tmp_path, "changing")
    train_on(2, config, tmp_path)
    cut_back(config.parent, 6)
    refused = command("python", *RECIPE, config, home=tmp_path)
    assert refused.returncode == 1 and "--allow" in refused.stderr, refused.stderr
    assert "world_size was 2, now 1" in refused.stderr
    (config.parent / "manifest.json").unlink(missing_ok=True)
    out = train_on(1, config, tmp_path, CODEX_NB_ALLOW=ALLOW)
    assert "resuming from step-00000006" in out and "no longer bit for bit: " in out
    assert_close(train_losses(config.parent), train_losses(alone))
    cut_back(config.parent, 6)
    out = train_on(4, config, tmp_path, CODEX_NB_ALLOW=ALLOW)
    assert "resuming from step-00000006" in out
    assert_close(train_losses(config.parent), train_losses(alone))


def test_portable_training_is_bitwise_on_any_number_of_processes(tmp_path):
    def tensors(folder):
        files = checkpoint_files(folder, 12)
        return {n: digest for n, digest in files.items() if n.endswith(".safetensors")}

    files = []
    for n, micro_batch in ((1, 4), (2, 1)) + (((4, 2),) if PROVE else ()):
        change = dict(determinism="portable", micro_batch=micro_batch, optimizer="muon")
        config = prepared(tmp_path, f"on-{n}", **change)
        train_on(n, config, tmp_path)
        files.append(tensors(config.parent))
    assert files[0] and all(found == files[0] for found in files[1:])
    # and a run that began on several processes goes on alone, without being allowed to
    cut_back(config.parent, 6)
    assert "resuming from step-00000006" in train_on(1, config, tmp_path)
    assert tensors(config.parent) == files[0]


@pytest.mark.parametrize("n", [3, 4] if PROVE else [4])
def test_resume_is_bitwise_where_gradients_are_sent_in_several_parts(n, tmp_path):
    "DDP divides more than 1 MB anew after its first backward pass: sums have another order then."
    config = prepared(tmp_path, "parts", width=256, batch_size=12, micro_batch=None)
    train_on(n, config, tmp_path)
    first = checkpoint_files(config.parent, 12)
    cut_back(config.parent, 6)
    assert "resuming from step-00000006" in train_on(n, config, tmp_path)
    assert checkpoint_files(config.parent, 12) == first


def test_sharded_checkpoint_is_resumed_by_2_then_4_then_1(tmp_path, alone):
    "Each rank writes its shards of optimizer and average; other numbers of ranks read them."
    from codex_nb.experiments.verify import verify_run

    config = prepared(tmp_path, "shards", parallel="fsdp", ema=0.9)
    train_on(2, config, tmp_path)
    folder = config.parent
    first = checkpoint_files(folder, 12)
    shards = {
        f"{part}/shard-0000{r}-of-00002.safetensors"
        for part in ("optimizer", "ema")
        for r in (1, 2)
    }
    assert shards <= first.keys() and "model.safetensors" in first
    averaged = [r for r in read_lines(folder / "metrics.ndjson") if r["split"] == "validation_ema"]
    assert [r["step"] for r in averaged] == [6, 12]
    assert_close(train_losses(folder), train_losses(alone))
    cut_back(folder, 6)
    assert "resuming from step-00000006" in train_on(2, config, tmp_path)
    assert checkpoint_files(folder, 12) == first  # as many ranks: bit for bit
    for n in (4, 1):
        cut_back(folder, 6)
        out = train_on(n, config, tmp_path, CODEX_NB_ALLOW=ALLOW)
        assert "resuming from step-00000006" in out and f"world_size was 2, now {n}" in out
        assert_close(train_losses(folder), train_losses(alone))
    assert verify_run(folder)["ok"]


def test_checkpoint_without_one_of_its_shards_is_passed_over(tmp_path):
    config = prepared(tmp_path, "lost", parallel="fsdp")
    train_on(2, config, tmp_path)
    optimizer = config.parent / "checkpoints" / "step-00000012" / "optimizer"
    (optimizer / "shard-00002-of-00002.safetensors").unlink()
    cut_back(config.parent, 12)
    out = train_on(2, config, tmp_path)
    assert "skipped a damaged checkpoint" in out
    assert "shard-00002-of-00002.safetensors: missing" in out
    assert "resuming from step-00000006" in out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"] if PROVE else ["fsdp"])
def test_adapter_on_two_processes_is_that_of_one_and_resumes_bitwise(parallel, tmp_path, alone):
    base = str(alone / "checkpoints" / "step-00000012")
    given = {k: v for k, v in SMALL.items() if k != "width"} | dict(
        base=base, adapter="lora", rank=2, data="chat", packing="best-fit"
    )
    folders = []
    for name, n, how in (("alone", 1, "ddp"), ("two", 2, parallel)):
        config = prepared(tmp_path, name, bare=given, parallel=how)
        train_on(n, config, tmp_path)
        folders.append(config.parent)
    assert_close(train_losses(folders[1]), train_losses(folders[0]))
    first = checkpoint_files(folders[1], 12)
    of_base = checkpoint_files(alone, 12)
    assert first["tokenizer.json"] == of_base["tokenizer.json"]
    cut_back(folders[1], 6)
    train_on(2, config, tmp_path)
    assert checkpoint_files(folders[1], 12) == first


@pytest.mark.skipif(not PROVE, reason="two compilations; in `make prove`")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_model_on_two_processes(parallel, tmp_path, alone):
    config = prepared(tmp_path, "compiled", compile="on", micro_batch=4, parallel=parallel)
    train_on(2, config, tmp_path)
    assert_close(train_losses(config.parent), train_losses(alone))


def test_signal_to_torchrun_saves_the_last_step(tmp_path):
    from codex_nb.train.checkpoint import latest_checkpoint

    config = prepared(tmp_path, "stopped", **LONG)
    job = torchrun(config, 2, tmp_path)
    log = config.parent / "metrics.ndjson"
    wait_until(lambda: job.poll() is not None or log.exists())
    time.sleep(0.7)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode != 0
    newest, skipped = latest_checkpoint(config.parent / "checkpoints")
    assert newest and not skipped
    assert int(newest.path.name[5:]) == max(train_losses(config.parent))


@pytest.mark.parametrize(
    "parallel,rank",
    [(p, r) for p in ("ddp", "fsdp") for r in (0, 1)] if PROVE else [("ddp", 1), ("fsdp", 0)],
)
def test_signal_to_one_rank_right_after_an_agreement(parallel, rank, tmp_path):
    "Between the agreement after a step and the next step: all ranks end together, a step later."
    config = prepared(tmp_path, "hurried", parallel=parallel, **LONG)
    program = [PROGRAMS / "signal_after_agreement.py"]
    if PROVE:
        job = torchrun(config, 2, tmp_path, program, SIGNALLED_RANK=str(rank))
        try:
            job.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            raise
        codes = [job.returncode]
    else:
        how = dict(program=program, together=False, SIGNALLED_RANK=str(rank))
        codes, _ = forked_ranks(config, 2, tmp_path, **how)
    assert all(codes)
    assert list(train_losses(config.parent)) == [1, 2, 3, 4, 5, 6]
    assert checkpoint_files(config.parent, 6)


@pytest.mark.parametrize("rank", [0, 1] if PROVE else [1])
def test_signal_in_an_evaluation_of_a_sharded_model_ends_it_on_all_ranks(rank, tmp_path):
    "They evaluate together; one that stopped alone would leave the others waiting."
    config = prepared(tmp_path, "evaluating", parallel="fsdp")
    program = [PROGRAMS / "signal_in_evaluation.py"]
    how = dict(program=program, together=False, SIGNALLED_RANK=str(rank))
    codes, texts = forked_ranks(config, 2, tmp_path, **how)
    assert codes == [143, 143], texts
    records = read_lines(config.parent / "metrics.ndjson")
    assert not [r for r in records if r["split"] == "validation"]
    assert checkpoint_files(config.parent, 6)
    assert "resuming from step-00000006" in train_on(2, config, tmp_path)
    records = read_lines(config.parent / "metrics.ndjson")
    assert [r["step"] for r in records if r["split"] == "validation"] == [6, 12]


@pytest.mark.skipif(not PROVE, reason="an evaluation that is waited for; in `make prove`")
def test_rank_0_may_evaluate_for_longer_than_ranks_wait(tmp_path):
    config = prepared(tmp_path, "slow", steps=2, eval_every=1, save_every=2)
    codes, texts = forked_ranks(config, 2, tmp_path, program=[PROGRAMS / "evaluate_slowly.py"])
    assert codes == [0, 0], texts
    assert list(train_losses(config.parent)) == [1, 2]


def ranks_of(process, rank=None):
    "The ranks that a process has started; with `rank`, those of that number."
    children = psutil.Process(process.pid).children(recursive=True)
    found = [(c.environ().get("RANK"), c) for c in children]
    return [c for r, c in found if r is not None and rank in (None, r)]


def test_rank_that_dies_ends_the_job(tmp_path):
    config = prepared(tmp_path, "dying", **LONG | dict(save_every=20))
    job = torchrun(config, 2, tmp_path)
    saved = config.parent / "checkpoints"
    wait_until(lambda: job.poll() is not None or list(saved.glob("step-*")))
    ranks_of(job, "1")[0].kill()
    began = time.monotonic()
    _, err = job.communicate(timeout=60)
    assert job.returncode != 0 and time.monotonic() - began < 40
    assert "rank" in err and "SIGKILL" in err, err[-2000:]


def launched(folder, home, fresh=PROVE, **settings):
    "A notebook that trains on two processes, started."
    words = ["codex-nb", "run", "train", "--folder", folder]
    given = flags(SMALL | dict(nproc=2) | settings)
    env = {} if fresh else ranks_are_forked()
    return start(*words, *given, home=home, fresh=fresh, **env)


@pytest.mark.skipif(not PROVE, reason="a rank that is lost, below, and a restart, in `make prove`")
def test_job_of_a_notebook_restarts_from_its_last_checkpoint(tmp_path):
    "One of its two processes is killed once."
    folder = tmp_path / "runs" / "two"
    job = launched(
        *(folder, tmp_path),
        **dict(steps=counts(100, 400), eval_every=1000, save_every=20, restarts=1),
        **dict(max_documents=4, resamples=100),
    )
    wait_until(lambda: job.poll() is not None or list(folder.glob("checkpoints/step-*")))
    ranks = ranks_of(job, "1") if job.poll() is None else []
    for r in ranks:
        r.kill()
    out, err = job.communicate(timeout=240)
    assert job.returncode == 0, err[-3000:] + out[-2000:]
    assert list(train_losses(folder)) == list(range(1, counts(101, 401)))
    assert not ranks or "resuming from step-" in out


def test_killed_rank_leaves_a_run_that_can_be_resumed(tmp_path):
    folder = tmp_path / "runs" / "killed"
    job = launched(
        *(folder, tmp_path),
        **dict(steps=1000, eval_every=1000, save_every=20, max_documents=4, resamples=100),
    )
    wait_until(lambda: job.poll() is not None or list(folder.glob("checkpoints/step-*")))
    ranks_of(job, "1")[0].kill()
    _, err = job.communicate(timeout=120)
    assert job.returncode == 75, err[-3000:]
    assert "one of 2 processes that train was killed, perhaps because memory ran out" in err
    assert f"go on with: codex-nb resume {folder}" in err
    assert "the run is interrupted" in err and not (folder / "manifest.json").exists()


@pytest.mark.skipif(not PROVE, reason="several starts of torchrun; in `make prove`")
def test_restarted_ranks_do_not_meet_those_before(tmp_path):
    "All attempts use the table that torchrun keeps; one process comes late."
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = dict(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        WORLD_SIZE="2",
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_MAX_RESTARTS="1",
    )

    def joining(attempt, rank, delay, **more):
        env = shared | dict(TORCHELASTIC_RESTART_COUNT=str(attempt), RANK=str(rank)) | more
        out, err = (open(tmp_path / f"{attempt}-{rank}.{k}", "w+") for k in ("out", "err"))
        argv = [sys.executable, PROGRAMS / "join_ranks.py", str(delay)]
        return warm.Warm(argv, tmp_path, environment(tmp_path, **env), None, out, err), out, err

    for attempt in range(counts(4, 12)):
        ranks = [joining(attempt, rank, delay=rank) for rank in (0, 1)]
        for process, _, err in ranks:
            process.wait(120)
            err.seek(0)
        texts = [(out.seek(0), out.read())[1] for _, out, _ in ranks]
        assert texts == ["met [0, 1]\n"] * 2, [err.read() for _, _, err in ranks]
    over, _, err = joining(attempt, 0, 0, GROUP_WORLD_SIZE="2")
    assert over.wait(120)
    err.seek(0)
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in err.read()


@pytest.mark.skipif(not PROVE, reason="in `make prove`; one rank that is lost, above")
def test_no_rank_outlives_a_killed_launcher(tmp_path):
    folder = tmp_path / "runs" / "two"
    job = launched(folder, tmp_path, fresh=True, **LONG | dict(save_every=20))
    wait_until(lambda: job.poll() is not None or list(folder.glob("checkpoints/step-*")))
    below = psutil.Process(job.pid).children(recursive=True)
    assert len(ranks_of(job)) == 2
    job.kill()
    job.wait()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not [c for c in alive if c.status() != psutil.STATUS_ZOMBIE]


IP = shutil.which("ip") or "/sbin/ip"


def namespaces_allowed():
    try:
        for action in ("add", "del"):
            words = [IP, "netns", action, "codex-nb-probe"]
            if subprocess.run(words, capture_output=True).returncode:
                return False
    except OSError:
        return False
    return True


@pytest.mark.skipif(
    not namespaces_allowed(), reason="no network namespaces allowed here, or iproute2 is missing"
)
def test_two_hosts_train_as_one(tmp_path, alone):
    "Two network namespaces joined by a cable: each is a host with one process."
    names, tag = [f"cnb{os.getpid()}{x}" for x in "ab"], os.getpid() % 1000
    devices, addresses = [f"v{x}{tag}" for x in "ab"], ["10.99.7.1", "10.99.7.2"]

    def ip(*words):
        subprocess.run([IP, *words], check=True, capture_output=True)

    def host(i):
        words = [IP, "netns", "exec", names[i], sys.executable, "-m", "torch.distributed.run"]
        words += ["--nnodes", "2", "--node-rank", str(i), "--nproc-per-node", "1"]
        words += ["--master-addr", addresses[0], "--master-port", "29577", *RECIPE, str(config)]
        return subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(tmp_path, GLOO_SOCKET_IFNAME=devices[i]),
        )

    config = prepared(tmp_path, "hosts")
    for name in names:
        ip("netns", "add", name)
    try:
        cable = [devices[0], "netns", names[0], "type", "veth"]
        ip("link", "add", *cable, "peer", "name", devices[1], "netns", names[1])
        for name, device, address in zip(names, devices, addresses):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            for d in (device, "lo"):
                ip("-n", name, "link", "set", d, "up")
        hosts = [host(0), host(1)]
        errors = [p.communicate(timeout=180)[1] for p in hosts]
        assert [p.returncode for p in hosts] == [0, 0], errors
        assert_close(train_losses(config.parent), train_losses(alone))
    finally:
        for name in names:
            subprocess.run([IP, "netns", "del", name], capture_output=True)
