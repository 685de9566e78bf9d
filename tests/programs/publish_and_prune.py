"""Publish checkpoints of MODEL in RUN and prune all but the newest, until the input ends."""

import shutil
import sys
import threading
from itertools import count
from pathlib import Path

from codex_nb.core.artifacts import publish
from codex_nb.train.retention import prune
from codex_nb.train.train_config import CheckpointConfig

model, folder = Path(sys.argv[1]), Path(sys.argv[2]) / "checkpoints"
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
for step in count(1):
    with publish(folder / f"step-{step:08}", "checkpoint", parents={"tokenizer": "x"}) as draft:
        for path in model.iterdir():
            shutil.copyfile(path, draft.path / path.name)
    prune(folder, CheckpointConfig(keep_last=1, keep_best=0), verified=draft.artifact.path)
    if step == 1:
        print("ready", flush=True)
    if ended.is_set():
        break
