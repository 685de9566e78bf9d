"""A run that starts while the store is cleaned keeps what it uses, or makes it again."""

import os

import pytest

from codex_nb.core import store
from codex_nb.core.artifacts import MANIFEST, open_artifact
from codex_nb.core.store import cached, find_stored, remove_unused, store_folder


def make(text="x"):
    "An artifact of the store, and whether it was made just now."
    made = []

    def build(draft):
        made.append(text)
        (draft.path / "text").write_text(text)

    return cached("corpus", {"text": text}, {}, ("core.store",), build), bool(made)


@pytest.fixture
def old(tmp_path, monkeypatch):
    "An artifact that was not used for years."
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    artifact, _ = make()
    os.utime(artifact.path / MANIFEST, (0, 0))
    return artifact


def between(monkeypatch, action):
    "Do something when an artifact has been chosen, before its lock is taken."
    acquire, done = store.Lock.acquire, []

    def first(self):
        if not done:
            done.append(True)
            action()
        return acquire(self)

    monkeypatch.setattr(store.Lock, "acquire", first)


OPENERS = {
    "cached": lambda a: make()[0],
    "find_stored": lambda a: find_stored("corpus", a.digest),
}


@pytest.mark.parametrize("opens", OPENERS)
def test_what_is_opened_after_the_decision_stays(opens, old, monkeypatch):
    between(monkeypatch, lambda: OPENERS[opens](old))
    assert remove_unused(days=1) == []
    assert open_artifact(old.path).digest == old.digest


def test_what_a_run_records_after_the_decision_stays(old, monkeypatch):
    used = set()
    between(monkeypatch, lambda: used.add(old.digest))
    assert remove_unused(days=1, keep=lambda: used) == []
    assert open_artifact(old.path).digest == old.digest


def test_what_a_recorded_artifact_is_made_from_stays(old, monkeypatch):
    child = cached("tokens", {}, {"corpus": old.digest}, ("core.store",), lambda draft: None)
    os.utime(child.path / MANIFEST, (0, 0))
    used = set()
    between(monkeypatch, lambda: used.add(child.digest))
    assert remove_unused(days=1, keep=lambda: used) == []


@pytest.mark.parametrize("opens", OPENERS)
def test_what_is_removed_before_it_is_opened_is_not_there(opens, old, monkeypatch):
    between(monkeypatch, lambda: remove_unused(days=1))
    if opens == "find_stored":
        assert find_stored("corpus", old.digest) is None
    else:
        again, made = make()
        assert made and again.digest == old.digest
    assert not [*store_folder("corpus").glob(".tmp-*")]


def test_the_command_reads_again_which_runs_use_what(old, monkeypatch):
    from codex_nb.cli.main import main
    from codex_nb.run import run_folder

    used = set()
    monkeypatch.setattr(run_folder, "in_use", lambda: used)
    between(monkeypatch, lambda: used.add(old.digest))
    with pytest.raises(SystemExit, match="0"):
        main(["store", "gc", "--days", "1"])
    assert open_artifact(old.path).digest == old.digest
