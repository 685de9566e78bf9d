"""A tiny model, and how to save it: for tests of checkpoints and the programs they start."""

from pathlib import Path

import torch

from codex_nb.model.causal_lm import ModelConfig, build_model
from codex_nb.train.checkpoint import ResumeMetadata, snapshot, write_checkpoint
from codex_nb.train.optim import OptimConfig, make_optimizer


def make(folder):
    "A model and optimizer after a step, and a folder that looks like a tokenizer's."
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    model = build_model(ModelConfig(width=16, layers=1, heads=2, seq_len=8), 32, 0, 0)
    optimizer = make_optimizer(model, OptimConfig())
    ids = torch.randint(1, 32, (2, 8))
    model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    optimizer.step()
    return model, optimizer, folder


def metadata(step):
    progress = {"step": step, "position": step, "tokens": step}
    return ResumeMetadata(progress, {"total_steps": 9}, {"tokens": "d"}, {"seed": 0})


def save(path, made, step=1, meta=None):
    model, optimizer, folder = made
    return write_checkpoint(path, snapshot(model, optimizer, folder, metadata(step)), {}, meta)
