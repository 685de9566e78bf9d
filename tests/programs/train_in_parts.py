"""Train 20 steps into $CODEX_NB_RUN, or a part of them: STOP DTYPE ARCH HOW.

At step STOP the training is asked to stop, or with `hard` as HOW the process ends at once.
"""

import os
import sys

from codex_nb.data.corpus import open_corpus
from codex_nb.data.tokenizer_training import train_tokenizer
from codex_nb.data.tokens import PackedDataset, build_tokens
from codex_nb.run.recipe import finish, train_model
from codex_nb.run.settings import RunConfig
from codex_nb.run.training_inputs import model_for, start_run
from codex_nb.train.engine import Hook

stop, dtype, arch, how = int(sys.argv[1]), *sys.argv[2:]
cfg = RunConfig.from_preset(
    "smoke",
    steps=20,
    eval_every=7,
    save_every=7,
    keep_last=9,
    width=32,
    seq_len=32,
    batch_size=6,
    micro_batch=4,
    dropout=0.1,
    dtype=dtype,
    arch=arch,
    eval_documents=2,
    background=False,
    max_new_tokens=8,
    optimizer="muon" if arch == "llama" else "adamw",
    lr=5e-3,
)
corpus = open_corpus(cfg.corpus)
tokenizer = train_tokenizer(corpus, cfg.tokenizer)
rows = PackedDataset(build_tokens(corpus, tokenizer), cfg.model.seq_len)
run = start_run("train", cfg)
model = model_for(run.cfg, tokenizer)


def end(state):
    if state.step == stop and how == "hard":
        os._exit(9)
    if state.step == stop:
        state.stop("asked to")


state = train_model(run, corpus, tokenizer, rows, model, hooks=(Hook(end),))
if state.step == 20:
    finish(run)
