"""Take part in a search: URL FOLDER TRIALS. Says `ready`, waits for a line, and trains nothing."""

import json
import sys
from pathlib import Path

import optuna  # noqa: F401 (imported before the start, so that all begin together)
import sqlalchemy  # noqa: F401

from codex_nb.experiments.sweep import Search
from codex_nb.run.settings import SweepConfig

url, folder, n = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
space = {"lr": {"low": 1e-3, "high": 1e-2, "log": True}}
cfg = SweepConfig.from_dict({"of": "train", "space": space, "trials": n, "study": url})
folder.mkdir(parents=True, exist_ok=True)
print("ready", flush=True)
sys.stdin.readline()
search, made = Search(cfg, folder), []
for trial in search.claim_trials():
    made.append(trial.number)
    search.report(trial, 0.5)
print(json.dumps(made))
