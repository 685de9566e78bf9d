"""A run stopped and continued in a new process ends as one that was not."""
import json, os, subprocess, sys, textwrap
import pytest

CODE = textwrap.dedent("""
    import os, sys
    from codex_nb.corpus import open_corpus
    from codex_nb.engine import Hook
    from codex_nb.recipe import begin, finish, make_model, train
    from codex_nb.settings import RunConfig
    from codex_nb.vocabulary import train_tokenizer
    from codex_nb.tokens import Rows, build_tokens
    stop, dtype, arch, hard = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "hard"
    cfg = RunConfig.from_preset("smoke", steps=20, eval_every=7, save_every=7, keep_last=9, width=32, seq_len=32, batch_size=6, micro_batch=4, dropout=0.1, dtype=dtype, arch=arch, eval_documents=2, background=False,
        max_new_tokens=8, optimizer="muon" if arch == "llama" else "adamw", lr=5e-3)
    corpus = open_corpus(cfg.corpus)
    tokenizer = train_tokenizer(corpus, cfg.tokenizer)
    rows = Rows(build_tokens(corpus, tokenizer), cfg.model.seq_len)
    run = begin("train", cfg)
    model = make_model(run, tokenizer)
    def end(state):
        if state.step == stop: os._exit(9) if hard else state.stop("asked to")
    state = train(run, model, tokenizer, rows, corpus, hooks=(Hook(end),))
    if state.step == 20: finish(run)
""")

def go(home, folder, stop, dtype, arch, how="soft"):
    done = subprocess.run([sys.executable, "-c", CODE, str(stop), dtype, arch, how], capture_output=True, text=True, env=os.environ | {"CODEX_NB_HOME": str(home), "CODEX_NB_RUN": str(folder)})
    assert done.returncode in (0, 9), done.stderr
    return done.stdout

def end_of(folder):
    "Digests of weights and optimizer, and every exact value in the record."
    last = json.loads((folder/"checkpoints"/"step-00000020"/"manifest.json").read_text())
    exact = [(r["step"], r["exact"]) for l in (folder/"metrics.ndjson").read_text().splitlines() if (r := json.loads(l))["split"] == "train"]
    assert [s for s, _ in exact] == list(range(1, 21))
    return {f: last["files"][f]["sha256"] for f in ("model.safetensors", "optimizer.safetensors", "state.json")}, exact

@pytest.mark.parametrize("dtype,arch", [("fp32", "gpt2"), ("bf16", "gpt2"), ("fp32", "llama"), ("bf16", "llama")])
def test_7_and_13_is_20(tmp_path, dtype, arch):
    go(tmp_path, tmp_path/"straight", 0, dtype, arch)
    go(tmp_path, tmp_path/"parts", 7, dtype, arch)
    said = go(tmp_path, tmp_path/"parts", 0, dtype, arch)
    assert "going on from step-00000007" in said
    assert end_of(tmp_path/"parts") == end_of(tmp_path/"straight")
    weights, exact = end_of(tmp_path/"straight")
    assert len({e["loss"] for _, e in exact}) == 20 # dropout and order make every step's loss its own

def test_killed_between_checkpoints(tmp_path):
    go(tmp_path, tmp_path/"straight", 0, "fp32", "llama")
    go(tmp_path, tmp_path/"parts", 11, "fp32", "llama", "hard")
    with open(tmp_path/"parts"/"metrics.ndjson", "a") as f: f.write('{"schema": 1, "st') # a torn line
    said = go(tmp_path, tmp_path/"parts", 0, "fp32", "llama")
    assert "going on from step-00000007" in said and "beyond step 7 were removed" in said
    assert end_of(tmp_path/"parts") == end_of(tmp_path/"straight")

def test_damaged_checkpoint_is_passed_over_and_named(tmp_path):
    go(tmp_path, tmp_path/"straight", 0, "fp32", "llama")
    go(tmp_path, tmp_path/"parts", 15, "fp32", "llama", "hard")
    f = tmp_path/"parts"/"checkpoints"/"step-00000014"/"optimizer.safetensors"
    data = bytearray(f.read_bytes()); data[-5] ^= 4; f.write_bytes(data)
    said = go(tmp_path, tmp_path/"parts", 0, "fp32", "llama")
    assert "passed over a damaged checkpoint" in said and "step-00000014/optimizer.safetensors" in said and "going on from step-00000007" in said
    # the damaged folder is in the way of the new step 14: it is replaced
    assert end_of(tmp_path/"parts") == end_of(tmp_path/"straight")
