"""Save and prune checkpoints in FOLDER forever, in a new process for each line of standard input.

A checkpoint is acknowledged by its name on standard output.
"""

import os
import sys
from pathlib import Path

import torch
from small_checkpoint import make, metadata

from codex_nb.train.async_checkpoint import AsyncCheckpointer
from codex_nb.train.checkpoint import checkpoints, snapshot
from codex_nb.train.retention import CheckpointConfig, prune

torch.set_num_threads(1)
folder = Path(sys.argv[1])
model, optimizer, tokenizer = make(folder.parent / "tokenizer")


def acknowledge(artifact):
    print(artifact.path.name, flush=True)
    prune(folder, CheckpointConfig(keep_last=2))


def train():
    checkpointer = AsyncCheckpointer(after=acknowledge)
    step = max([int(p.name[5:]) for p in checkpoints(folder)], default=0)
    while True:
        step += 1

        def take(buffers, step=step):
            return snapshot(model, optimizer, tokenizer, metadata(step), buffers=buffers)

        checkpointer.save(folder / f"step-{step:08}", take, {})


for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        train()
    print("pid", pid, flush=True)
    os.waitpid(pid, 0)
    print("ended", flush=True)
