"""`make cuda`: what only a GPU can show, as one JSON file of evidence.

    python tools/cuda.py --out data/cuda.json --nanogpt FOLDER

Every check is a process of its own, so that none can spoil another, and the file is written after
each. Checks of correctness run beside each other; those that measure speed run alone, and last.
`--device cpu` is a dry run with small sizes on a machine without a GPU; `--only a,b` runs some.

A machine without a package registry needs the packages that `tools/cuda_wheels.py` collects.
"""

import argparse
import contextlib
import datetime
import functools
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CHECKS = {}  # Name -> function, in the order in which they are shown
KINDS = {}  # Name -> kind -> settings: a process for each
ALONE = set()  # Names of those that measure speed


def check(alone=False, **kinds):
    "Register a function of the options, and of the settings of a kind, that returns figures."

    def register(f):
        CHECKS[f.__name__] = f
        if kinds:
            KINDS[f.__name__] = kinds["kinds"]
        if alone:
            ALONE.add(f.__name__)
        return f

    return register


class DoesNotHold(Exception):
    "Figures that are not as they have to be."

    def __init__(self, what, figures):
        super().__init__(what)
        self.figures = figures


def hold(figures, **conditions):
    "The figures of a check, if all conditions hold; each is named for what it says."
    if wrong := [name.replace("_", " ") for name, holds in conditions.items() if not holds]:
        raise DoesNotHold(f"does not hold: {', '.join(wrong)}", figures)
    return figures


# --- What the checks share


def settings(args, preset="smoke", **values):
    "Settings of a small run on the device under test."
    from codex_nb.run.settings import RunConfig

    small = dict(device=args.device, steps=20, eval_every=10, save_every=10, eval_documents=4)
    return RunConfig.from_preset(preset, **small | dict(max_new_tokens=16) | values)


def trained(cfg, folder=None, hooks=()):
    "Train as `train.ipynb` does; returns the run, where training ended, model and tokenizer."
    from codex_nb.run.recipe import finish, train_model
    from codex_nb.run.training_inputs import model_for, prepare_data, start_run

    corpus, tokenizer, dataset = prepare_data(cfg)
    parents = dict(corpus=corpus, tokenizer=tokenizer, tokens=dataset.store)
    run = start_run("train", cfg, folder, **parents)
    model = model_for(run.cfg, tokenizer)
    state = train_model(run, corpus, tokenizer, dataset, model, hooks)
    finish(run)
    return run, state, model, tokenizer


class Prepared(NamedTuple):
    "What steps by hand need."

    cfg: Any
    tokenizer: Any
    batches: Any
    model: Any
    objective: Any
    optimizer: Any


def prepared(args, preset="smoke", vocabulary=None, **values):
    "Everything for steps by hand; `vocabulary` makes the model's larger than the tokenizer's."
    from codex_nb.data.batches import BatchSampler
    from codex_nb.model.causal_lm import build_model
    from codex_nb.model.compute import apply_compute
    from codex_nb.run.bases import resolve_compute_settings
    from codex_nb.run.training_inputs import (
        model_for,
        objective_for,
        prepare_data,
        setup_process,
    )
    from codex_nb.train.optim import make_optimizer

    cfg = settings(args, preset, **values)
    setup_process(cfg)
    _, tokenizer, dataset = prepare_data(cfg)
    cfg = resolve_compute_settings(cfg, dataset.store)
    if vocabulary:
        model = build_model(cfg.model, vocabulary, tokenizer.eot, cfg.seed)
        apply_compute(model, cfg.compute)
        model.to(args.device).train()
    else:
        model = model_for(cfg, tokenizer)
    batches = BatchSampler(dataset, cfg.fit.batch_size, cfg.seed, cfg.fit.micro_batch)
    shape = batches.micro_batch, cfg.model.seq_len
    objective, compute = objective_for(cfg, model, batches, shape)
    cfg = cfg.updated(compute=compute)
    optimizer = make_optimizer(model, cfg.optim)
    return Prepared(cfg, tokenizer, batches, model, objective, optimizer)


def stepper(made):
    "A function that makes the step of a given number; its values stay on the device."
    from codex_nb.run.training_inputs import graphs_for
    from codex_nb.train.engine import train_step

    cfg, batches, vocabulary = made.cfg, made.batches, made.model.config.vocab_size
    spread = vocabulary // made.tokenizer.vocab_size  # ids over the whole vocabulary

    def loss(_, b):
        return made.objective(b.ids_BT, b.targets_BT, b.positions_BT, b.cu_seqlens)

    shape = batches.micro_batch, cfg.model.seq_len
    graphs = graphs_for(cfg.compute, made.model, loss, batches, shape)

    def step(i):
        micro = batches.step(i * batches.batch_size)
        if spread > 1:
            micro = [b._replace(ids_BT=b.ids_BT * spread) for b in micro]
        lr, clip = cfg.optim.lr, cfg.fit.clip
        return train_step(made.model, micro, loss, made.optimizer, lr, clip, graphs=graphs)

    step.graphs = graphs

    return step


def synchronize():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(f, repeats=5, calls=1):
    "Median time of `calls` calls, after one to warm up."
    times = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            f()
        synchronize()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times[1:])


def child(args, *words, env=None, seconds=300):
    "Run this file in another process; returns code and output."
    command = [sys.executable, __file__, "--device", args.device, *map(str, words)]
    done = subprocess.run(
        command, env=os.environ | (env or {}), capture_output=True, text=True, timeout=seconds
    )
    return done.returncode, (done.stdout + done.stderr)[-3000:]


def codex(*words):
    "Run `codex-nb WORDS`, which need not be installed here."
    program = "import sys; from codex_nb.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def weights_digest(run_folder):
    "SHA-256 of every tensor of the last checkpoint: weights, moments, averages."
    folder = max((Path(run_folder) / "checkpoints").glob("step-*"))
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {n: f["sha256"] for n, f in files.items() if n.endswith(".safetensors")}


# --- Correct


RUNS = {
    "llama fp32 muon": dict(dtype="fp32"),
    "llama bf16 muon": dict(dtype="bf16"),
    "llama bf16 adamw, averaged": dict(dtype="bf16", optimizer="adamw", ema=0.9),
    "llama bf16 best-fit": dict(dtype="bf16", packing="best-fit"),
    "llama bf16 grouped queries": dict(dtype="bf16", heads=4, kv_heads=2),
    "llama bf16 recompute, micro-batches": dict(dtype="bf16", recompute=True, micro_batch=4),
    "gpt2 bf16 dropout": dict(dtype="bf16", arch="gpt2", dropout=0.1),
    "gpt2 fp32 adamw eager": dict(dtype="fp32", arch="gpt2", optimizer="adamw", compile="off"),
    "skip bad steps": dict(dtype="bf16", optimizer="adamw", on_bad="skip"),
    "finetune lora": dict(adapter="lora"),
    "finetune dora": dict(adapter="dora"),
    "finetune full": dict(adapter="none"),
}


@check(kinds=RUNS)
def operators(args, values):
    "Training, evaluation and samples of every kind of run, under deterministic algorithms."
    from codex_nb.run.recipe import export_merged
    from codex_nb.run.settings import FinetuneConfig

    if "adapter" not in values:
        return end_of(*trained(settings(args, **values))[:2])
    base = str(trained(settings(args))[0].folder)
    small = dict(base=base, device=args.device, seq_len=64, steps=10, eval_every=5, save_every=5)
    preset = "full" if values["adapter"] == "none" else "smoke"
    cfg = FinetuneConfig.from_preset(preset, **small | values)
    run, state, model, tokenizer = trained(cfg)
    if preset == "smoke":
        export_merged(run, model, tokenizer)  # compares logits before and after
    return end_of(run, state)


def end_of(run, state):
    "How a run ended."
    lines = [json.loads(line) for line in (run.folder / "metrics.ndjson").read_text().splitlines()]
    last = [r["values"] for r in lines if r["split"] == "validation"][-1]
    compute = run.cfg.compute
    return {
        "steps": state.step,
        "validation": last,
        "compile": compute.compile,
        "attention": compute.attention,
    }


def outcome(f):
    "What a function returns, or the error it raised with the place in our code."
    try:
        return f()
    except Exception as e:
        frames = traceback.extract_tb(e.__traceback__)
        ours = [f for f in frames if "codex_nb" in f.filename]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "here"
        return f"{type(e).__name__} at {place}: {str(e)[:600]}"


@check()
def sampling(args):
    "Texts with every cut, from a fresh model, on the device."
    from codex_nb.eval.eval_config import GenerateConfig
    from codex_nb.eval.generate import generate_batch

    made = prepared(args)
    model, tokenizer = made.model, made.tokenizer
    cuts = [{}, dict(top_k=20), dict(top_p=0.9), dict(min_p=0.05), dict(temperature=0)]
    cuts += [dict(repetition_penalty=1.2)]
    prompts = [None, "def f(x):", "import"]

    def both(cut):
        cfg = GenerateConfig(max_new_tokens=24, **cut)
        texts = [generate_batch(model, tokenizer, prompts, cfg) for _ in range(2)]
        assert texts[0] == texts[1], "two calls give different texts"
        return "equal"

    found = {str(cut): outcome(lambda: both(cut)) for cut in cuts}
    return hold(found, two_calls_give_the_same=set(found.values()) == {"equal"})


STEPS = {
    "adamw eager": dict(optimizer="adamw", compile="off"),
    "adamw compiled": dict(optimizer="adamw", compile="on"),
    "muon eager": dict(optimizer="muon", compile="off"),
    "gpt2, best-fit": dict(arch="gpt2", optimizer="adamw", packing="best-fit"),
}


@check(kinds=STEPS)
def no_synchronisation(args, values):
    "A step queues its work without waiting for the device."
    import torch

    step = stepper(prepared(args, **values))
    for i in range(2):
        step(i)
    synchronize()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_sync_debug_mode("error")
    for i in range(2, 6):
        step(i)
    if cuda:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


GRAPHS = {
    "llama bf16 muon eager": dict(optimizer="muon", compile="off", dtype="bf16"),
    "gpt2 bf16 dropout": dict(arch="gpt2", dropout=0.1, optimizer="adamw", dtype="bf16"),
    "llama fp32 micro-batches": dict(dtype="fp32", micro_batch=4, optimizer="adamw"),
}


COMPILED = {
    "gpt2 124M deterministic": dict(determinism="deterministic"),
    "gpt2 124M off": dict(determinism="off"),
    "llama, 2048 wide": dict(preset="smoke", arch="llama", width=2048, heads=16, seq_len=512),
    "gpt2, 2048 wide": dict(preset="smoke", arch="gpt2", width=2048, heads=16, seq_len=512),
}


@check(kinds=COMPILED)
def compiled(args, values):
    "Whether compiled code computes what the model does, and the same bits twice."
    import torch

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        made = large(args, **values)
    totals, gradients = [], []
    for _ in range(2):
        made.model.zero_grad(set_to_none=True)
        (b,) = (b.to(args.device) for b in made.batches.step(0))
        total = made.objective(b.ids_BT, b.targets_BT, b.positions_BT, b.cu_seqlens)
        total.backward()
        totals.append(float(total.detach()))
        gradients.append([p.grad.clone() for p in made.model.parameters()])
    equal = all(map(torch.equal, *gradients))
    found = {
        "compile": made.cfg.compute.compile,
        "attention": made.cfg.compute.attention,
        "said": said.getvalue(),
        "losses": totals,
        "gradients equal": equal,
    }
    return hold(found, same_bits_twice=equal or values.get("determinism") == "off")


@check(kinds=GRAPHS)
def graphs(args, values):
    "Losses of steps whose passes are replayed, against the same without; time of a step."
    found, losses = {}, {}
    on_cuda = args.device.startswith("cuda")
    for setting in ("off", "on") if on_cuda else ("off",):
        made = prepared(args, graphs=setting, **values)
        step = stepper(made)
        losses[setting] = [float(step(i)["loss"]) for i in range(12)]
        found[f"milliseconds a step, graphs={setting}"] = round(
            1000 * seconds(lambda: step(12), *((5, 10) if on_cuda else (1, 1))), 2
        )
    pairs = list(zip(*losses.values()))
    found["largest difference"] = max(abs(p[0] - p[-1]) / p[0] for p in pairs)
    found["problem"] = step.graphs and step.graphs.problem
    same = found["largest difference"] == 0
    return hold(found, no_problem=not found["problem"], losses_are_the_same=same)


@check()
def graphs_refused(args):
    "A model that asks the GPU for a value cannot be recorded: said, and trained as before."
    made = prepared(args, compile="off", optimizer="adamw", attention="sdpa")
    made.model.model.norm.register_forward_hook(lambda m, a, y: y * float(y.sum() < 1e9))
    step, said = stepper(made), io.StringIO()
    with contextlib.redirect_stdout(said):
        losses = [float(step(i)["loss"]) for i in range(4)]
    found = {"said": said.getvalue(), "losses": losses}
    on_gpu = args.device.startswith("cuda")
    return hold(found, it_is_said="cannot be recorded" in found["said"] or not on_gpu)


PACKED = {
    f"{dtype} compile={compiled}": dict(dtype=dtype, compile=compiled)
    for dtype in ("fp32", "bf16")
    for compiled in ("off", "on")
}


@check(kinds=PACKED)
def documents_apart(args, values):
    "The loss of a document does not depend on the one before it in its row, as it is trained."
    import numpy as np
    import torch

    from codex_nb.core.types import IGNORE
    from codex_nb.data.batches import to_batch

    made = prepared(args, seq_len=128, batch_size=8, **values)
    rows, model = made.batches.rows, made.model
    documents = torch.from_numpy(rows.documents(np.arange(8)))
    batch = to_batch(rows, np.arange(8))
    r = next(r for r in range(8) if len(documents[r].unique()) > 1)
    first, last = documents[r] == documents[r][0], documents[r] == documents[r][-1]
    changed = batch.ids_BT.clone()
    changed[r, first] = (changed[r, first] + 1) % model.config.vocab_size

    def loss(ids, scored):
        targets = torch.full_like(batch.targets_BT, IGNORE)
        targets[r, scored] = batch.targets_BT[r, scored]
        b = batch._replace(ids_BT=ids, targets_BT=targets).to(args.device)
        total = made.objective(b.ids_BT, b.targets_BT, b.positions_BT, b.cu_seqlens)
        total.backward()
        return float(total)

    found = {
        "apart": loss(batch.ids_BT, last) == loss(changed, last),
        "test can fail": loss(batch.ids_BT, first) != loss(changed, first),
        "attention": made.cfg.compute.attention,
    }
    return hold(found, apart=found["apart"], test_can_fail=found["test can fail"])


@check()
def attention_close(args):
    "Losses of packed rows with varlen attention, against the same with a mask."
    losses = {}
    for attention in ("varlen", "sdpa"):
        made = prepared(
            args, dtype="bf16", seq_len=256, compile="off", attention=attention, packing="best-fit"
        )
        step = stepper(made)
        losses[attention] = [float(step(i)["loss"]) for i in range(5)]
    largest = max(abs(a - b) / b for a, b in zip(*losses.values()))
    return hold(losses | {"largest difference": largest}, below_a_thousandth=largest < 1e-3)


@check()
def close_to_the_cpu(args):
    "Losses of the first steps: GPU against CPU in fp32, bf16 against fp32."
    losses = {}
    for name, device, dtype in [
        ("cpu fp32", "cpu", "fp32"),
        ("gpu fp32", args.device, "fp32"),
        ("gpu bf16", args.device, "bf16"),
    ]:
        own = argparse.Namespace(**vars(args) | {"device": device})
        made = prepared(own, dtype=dtype, seq_len=128, compile="off")
        step = stepper(made)
        losses[name] = [float(step(i)["loss"]) for i in range(5)]

    def largest(a, b):
        return max(abs(x - y) / abs(y) for x, y in zip(losses[a], losses[b]))

    found = {
        "losses": losses,
        "gpu fp32 against cpu": largest("gpu fp32", "cpu fp32"),
        "gpu bf16 against fp32": largest("gpu bf16", "gpu fp32"),
    }
    return hold(
        found,
        fp32_below_1e_4=found["gpu fp32 against cpu"] < 1e-4,
        bf16_below_1e_2=found["gpu bf16 against fp32"] < 1e-2,
    )


RUN = "RUN"  # The first training run of `command_line`


def told(done):
    "The end of what a command printed, without the folder that it ran in."
    home = os.environ["CODEX_NB_HOME"]
    return (done.stdout + done.stderr).replace(home, "HOME")[-1500:]


@check()
def command_line(args):
    "train, evaluate, finetune and generate as typed."
    device = "cuda:0" if args.device.startswith("cuda") else args.device
    dtype = "bf16" if args.device.startswith("cuda") else "fp32"  # most CPUs only emulate bf16
    where = ["-p", f"device={device}", "-p", f"dtype={dtype}"]
    eager = ["-p", "compile=off"]
    small = ["-p", "steps=20", "-p", "eval_every=10", "-p", "save_every=10"]
    commands = {
        "train": ["run", "train", "-p", "preset=smoke", *where, *small, *eager],
        "evaluate": ["run", "evaluate", *where],
        "finetune": ["run", "finetune", "-p", "preset=smoke", *where, *small, *eager],
        "generate": ["generate", RUN, "--device", device, "--prompt", "import"],
        "verify": ["verify", RUN],
        "replay": ["replay", RUN],
        "doctor": ["doctor"],
    }
    found = {}
    for name, words in commands.items():
        start = time.monotonic()
        runs = sorted((Path(os.environ["CODEX_NB_HOME"]) / "runs").glob("*-train-*"))
        words = [str(runs[0]) if word is RUN else word for word in words]
        done = codex(*words)
        found[name] = {"code": done.returncode, "seconds": round(time.monotonic() - start, 1)}
        if done.returncode or name == "replay":
            found[name]["output"] = told(done)
        Path(args.out).write_text(json.dumps({"figures": found}))  # what is known by now
    return hold(found, every_command_succeeds=not any(f["code"] for f in found.values()))


RESUMED = {
    "adamw": dict(optimizer="adamw", arch="gpt2", dropout=0.1),
    "muon eager": dict(optimizer="muon", compile="off"),
    "adamw eager, averaged": dict(optimizer="adamw", compile="off", ema=0.9, micro_batch=4),
}


@check(kinds=RESUMED)
def resume(args, values):
    "20 steps at once against 10, SIGKILL, and 10 with an empty compiler cache: SHA-256."
    home = Path(tempfile.mkdtemp())

    def part(what, folder, cache):
        env = {"CODEX_NB_HOME": str(home), "TORCHINDUCTOR_CACHE_DIR": str(home / cache)}
        env |= {"TRITON_CACHE_DIR": str(home / cache / "triton")}
        return child(args, "--part", what, "--kind", args.kind, "--out", home / folder, env=env)

    code, output = part("whole", "whole", "a")
    if code:
        raise RuntimeError(output)
    killed, output = part("killed", "cut", "b")
    code, more = part("rest", "cut", "c")
    if code or killed != -signal.SIGKILL:
        raise RuntimeError(f"killed with {killed}, resumed with {code}: {output}{more}")
    a, b = weights_digest(home / "whole"), weights_digest(home / "cut")
    found = {"equal": a == b, "digests": a, "different": [k for k in a if a[k] != b.get(k)]}
    return hold(found, equal=a == b)


def part_of_resume(args):
    "One of the three processes of `resume`."
    from codex_nb.train.engine import Hook

    def kill(state):
        if args.part == "killed" and state.step == 13:
            os.kill(os.getpid(), signal.SIGKILL)

    values = RESUMED[args.kind] | dict(background=False, keep_last=9, packing="best-fit")
    trained(settings(args, dtype="bf16", **values), args.out, (Hook(kill),))


@check()
def one_process_group(args):
    "DDP and FSDP over NCCL in a world of one: the loss of a plain step."
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from codex_nb.run.trainer import _layers
    from codex_nb.train.distributed import _sum_hook
    from codex_nb.train.optim import make_optimizer

    cuda = args.device.startswith("cuda")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=0, world_size=1)
    found = {}

    def losses(wrap):
        made = prepared(args, dtype="bf16", compile="off")
        wrapped = wrap(made.objective, made.model)
        optimizer = make_optimizer(made.model, made.cfg.optim)
        step = stepper(made._replace(objective=wrapped, optimizer=optimizer))
        return [float(step(i)["loss"]) for i in range(3)]

    def ddp(objective, model):
        wrapped = torch.nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True)
        wrapped.register_comm_hook(None, _sum_hook)
        return wrapped

    def fsdp(objective, model):
        for layer in _layers(model):
            fully_shard(layer)
        fully_shard(objective)
        return objective

    for name, wrap in {"plain": lambda o, m: o, "ddp": ddp, "fsdp": fsdp}.items():
        found[name] = losses(wrap)
    dist.destroy_process_group()
    # FSDP computes the norm of the gradients, by which they are clipped, in another order.
    far = max(abs(a - b) / b for a, b in zip(found["fsdp"], found["plain"]))
    return hold(found, ddp_is_equal=found["ddp"] == found["plain"], fsdp_is_close=far < 1e-4)


@check()
def out_of_memory(args):
    "A batch that no card holds: what a user reads, and the exit code."
    if not args.device.startswith("cuda"):
        return {"skipped": "a CPU would swap"}
    big = "preset=smoke width=4096 layers=8 heads=32 seq_len=2048 batch_size=512 compile=off"
    words = [w for v in big.split() for w in ("-p", v)]
    done = codex("run", "train", *words, "-p", f"device={args.device}")
    found = {"code": done.returncode, "output": told(done)}
    return hold(found, refused=found["code"] > 0, explained="memory ran out" in found["output"])


@check()
def preflight_peak(args):
    "What preflight says of memory, against a step that was made."
    import torch

    from codex_nb.run.preflight import preflight

    values = dict(width=512, layers=8, heads=8, seq_len=512, batch_size=32, micro_batch=16)
    values |= dict(dtype="bf16") if args.device.startswith("cuda") else dict(width=64)
    report = preflight(settings(args, **values))
    step = stepper(prepared(args, **values))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for i in range(3):
        step(i)
    synchronize()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    keys = ("peak_gpu_bytes", "state_bytes", "activation_bytes", "seconds_per_step", "isolated")
    found = {"peak": peak} | {k: report[k] for k in keys}
    near = peak is None or abs(found["peak_gpu_bytes"] / peak - 1) < 0.15
    return hold(found, within_15_percent=near)


# --- Fast


@check(alone=True)
def machine(args):
    "Versions, and the ceilings of this card: products and copies."
    import torch
    import transformers

    found = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
    }
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if not torch.cuda.is_available():
        return found
    p = torch.cuda.get_device_properties(0)
    found |= {"gpu": p.name, "memory": p.total_memory, "capability": f"{p.major}.{p.minor}"}
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["cudnn"] = torch.backends.cudnn.version()
    n = 8192
    for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        a, b = (torch.randn(n, n, device=args.device).to(dtype) for _ in range(2))
        found[f"{name} product, TFLOP/s"] = round(2 * n**3 / seconds(lambda: a @ b, 3, 5) / 1e12, 1)
    a, b = (torch.empty(2**30, dtype=torch.float32, device=args.device) for _ in range(2))
    found["copy on the card, GB/s"] = round(2 * a.nbytes / seconds(lambda: b.copy_(a)) / 1e9)
    host = torch.empty(2**28, dtype=torch.float32).pin_memory()
    a = a[: 2**28]
    found["pinned to the card, GB/s"] = round(host.nbytes / seconds(lambda: a.copy_(host)) / 1e9, 1)
    return found


def large(args, **values):
    "GPT-2 of 124 million parameters, as the preset and nanoGPT train it."
    shape = dict(preset="gpt2-124m", data="sample", vocab_size=512, dropout=0.0, dtype="bf16")
    shape |= dict(batch_size=16, micro_batch=16, optimizer="adamw", steps=1000)
    if not args.device.startswith("cuda"):
        shape |= dict(width=64, layers=2, heads=2, seq_len=64, dtype="fp32", compile="off")
        return prepared(args, **shape | values)
    return prepared(args, vocabulary=50304, **shape | values)


def long_texts(args):
    "A file of four long documents: nearly every row holds part of a single one, as nanoGPT's do."
    path = Path(tempfile.mkdtemp()) / "long.jsonl"
    text = (ROOT / "README.md").read_text() * (60 if args.device.startswith("cuda") else 2)
    path.write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(4)))
    return str(path)


KERNELS = {
    "flash": ("flash", "fmha", "cudnn_generated"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "cublas"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "softmax and losses": ("softmax", "log_sum"),
    "triton": ("triton",),
    "copies": ("memcpy", "memset", "copy"),
}


def kind_of(kernel):
    "The kind of a kernel, by its name."
    low = kernel.lower()
    return next((k for k, words in KERNELS.items() if any(w in low for w in words)), "other")


@check(alone=True)
def profile(args):
    "Where the time of a step goes, by kind of kernel: ours, and nanoGPT's."
    from codex_nb.core.repro import set_determinism

    found, shape = {}, {}

    def ours(values):
        made = large(args, **values)
        step, level = stepper(made), values["determinism"]
        shape.update(config=made.model.config.to_dict(), tokens=made.batches.tokens)
        return kernel_times(functools.partial(run_steps, step, level, set_determinism))

    for name, values in {
        "deterministic": dict(determinism="deterministic"),
        "off": dict(determinism="off"),
        "off, long documents": dict(determinism="off", data=long_texts(args)),
    }.items():
        found[name] = outcome(functools.partial(ours, values))
    if args.nanogpt and shape:
        theirs = (shape["config"], shape["tokens"], set_determinism)
        found["nanoGPT"] = outcome(lambda: kernel_times(nanogpt(args, *theirs)))
    return found


def kernel_times(run):
    "Milliseconds of a step on the device: in all, by kind of kernel, and of the longest kernels."
    import torch
    from torch.profiler import ProfilerActivity

    cuda, steps = torch.cuda.is_available(), 4
    run(0, 4)
    synchronize()
    start = time.perf_counter()
    run(4, 10)
    synchronize()
    in_all = (time.perf_counter() - start) / 10
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as p:
        run(14, steps)
        synchronize()
    kinds, kernels = {}, {}
    for e in p.key_averages():
        ms = getattr(e, "self_device_time_total", 0) / 1000 / steps
        # What launched a kernel has its time as well, and is not counted again.
        if ms <= 0 or e.device_type == torch.autograd.DeviceType.CPU or "#" in e.key:
            continue
        kinds[kind_of(e.key)] = kinds.get(kind_of(e.key), 0) + ms
        name = f"{e.count // steps} x {e.key[:90]}"
        kernels[name] = kernels.get(name, 0) + ms
    top = sorted(kernels.items(), key=lambda x: -x[1])[:30]
    return {
        "milliseconds of a step": round(1000 * in_all, 2),
        "milliseconds of kernels in a step": round(sum(kinds.values()), 2),
        "milliseconds by kind": {k: round(v, 2) for k, v in kinds.items()},
        "longest": {k: round(v, 2) for k, v in top},
    }


@check(alone=True)
def race(args):
    "Steps in turn: nanoGPT's own model and loop, ours with determinism off, and on."
    import torch

    from codex_nb.core.repro import set_determinism
    from codex_nb.model.causal_lm import flops_per_token
    from codex_nb.tracking.timers import measure_peak_flops, mfu

    steps, rounds = (10, 6) if args.device.startswith("cuda") else (2, 2)
    if args.kind == "warm":
        steps, rounds = 0, 0
    runners, found = {}, {}
    for name, values in {
        "ours, off": dict(determinism="off"),
        "ours, deterministic": dict(determinism="deterministic"),
        "ours, off, long documents": dict(determinism="off", data=long_texts(args)),
    }.items():

        def make(name=name, values=values):
            made = large(args, **values)
            step = stepper(made)
            found["shape"] = made.model.config.to_dict()
            found["tokens"] = made.batches.tokens
            found["flops"] = flops_per_token(made.model, made.cfg.model.seq_len)
            found.setdefault("attention", {})[name] = made.cfg.compute.attention
            found.setdefault("compile", {})[name] = made.cfg.compute.compile
            return functools.partial(run_steps, step, values["determinism"], set_determinism)

        runner = outcome(make)
        if isinstance(runner, str):
            found[name] = runner
        else:
            runners[name] = runner
    if args.nanogpt and "shape" in found:
        runner = outcome(lambda: nanogpt(args, found["shape"], found["tokens"], set_determinism))
        if isinstance(runner, str):
            found["nanoGPT"] = runner
        else:
            runners["nanoGPT"] = runner
    times = {name: [] for name in runners}
    queued = {name: [] for name in runners}  # Until the CPU was done
    for name, runner in list(runners.items()):
        ended = outcome(lambda: runner(0, 4))
        if isinstance(ended, str):
            found[name] = ended
            del runners[name]
    for r in range(rounds):
        for name, runner in runners.items():
            synchronize()
            start = time.perf_counter()
            runner(4 + r * steps, steps)
            queued[name].append((time.perf_counter() - start) / steps)
            synchronize()
            times[name].append((time.perf_counter() - start) / steps)
    shape = found.pop("shape", {})
    found["shape"] = {k: shape.get(k) for k in ("n_embd", "n_layer", "n_head", "vocab_size")}
    speed = {n: found["tokens"] / statistics.median(t) for n, t in times.items() if t}
    found["tokens/s"] = {n: round(s) for n, s in speed.items()}
    found["milliseconds a step"] = {
        n: {
            "in all": round(1000 * statistics.median(t), 2),
            "until queued": round(1000 * statistics.median(queued[n]), 2),
        }
        for n, t in times.items()
        if t
    }
    found["rounds"] = {n: [round(found["tokens"] / t) for t in ts] for n, ts in times.items()}
    if "flops" in found and torch.cuda.is_available():
        # The same product as in `machine`, in the same process; GPUs without an entry have no peak
        product = measure_peak_flops(args.device, "bf16", 8192)
        peaks = {"a large product": product, "the datasheet": datasheet_peak()}
        flops = found.pop("flops")
        found["model FLOPs utilisation"] = {
            name: {of: round(mfu(s, flops, peak), 3) for of, peak in peaks.items() if peak}
            for name, s in speed.items()
        }
    if "nanoGPT" in speed:
        found["of nanoGPT"] = {n: round(s / speed["nanoGPT"], 3) for n, s in speed.items()}
    if torch.cuda.is_available():
        found["peak GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    return found


# Peak of dense bf16 products in FLOP/s, from NVIDIA's datasheets (SXM where there is a choice)
DATASHEET = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def datasheet_peak():
    "Of this GPU; None where it is not listed."
    import torch

    name = torch.cuda.get_device_name()
    return next((peak for gpu, peak in DATASHEET.items() if gpu in name), None)


def run_steps(step, level, set_determinism, first, n):
    set_determinism(level)
    for i in range(first, first + n):
        step(i)


def nanogpt(args, shape, tokens, set_determinism):
    "nanoGPT's model, optimizer and loop (train.py), from its file `model.py`."
    import importlib.util

    import torch

    spec = importlib.util.spec_from_file_location("nanogpt", Path(args.nanogpt) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module
    spec.loader.exec_module(module)
    length = shape["n_positions"]
    torch.manual_seed(0)
    config = module.GPTConfig(
        length, shape["vocab_size"], shape["n_layer"], shape["n_head"], shape["n_embd"], 0.0, True
    )
    model = module.GPT(config).to(args.device)
    kind = args.device.split(":")[0]
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), kind)
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    forward = torch.compile(model) if kind == "cuda" else model
    data = torch.randint(0, shape["vocab_size"], (1 << 20,))
    rows = tokens // length
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True

    def batch():
        at = torch.randint(len(data) - length, (rows,))
        x = torch.stack([data[i : i + length] for i in at])
        y = torch.stack([data[i + 1 : i + 1 + length] for i in at])
        if kind != "cuda":
            return x, y
        return (t.pin_memory().to(args.device, non_blocking=True) for t in (x, y))

    def run(first, n):
        set_determinism("off")
        x, y = batch()
        for _ in range(n):
            with torch.autocast(kind, dtype, enabled=kind == "cuda"):
                _, loss = forward(x, y)
            x, y = batch()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


@check(alone=True)
def generation_and_scoring(args):
    "Tokens a second of both, with the model of the race."
    from codex_nb.data.documents import Document
    from codex_nb.eval.eval_config import GenerateConfig
    from codex_nb.eval.generate import generate_batch
    from codex_nb.eval.scoring import score

    made = large(args)
    model, tokenizer = made.model, made.tokenizer
    cuda = args.device.startswith("cuda")
    cfg = GenerateConfig(max_new_tokens=128 if cuda else 16)
    found = {}
    for n in (1, 16, 64):
        taken = seconds(lambda: generate_batch(model, tokenizer, [None] * n, cfg, batch_size=n), 1)
        found[f"generated tokens/s, {n} at once"] = round(n * cfg.max_new_tokens / taken)
    text = (ROOT / "README.md").read_text() * (4 if cuda else 1)
    documents = [Document(f"{i}", text) for i in range(16 if cuda else 1)]
    dtype = "bf16" if cuda else "fp32"
    tokens = sum(r.tokens for r in score(model, tokenizer, documents, dtype=dtype))
    taken = seconds(lambda: score(model, tokenizer, documents, dtype=dtype), 2)
    found["scored tokens/s"] = round(tokens / taken)
    return found


@check(alone=True)
def run_against_loop(args):
    "A whole run with log, monitor, evaluation and checkpoints, against bare steps."
    values = dict(data="sample", vocab_size=512, dropout=0.0, batch_size=16, micro_batch=16)
    values |= dict(eval_every=50, save_every=100, steps=150, max_new_tokens=16, dtype="bf16")
    if not args.device.startswith("cuda"):
        values |= dict(width=64, layers=2, heads=2, seq_len=64, dtype="fp32", steps=20)
    cfg = settings(args, "gpt2-124m", **values)
    _, state, *_ = trained(cfg)
    made = prepared(args, "gpt2-124m", **values)
    step, batches = stepper(made), made.batches
    for i in range(5):
        step(i)
    n = 40 if args.device.startswith("cuda") else 5
    taken = seconds(lambda: [step(i) for i in range(n)], 2)
    bare = n * batches.tokens / taken
    return {
        "a run's own figure, tokens/s": round(state.throughput.mean),
        "bare loop, tokens/s": round(bare),
        "seconds by part": {k: round(v, 2) for k, v in state.clock.totals.items()},
    }


DIGESTS = {
    "cpu": dict(device="cpu"),
    "cpu, 8 threads, micro-batches": dict(device="cpu", threads=8, micro_batch=4),
    "gpu": dict(),
    "gpu, micro-batches": dict(micro_batch=8),
}


@check(kinds=DIGESTS)
def portable(args, values):
    "The digests of portable arithmetic, against those that the package brings."
    from codex_nb.core.config import digest_of
    from codex_nb.experiments.portable_digest import (
        first_difference,
        portable_digests,
        recorded_digests,
    )

    found = portable_digests(**dict(device=args.device) | values)
    difference = first_difference(found, recorded_digests())
    figures = {"digest": digest_of(found), "first difference": difference}
    return hold(figures, as_recorded=difference is None)


@check(alone=True)
def portable_speed(args):
    "Time of a step with portable arithmetic, against ordinary fp32."
    found = {}
    for preset in ("smoke", "tiny"):
        taken = {}
        for determinism in ("deterministic", "portable"):
            step = stepper(prepared(args, preset, determinism=determinism, dtype="fp32"))
            taken[determinism] = round(1000 * seconds(lambda step=step: step(0), 3, 3), 2)
        found[f"{preset}, milliseconds a step"] = taken
    return found


# --- The command


def run_check(args, name, kind, folder):
    "One check in a process of its own."
    label = name + (f" {kind}" if kind else "")
    path, log = folder / f"{label}.json", folder / f"{label}.log"
    start = time.monotonic()
    words = ["--check", name, "--kind", kind, "--out", str(path), "--device", args.device]
    words += ["--nanogpt", args.nanogpt] if args.nanogpt else []
    env = os.environ | {"CODEX_NB_HOME": str(folder / label), "TOKENIZERS_PARALLELISM": "false"}
    env |= {"PYTHONPATH": ":".join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if name not in ALONE:
        env |= {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2"}
    command, late = [sys.executable, __file__, *words], False
    with open(log, "w") as f:
        try:
            subprocess.run(command, env=env, stdout=f, stderr=f, timeout=args.seconds)
        except subprocess.TimeoutExpired:
            late = True
    found = {"seconds": round(time.monotonic() - start, 1), "code": code_digest()}
    if path.is_file():
        found |= json.loads(path.read_text())
    if late or not path.is_file():
        said = log.read_text(errors="replace")[-1500:].strip()
        found["error"] = f"{said}\nit did not end" + (f" in {args.seconds:g} s" if late else "")
    return found


@functools.cache
def code_digest():
    "Which code was looked at: SHA-256 of the package's modules, the first digits."
    from codex_nb.core.artifacts import code_files
    from codex_nb.core.config import digest_of

    return digest_of(code_files())[:16]


def run_one(args):
    "What the process of a check does."
    values = [KINDS[args.check][args.kind]] if args.check in KINDS else []
    try:
        found = {"figures": CHECKS[args.check](args, *values)}
    except DoesNotHold as e:
        found = {"figures": e.figures, "error": str(e)}
    except Exception:
        found = {"error": traceback.format_exc()[-2500:]}
    Path(args.out).write_text(json.dumps(found, default=str))
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a dry run")
    parser.add_argument("--out", default=str(ROOT / "data" / "cuda.json"), help="JSON to write")
    parser.add_argument("--nanogpt", help="a folder with nanoGPT's model.py, for the race")
    parser.add_argument("--seconds", type=float, default=120, help="limit of one check")
    parser.add_argument("--only", help="names of checks, separated by commas")
    parser.add_argument("--beside", type=int, default=8, help="checks of correctness at once")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="", help="kinds of those checks: a regular expression")
    args = parser.parse_args()
    if args.part:
        return part_of_resume(args)
    if args.check:
        return run_one(args)
    names = args.only.split(",") if args.only else list(CHECKS)
    if unknown := set(names) - set(CHECKS):
        raise SystemExit(f"--only: no check is called {', '.join(unknown)}; {', '.join(CHECKS)}")
    out, folder = Path(args.out), Path(tempfile.mkdtemp())
    evidence = {"date": datetime.date.today().isoformat(), "device": args.device, "checks": {}}
    writing = threading.Lock()

    def keep(name, kind=""):
        found = run_check(args, name, kind, folder)
        with writing:
            if kind:
                evidence["checks"].setdefault(name, {})[kind] = found
            else:
                evidence["checks"][name] = found
            temporary = out.with_suffix(".part")
            temporary.write_text(json.dumps(evidence, indent=1) + "\n")
            os.replace(temporary, out)
        error = f"  ERROR {found['error'].strip().splitlines()[-1]}" if "error" in found else ""
        print(f"{name} {kind}: {found['seconds']} s{error}", flush=True)

    with ThreadPoolExecutor(args.beside) as pool:
        if "race" in names:  # compiles what the race needs, into the cache
            pool.submit(run_check, args, "race", "warm", folder)
        beside = [(n, k) for n in names if n not in ALONE for k in KINDS.get(n, [""])]
        beside = [(n, k) for n, k in beside if not k or re.search(args.kind, k)]
        list(pool.map(lambda job: keep(*job), beside))
    for name in names:
        if name in ALONE:
            keep(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
