"""A run that is stopped and resumed in a new process ends as one that was not, bit for bit."""

import json
import os
import shutil
import signal

import pytest
from helpers import (
    PROVE,
    checkpoint_files,
    codex,
    counts,
    flags,
    program,
    read_lines,
    shared_folder,
)


def train_part(home, name, stop, dtype, arch, how="soft"):
    "Train, up to step `stop` or to the end of 20; what was printed."
    words = (stop, dtype, arch, how)
    done = program("train_in_parts.py", *words, home=home, CODEX_NB_RUN=str(home / name))
    assert done.returncode in (0, 9), done.stderr
    return done.stdout


def end_of(folder):
    "Digests of weights, optimizer and state, and every exact value in the record."
    records = [r for r in read_lines(folder / "metrics.ndjson") if r["split"] == "train"]
    exact = [(r["step"], r["exact"]) for r in records]
    assert [step for step, _ in exact] == list(range(1, 21))
    files = checkpoint_files(folder, 20)
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    return {name: files[name] for name in names}, exact


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    "What a run that nobody stopped comes to: a function of dtype and architecture."

    def get(dtype, arch):
        make = lambda home: train_part(home, "run", 0, dtype, arch)  # noqa: E731
        return end_of(shared_folder(tmp_path_factory, f"straight-{dtype}-{arch}", make) / "run")

    return get


@pytest.mark.parametrize(
    "dtype,arch",
    [("fp32", "gpt2"), ("bf16", "llama")] + [("bf16", "gpt2"), ("fp32", "llama")] * PROVE,
)
def test_7_steps_and_13_are_20_bitwise(tmp_path, straight, dtype, arch):
    train_part(tmp_path, "run", 7, dtype, arch)
    out = train_part(tmp_path, "run", 0, dtype, arch)
    assert "resuming from step-00000007" in out
    assert end_of(tmp_path / "run") == straight(dtype, arch)
    _, exact = straight(dtype, arch)
    # dropout and order make every step's loss its own
    assert len({e["loss"] for _, e in exact}) == 20


def test_resume_is_bitwise_after_kill_between_checkpoints(tmp_path, straight):
    train_part(tmp_path, "run", 11, "fp32", "llama", "hard")
    with open(tmp_path / "run" / "metrics.ndjson", "a") as f:
        f.write('{"schema": 1, "st')  # a torn line
    out = train_part(tmp_path, "run", 0, "fp32", "llama")
    assert "resuming from step-00000007" in out and "after step 7 were removed" in out
    assert end_of(tmp_path / "run") == straight("fp32", "llama")


def test_damaged_checkpoint_is_named_and_passed_over(tmp_path, straight):
    train_part(tmp_path, "run", 15, "fp32", "llama", "hard")
    f = tmp_path / "run" / "checkpoints" / "step-00000014" / "optimizer.safetensors"
    data = bytearray(f.read_bytes())
    data[-5] ^= 4
    f.write_bytes(data)
    out = train_part(tmp_path, "run", 0, "fp32", "llama")
    assert "skipped a damaged checkpoint" in out and "step-00000014/optimizer.safetensors" in out
    assert "resuming from step-00000007" in out
    # the damaged folder is in the way of the new step 14: it is replaced
    assert end_of(tmp_path / "run") == straight("fp32", "llama")


STEPS, EPOCH_EDGE = 22, 19  # the last step of the first epoch is in the middle of a batch
CUTS = {
    "after one step": [1],
    "before an evaluation": [6],
    "right after an evaluation": [7],
    "at a checkpoint": [8],
    "between an evaluation and a save": [15],
    "before the epoch's edge": [EPOCH_EDGE],
    "after the epoch's edge": [EPOCH_EDGE + 1],
    "before the last step": [21],
    "two in a row": [5, 6],
    "three, far apart": [3, 11, 17],
    "in the middle of accumulating": ["12.5"],
    "at the last step": [22],
}
EVERY = [
    (cut, kind, dtype) for cut in CUTS for kind in ("full", "lora") for dtype in ("fp32", "bf16")
] + [(cut, "qlora", "bf16") for cut in CUTS]
SOME = [
    ("between an evaluation and a save", "full", "fp32"),
    ("right after an evaluation", "full", "bf16"),
    ("after the epoch's edge", "full", "fp32"),
    ("after the epoch's edge", "lora", "bf16"),
    ("two in a row", "lora", "fp32"),
    ("in the middle of accumulating", "full", "bf16"),
    ("in the middle of accumulating", "lora", "fp32"),
    ("right after an evaluation", "qlora", "bf16"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    "Corpus, tokenizer, rows and a base, made once."
    from codex_nb.data.corpus import open_corpus
    from codex_nb.data.tokenizer_training import train_tokenizer
    from codex_nb.data.tokens import PackedDataset, build_tokens
    from codex_nb.run.settings import RunConfig

    with pytest.MonkeyPatch.context() as m:
        home = tmp_path_factory.mktemp("bench")
        m.setenv("CODEX_NB_HOME", str(home))
        cfg = RunConfig.from_preset("smoke")
        corpus = open_corpus(cfg.corpus)
        tokenizer = train_tokenizer(corpus, cfg.tokenizer)
        rows = PackedDataset(build_tokens(corpus, tokenizer), 64)
        made = dict(corpus=corpus, tokenizer=tokenizer, rows=rows, home=home, straight={})
        run_in_parts(made, home / "base", dict(steps=3), [])
        yield made


def small_config(given):
    from codex_nb.run.settings import RunConfig

    shape = {} if "base" in given else dict(width=16, heads=2, layers=1, arch="gpt2", dropout=0.1)
    settings = dict(
        steps=STEPS,
        batch_size=64,
        micro_batch=32,
        eval_every=7,
        save_every=8,
        keep_last=99,
        eval_documents=2,
        max_new_tokens=4,
        optimizer="adamw",
    )
    return RunConfig.from_preset("smoke", **(shape | settings | given))


def signal_at(cut, model):
    "A hook that sends SIGTERM at step `cut`; 12.5: in the second micro-batch of step 13."
    from codex_nb.train.engine import Hook

    calls = [0]

    def fire(*_):
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def hook(state):
        if isinstance(cut, str) and state.step == int(float(cut)):
            inner = model.get_base_model() if hasattr(model, "get_base_model") else model
            inner.base_model.register_forward_pre_hook(fire)
        elif state.step == cut:
            os.kill(os.getpid(), signal.SIGTERM)

    return Hook(hook)


def run_in_parts(bench, folder, given, cuts, between=None):
    """Train to the end, in as many parts as there are cuts and one more; what it comes to.

    `between` is called with the folder after each cut."""
    from codex_nb.core.artifacts import read_manifest
    from codex_nb.core.repro import seed_everything
    from codex_nb.run.trainer import Trainer
    from codex_nb.run.training_inputs import model_for, start_run
    from codex_nb.train.checkpoint import require_checkpoint
    from codex_nb.train.interrupts import Interrupted

    corpus, tokenizer, rows = bench["corpus"], bench["tokenizer"], bench["rows"]
    cfg = small_config(given)
    for cut in [*cuts, None]:
        seed_everything(1234)  # whatever was drawn before must not matter
        run = start_run("train", cfg, folder, corpus=corpus, tokenizer=tokenizer, tokens=rows.store)
        model = model_for(run.cfg, tokenizer)
        try:
            Trainer(run, corpus, tokenizer, rows, model, (signal_at(cut, model),)).fit()
        except Interrupted:
            assert cut is not None
        else:
            assert cut is None
        if cut is not None:
            run.lock.release()
            if between:
                between(folder)
    sealed = {"run": run.finish().digest}
    for p in sorted((folder / "checkpoints").iterdir()):
        manifest = read_manifest(p)
        sealed[p.name] = manifest.digest, manifest.meta
    files = require_checkpoint(folder).manifest.files
    kept = [n for n in files if n.endswith(".safetensors") or n == "state.json"]
    records = [r for r in read_lines(folder / "metrics.ndjson") if r["split"] != "save"]
    exact = sorted([(r["split"], r["step"], r["exact"]) for r in records], key=str)
    samples = (folder / "samples.ndjson").read_text()
    return {n: files[n]["sha256"] for n in kept}, exact, samples, sealed


@pytest.mark.parametrize("cut,kind,dtype", counts(SOME, EVERY))
def test_resume_is_bitwise_wherever_it_was_stopped(cut, kind, dtype, bench, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(bench["home"]))
    given = dict(dtype=dtype, ema=0.9)
    if kind != "full":
        base = sorted((bench["home"] / "base" / "checkpoints").iterdir())[-1]
        given |= dict(base=str(base), adapter="lora", rank=2, adapter_dropout=0.1)
    if kind == "qlora":
        given |= dict(base_dtype="nf4")
    if (kind, dtype) not in bench["straight"]:
        bench["straight"][kind, dtype] = run_in_parts(bench, tmp_path / "straight", given, [])
    straight = bench["straight"][kind, dtype]
    weights, exact, *_ = straight
    parts = run_in_parts(bench, tmp_path / "parts", given, CUTS[cut])
    assert parts[0] == weights and parts[1] == exact and parts[2:] == straight[2:]
    # every step's loss is its own
    assert len({e["loss"] for split, _, e in exact if split == "train"}) == STEPS


@pytest.mark.skipif(not PROVE, reason="two compilations; in `make prove`")
def test_resume_of_a_compiled_model_is_bitwise(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(bench["home"]))
    given = dict(compile="on", dtype="bf16", micro_batch=64, steps=16)
    straight = run_in_parts(bench, tmp_path / "straight", given, [])
    assert run_in_parts(bench, tmp_path / "parts", given, [5, 12]) == straight


def test_digest_of_a_run_does_not_depend_on_what_was_kept(bench, tmp_path, monkeypatch):
    "A signal just before a planned save once left a checkpoint more, and so another digest."
    monkeypatch.setenv("CODEX_NB_HOME", str(bench["home"]))
    ends = [
        run_in_parts(bench, tmp_path / f"{cut}-{last}", dict(keep_last=last, save_every=20), cut)
        for cut, last in (([], 99), ([3], 1), ([21], 2), ([19, 20], 1))
    ]
    states = [(p / "states.ndjson").read_text() for p in tmp_path.iterdir()]
    assert len({end[3]["run"] for end in ends}) == 1 and len(set(states)) == 1
    assert [len(end[3]) for end in ends] == [3, 2, 3, 2]


@pytest.mark.parametrize("cuts", [[8], [22]])
def test_evaluation_that_a_signal_left_out_belongs_to_the_state(cuts, bench, tmp_path, monkeypatch):
    "At a step that is evaluated and saved: the state knows the best loss."
    monkeypatch.setenv("CODEX_NB_HOME", str(bench["home"]))
    given = dict(eval_every=8, patience=9)
    if ("overdue", "fp32") not in bench["straight"]:
        end = run_in_parts(bench, tmp_path / "straight", given, [])
        bench["straight"]["overdue", "fp32"] = end
    stopped = run_in_parts(bench, tmp_path / "stopped", given, cuts)
    assert stopped == bench["straight"]["overdue", "fp32"]


def test_a_state_that_a_killed_process_did_not_record_is_added(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(bench["home"]))
    straight = run_in_parts(bench, tmp_path / "straight", {}, [])

    def forget_last_state(folder):
        path = folder / "states.ndjson"
        *before, last = path.read_text().splitlines(keepends=True)
        assert json.loads(last)["step"] == 8
        path.write_text("".join(before))

    assert run_in_parts(bench, tmp_path / "killed", {}, [8], forget_last_state) == straight


def test_run_resumed_at_its_end_measures_nothing_twice(tmp_path):
    "As after a signal while the last evaluation was made."
    folder = tmp_path / "runs" / "ended"
    small = dict(width=32, seq_len=32, batch_size=4, steps=5, eval_every=2, eval_documents=2)
    small |= dict(max_documents=4, max_new_tokens=4, resamples=100)
    done = codex("run", "train", *flags(small), "--folder", folder, home=tmp_path)
    assert done.returncode == 0, done.stderr
    before = json.loads((folder / "manifest.json").read_text())["digest"]
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "evaluations")
    again = codex("resume", folder, home=tmp_path)
    assert again.returncode == 0, again.stderr
    records = read_lines(folder / "metrics.ndjson")
    assert [r["step"] for r in records if r["split"] == "validation"] == [2, 4, 5]
    assert len(read_lines(folder / "samples.ndjson")) == 3
    assert json.loads((folder / "manifest.json").read_text())["digest"] == before
    assert "L0 holds" in codex("verify", folder, home=tmp_path).stdout
