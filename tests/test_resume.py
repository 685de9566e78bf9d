"""A run stopped and continued in a new process ends as one that was not."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

CODE = textwrap.dedent("""
    import os, sys
    from codex_nb.data.corpus import open_corpus
    from codex_nb.train.engine import Hook
    from codex_nb.run.recipe import finish, train_model
    from codex_nb.run.training_inputs import model_for, start_run
    from codex_nb.run.settings import RunConfig
    from codex_nb.data.tokenizer_training import train_tokenizer
    from codex_nb.data.tokens import PackedDataset, build_tokens
    stop, dtype, arch, hard = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "hard"
    cfg = RunConfig.from_preset("smoke", steps=20, eval_every=7, save_every=7, keep_last=9, width=32, seq_len=32, batch_size=6, micro_batch=4, dropout=0.1, dtype=dtype, arch=arch, eval_documents=2, background=False,
        max_new_tokens=8, optimizer="muon" if arch == "llama" else "adamw", lr=5e-3)
    corpus = open_corpus(cfg.corpus)
    tokenizer = train_tokenizer(corpus, cfg.tokenizer)
    rows = PackedDataset(build_tokens(corpus, tokenizer), cfg.model.seq_len)
    run = start_run("train", cfg)
    model = model_for(run.cfg, tokenizer)
    def end(state):
        if state.step == stop: os._exit(9) if hard else state.stop("asked to")
    state = train_model(run, corpus, tokenizer, rows, model, hooks=(Hook(end),))
    if state.step == 20: finish(run)
""")


def go(home, folder, stop, dtype, arch, how="soft"):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(stop), dtype, arch, how],
        capture_output=True,
        text=True,
        env=os.environ | {"CODEX_NB_HOME": str(home), "CODEX_NB_RUN": str(folder)},
    )
    assert done.returncode in (0, 9), done.stderr
    return done.stdout


def end_of(folder):
    "Digests of weights and optimizer, and every exact value in the record."
    last = json.loads((folder / "checkpoints" / "step-00000020" / "manifest.json").read_text())
    exact = [
        (r["step"], r["exact"])
        for l in (folder / "metrics.ndjson").read_text().splitlines()
        if (r := json.loads(l))["split"] == "train"
    ]
    assert [s for s, _ in exact] == list(range(1, 21))
    return {
        f: last["files"][f]["sha256"]
        for f in ("model.safetensors", "optimizer.safetensors", "state.json")
    }, exact


@pytest.mark.parametrize(
    "dtype,arch",
    [("fp32", "gpt2"), ("bf16", "llama")]
    + ([("bf16", "gpt2"), ("fp32", "llama")] if os.environ.get("PROVE") else []),
)
def test_7_and_13_is_20(tmp_path, dtype, arch):
    go(tmp_path, tmp_path / "straight", 0, dtype, arch)
    go(tmp_path, tmp_path / "parts", 7, dtype, arch)
    said = go(tmp_path, tmp_path / "parts", 0, dtype, arch)
    assert "going on from step-00000007" in said
    assert end_of(tmp_path / "parts") == end_of(tmp_path / "straight")
    weights, exact = end_of(tmp_path / "straight")
    assert (
        len({e["loss"] for _, e in exact}) == 20
    )  # dropout and order make every step's loss its own


def test_killed_between_checkpoints(tmp_path):
    go(tmp_path, tmp_path / "straight", 0, "fp32", "llama")
    go(tmp_path, tmp_path / "parts", 11, "fp32", "llama", "hard")
    with open(tmp_path / "parts" / "metrics.ndjson", "a") as f:
        f.write('{"schema": 1, "st')  # a torn line
    said = go(tmp_path, tmp_path / "parts", 0, "fp32", "llama")
    assert "going on from step-00000007" in said and "beyond step 7 were removed" in said
    assert end_of(tmp_path / "parts") == end_of(tmp_path / "straight")


def test_damaged_checkpoint_is_passed_over_and_named(tmp_path):
    go(tmp_path, tmp_path / "straight", 0, "fp32", "llama")
    go(tmp_path, tmp_path / "parts", 15, "fp32", "llama", "hard")
    f = tmp_path / "parts" / "checkpoints" / "step-00000014" / "optimizer.safetensors"
    data = bytearray(f.read_bytes())
    data[-5] ^= 4
    f.write_bytes(data)
    said = go(tmp_path, tmp_path / "parts", 0, "fp32", "llama")
    assert (
        "passed over a damaged checkpoint" in said
        and "step-00000014/optimizer.safetensors" in said
        and "going on from step-00000007" in said
    )
    # the damaged folder is in the way of the new step 14: it is replaced
    assert end_of(tmp_path / "parts") == end_of(tmp_path / "straight")


PROVE = bool(os.environ.get("PROVE"))
STEPS, EPOCH_EDGE = 22, 19  # the last step of the first epoch is in the middle of a batch
CUTS = {
    "after one step": [1],
    "before an evaluation": [6],
    "right after an evaluation": [7],
    "at a checkpoint": [8],
    "before the epoch's edge": [EPOCH_EDGE],
    "after the epoch's edge": [EPOCH_EDGE + 1],
    "before the last step": [21],
    "two in a row": [5, 6],
    "three, far apart": [3, 11, 17],
    "in the middle of accumulating": ["12.5"],
}
SOME = (
    "right after an evaluation",
    "after the epoch's edge",
    "two in a row",
    "in the middle of accumulating",
)


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
        run_once(made, home / "base", dict(steps=3), [])
        yield made


def run_once(bench, folder, given, cuts):
    "Train to the end, in as many parts as there are cuts and one more; what it comes to."
    import signal

    from codex_nb.core.repro import seed_everything
    from codex_nb.run.settings import RunConfig
    from codex_nb.run.trainer import Trainer
    from codex_nb.run.training_inputs import model_for, start_run
    from codex_nb.train.checkpoint import require_checkpoint
    from codex_nb.train.engine import Hook
    from codex_nb.train.interrupts import Interrupted

    corpus, tokenizer, rows = bench["corpus"], bench["tokenizer"], bench["rows"]
    shape = {} if "base" in given else dict(width=16, heads=2, layers=1, arch="gpt2", dropout=0.1)
    cfg = RunConfig.from_preset(
        "smoke",
        **shape
        | dict(
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
        | given,
    )
    for cut in [*cuts, None]:
        seed_everything(1234)  # whatever was drawn before must not matter
        run = start_run("train", cfg, folder, corpus=corpus, tokenizer=tokenizer, tokens=rows.store)
        model, calls = model_for(run.cfg, tokenizer), [0]

        def arm(state):  # SIGTERM in the second micro-batch of a step
            if isinstance(cut, str) and state.step == int(float(cut)):

                def fire(*_):
                    calls[0] += 1
                    if calls[0] == 2:
                        os.kill(os.getpid(), signal.SIGTERM)

                inner = model.get_base_model() if hasattr(model, "get_base_model") else model
                inner.base_model.register_forward_pre_hook(fire)
            elif state.step == cut:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            Trainer(run, corpus, tokenizer, rows, model, (Hook(arm),)).fit()
        except Interrupted:
            assert cut is not None
        else:
            assert cut is None
        run.lock.release()
    files = require_checkpoint(folder).manifest.files
    exact = [
        (r["split"], r["step"], r["exact"])
        for l in (folder / "metrics.ndjson").read_text().splitlines()
        if (r := json.loads(l))["split"] != "save"
    ]
    samples = (folder / "samples.ndjson").read_text()
    return (
        {n: files[n]["sha256"] for n in files if n.endswith(".safetensors") or n == "state.json"},
        sorted(exact, key=str),
        samples,
    )


@pytest.mark.parametrize("cut", CUTS if PROVE else SOME)
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bit_for_bit(cut, kind, dtype, bench, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(bench["home"]))
    given = dict(dtype=dtype, ema=0.9) | (
        {}
        if kind == "full"
        else dict(
            base=str(sorted((bench["home"] / "base" / "checkpoints").iterdir())[-1]),
            adapter="lora",
            rank=2,
            adapter_dropout=0.1,
        )
    )
    if (kind, dtype) not in bench["straight"]:
        bench["straight"][kind, dtype] = run_once(bench, tmp_path / "straight", given, [])
    parts, straight = (
        run_once(bench, tmp_path / "parts", given, CUTS[cut]),
        bench["straight"][kind, dtype],
    )
    assert parts[0] == straight[0] and parts[1] == straight[1] and parts[2] == straight[2]
    assert (
        len({e["loss"] for s, _, e in straight[1] if s == "train"}) == STEPS
    )  # every step's loss is its own


def test_bit_for_bit_compiled(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(bench["home"]))
    given = dict(compile="on", dtype="bf16", micro_batch=64, steps=16)
    assert run_once(bench, tmp_path / "parts", given, [5, 12] if PROVE else [12]) == run_once(
        bench, tmp_path / "straight", given, []
    )
