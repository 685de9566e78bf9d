"""Runs that a card or a report describes: trained on text whose every name is hostile."""

import json
import shutil
from pathlib import Path

from forger import MANIFEST

# A tag, a handler, the syntax of Markdown tables and of YAML, a line break, a change of direction
HOSTILE = "<script>alert(1)</script>\"><img src=x onerror='x'>|`$`\n---\n- a: \u202e[b](c) &#60;"
SMALL = dict(steps=6, eval_every=3, save_every=3, resamples=100, ngram=4, seq_len=32)
SMALL |= dict(max_new_tokens=4, threads=1)


def find(home, end):
    "The run whose name ends so; those that were stopped are not among the others."
    (folder,) = home.glob(f"*/*{end}")
    return folder


def write_corpus(path, name):
    "Text whose ids, groups, topics and licences hold `name`."
    rows = [
        {
            "id": f"{name}{i}",
            "text": f"Tale number {i} tells of {i * i} bees, {i % 7} birds and a lock. " * 3,
            "group": f"{name}{i // 2}",
            "meta": {"topic": f"{name}{i % 2}", "license": f"{name}{i % 3}"},
        }
        for i in range(160)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def write_questions(path, name):
    "Short questions whose ids and groups hold `name`."
    rows = [
        {"id": f"{name}{i}", "prompt": f"Tale {i}", "answers": [name], "group": name}
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def make_runs(home, name):
    "Make `trained`, `tuned`, `judged`, `asked`, `failed`, `interrupted`; each name holds `name`."
    from codex_nb.core.store import workspace
    from codex_nb.run.judging import (
        corpus_for,
        find_checkpoint,
        judge,
        judge_task,
        open_trained,
        train_and_judge,
    )
    from codex_nb.run.recipe import finish
    from codex_nb.run.run_folder import seal_run
    from codex_nb.run.settings import FinetuneConfig, JudgeConfig, RunConfig
    from codex_nb.run.training_inputs import start_run

    assert workspace() == home
    data, runs = home / "data.jsonl", home / "runs"
    write_corpus(data, name)
    label = name.replace("/", "")
    questions = home / f"{label}questions.jsonl"
    write_questions(questions, name)
    ends = ("trained", "tuned", "judged", "asked")
    trained, tuned, judged, asked = (runs / f"{label}{end}" for end in ends)
    shape = dict(data=str(data), slices=["topic"], width=32, layers=1)
    train_and_judge(RunConfig.from_preset("smoke", **SMALL, **shape), trained)
    tuning = dict(base=str(trained), data=str(data), slices=["topic"])
    train_and_judge(FinetuneConfig.from_preset("smoke", **SMALL, **tuning), tuned)

    given = dict(checkpoint=str(trained), resamples=100, max_new_tokens=4, threads=1)
    cfg = JudgeConfig.from_preset("smoke", split="test", slices=["topic"], **given)
    checkpoint = find_checkpoint(cfg.checkpoint)
    model, tokenizer = open_trained(checkpoint)
    corpus = corpus_for(cfg, checkpoint)
    run = start_run("evaluate", cfg, judged, checkpoint=checkpoint, corpus=corpus)
    judge(run, model, tokenizer, corpus, checkpoint)
    finish(run)
    cfg = JudgeConfig.from_preset("smoke", task=str(questions), **given)
    run = start_run("evaluate", cfg, asked, checkpoint=checkpoint, corpus=corpus)
    judge_task(run, model, tokenizer, checkpoint)
    finish(run)

    for end in ("failed", "interrupted"):
        folder = Path(shutil.copytree(trained, home / "stopped" / f"{label}{end}"))
        (folder / MANIFEST).unlink()
    with open(folder / "metrics.ndjson", "a") as f:
        f.write('{"schema": 1, "st')  # killed while it wrote
    seal_run(home / "stopped" / f"{label}failed", "failed", f"RuntimeError: {name}")
