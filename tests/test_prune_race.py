"""Checkpoints are opened and evaluated while a run publishes and prunes them."""

import shutil
from pathlib import Path

import pytest
from helpers import PROGRAMS, counts, start

from codex_nb.core.artifacts import ArtifactError, publish
from codex_nb.run import judging
from codex_nb.train.checkpoint import require_checkpoint


def put(folder, step, model):
    with publish(
        folder / "checkpoints" / f"step-{step:08}", "checkpoint", parents={"tokenizer": "x"}
    ) as draft:
        for path in model.iterdir():
            shutil.copyfile(path, draft.path / path.name)


def test_no_open_ends_in_a_confusing_error(small_model, tmp_path):
    words = "python", PROGRAMS / "publish_and_prune.py", small_model, tmp_path / "run"
    process = start(*words, home=tmp_path)
    assert process.stdout.readline() == "ready\n"
    opened = meanwhile = 0
    try:
        for _ in range(counts(100, 2000)):
            checkpoint = require_checkpoint(tmp_path / "run")
            try:
                judging.open_trained(checkpoint)
                opened += 1
            except ArtifactError as e:
                assert "pruned meanwhile" in str(e) and "evaluate again" in str(e)
                meanwhile += 1
    finally:
        process.communicate("")
    assert opened and process.returncode == 0
    print(f"{opened} opened, {meanwhile} pruned meanwhile")


def test_the_newest_is_found_when_the_one_before_it_goes(small_model, tmp_path, monkeypatch):
    from codex_nb.train import checkpoint as module

    put(tmp_path, 1, small_model)
    open_artifact = module.open_artifact

    def gone(path, kind):
        if path.name == "step-00000001":  # while it is verified, a newer one takes its place
            put(tmp_path, 2, small_model)
            shutil.rmtree(path)
            raise FileNotFoundError(2, "No such file or directory", str(path / "config.json"))
        return open_artifact(path, kind)

    monkeypatch.setattr(module, "open_artifact", gone)
    assert require_checkpoint(tmp_path).path.name == "step-00000002"


@pytest.mark.parametrize("when", ["Tokenizer", "load_model"])
def test_a_checkpoint_that_goes_while_it_is_opened_is_named(
    when, small_model, tmp_path, monkeypatch
):
    put(tmp_path, 1, small_model)
    checkpoint, opener = require_checkpoint(tmp_path), getattr(judging, when)

    def late(*given):
        shutil.rmtree(checkpoint.path)
        return opener(*given)

    monkeypatch.setattr(judging, when, late)
    with pytest.raises(ArtifactError, match="step-00000001: pruned meanwhile.*evaluate again"):
        judging.open_trained(checkpoint)


def test_a_listing_that_misses_what_comes_and_what_goes_is_made_again(tmp_path, monkeypatch):
    from codex_nb.train.checkpoint import checkpoints

    old, new = tmp_path / "step-00000001", tmp_path / "step-00000002"
    old.mkdir()
    glob = Path.glob

    def unlucky(self, pattern):
        monkeypatch.setattr(Path, "glob", glob)
        new.mkdir()  # after its place in the listing was passed
        old.rmdir()
        return iter([old])

    monkeypatch.setattr(Path, "glob", unlucky)
    assert checkpoints(tmp_path) == [new]
    assert checkpoints(tmp_path / "none") == []
