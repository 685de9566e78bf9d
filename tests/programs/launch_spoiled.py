"""Launch train.ipynb with a hook that makes weights infinite after the second step."""

import sys
from pathlib import Path

from codex_nb.experiments.launch import find_notebook, launch

CALL = "state = cx.train_model(run, corpus, tokenizer, dataset, model)"
SPOILED = """
from codex_nb.train.engine import Hook

def spoil(s):
    if s.step == 2:
        next(s.model.parameters()).data.fill_(float('inf'))

state = cx.train_model(run, corpus, tokenizer, dataset, model, hooks=(Hook(spoil),))
"""

source = find_notebook("train").read_text()
assert source.count(CALL) == 1, "train.ipynb trains in other words"
notebook = Path(sys.argv[1]) / "train.ipynb"
notebook.write_text(source.replace(CALL, SPOILED.strip().replace("\n", "\\n")))
settings = {"steps": 5, "width": 32, "seq_len": 32, "batch_size": 2, "max_new_tokens": 4}
outcome = launch(str(notebook), settings)
print(outcome.code, outcome.status, outcome.folder)
print(outcome.error)
