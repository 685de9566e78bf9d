"""Of two launches into one folder one gets the run; the other changes nothing, whenever it ends."""

import pytest

from codex_nb.experiments import launch as module
from codex_nb.experiments.launch import launch, resume
from codex_nb.run.run_folder import Run, run_status
from codex_nb.run.settings import RunConfig

ENDS = {
    "runs": (lambda run: None, "running"),
    "is interrupted": (lambda run: run.lock.release(), "interrupted"),
    "finished": (lambda run: run.finish(), "finished"),
    "failed": (lambda run: run.finish("failed", "by itself"), "failed"),
}
LOST = "RunError: this run is in use by another process"


def content(folder):
    "Every file of a run, with its bytes; but not the locks."
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".lock"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def lose(monkeypatch, folder, end):
    "The next launch loses the folder to a run that began after it, and has come to `end`."
    state = {}

    def execute(notebook, parameters, writer, *more):
        run = state["run"] = Run.start("train", RunConfig.from_preset("smoke"), folder=folder)
        (folder / "train.ipynb").write_text("the winner's")
        end(run)
        state["before"] = content(folder)
        for _ in range(2):  # as papermill does around each cell
            writer.write('{"cells": [], "metadata": {}}', f"{writer.scheme}{notebook.name}")
        return "RunError", LOST

    monkeypatch.setattr(module, "_execute", execute)
    return state


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("how", ["launch", "resume"])
def test_the_loser_changes_nothing(how, end, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    folder = tmp_path / "runs" / "one"
    if how == "resume":
        Run.start("train", RunConfig.from_preset("smoke"), folder=folder).lock.release()
    finish, status = ENDS[end]
    state = lose(monkeypatch, folder, finish)
    if how == "resume":
        outcome = resume(folder)
    else:
        outcome = launch("train", {"preset": "smoke"}, folder)
    assert content(folder) == state["before"]
    assert (outcome.folder, outcome.status, outcome.code) == (folder, status, 1)
    assert outcome.error == LOST and run_status(folder) == status
    if end == "runs":
        state["run"].lock.release()
