"""Import modules of codex_nb, named in a JSON list; the process must be as it was before."""

import importlib
import json
import logging
import os
import random
import sys
import threading

# these set variables and begin threads when they are imported, which is their business
import matplotlib  # noqa: F401
import mlflow  # noqa: F401
import sentencepiece  # noqa: F401
import torch
from transformers import LlamaForCausalLM  # noqa: F401


def state():
    return (
        dict(os.environ),
        threading.active_count(),
        len(logging.getLogger().handlers),
        os.getcwd(),
        random.getstate(),
        torch.are_deterministic_algorithms_enabled(),
    )


before = state()
for module in json.loads(sys.argv[1]):
    importlib.import_module(f"codex_nb.{module}")
assert state() == before
assert not torch.are_deterministic_algorithms_enabled()
assert os.listdir(".") == []
