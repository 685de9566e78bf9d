"""A run that a stranger made is verified, replayed and resumed without doing what it asks for."""

import json
import shutil

import pytest
from helpers import codex, counts, flags, shared_folder

SMALL = dict(
    width=32,
    seq_len=32,
    batch_size=4,
    steps=6,
    eval_every=3,
    save_every=3,
    eval_documents=2,
    max_documents=4,
    max_new_tokens=4,
    resamples=100,
)
MARK = "import os, pathlib\npathlib.Path(os.environ['MARK']).touch()\n"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    "A finished run, to be copied."

    def make(home):
        done = codex("run", "train", *flags(SMALL), "--folder", home / "runs" / "made", home=home)
        assert done.returncode == 0, done.stderr

    return shared_folder(tmp_path_factory, "stranger", make) / "runs" / "made"


@pytest.fixture
def stranger(trained, tmp_path):
    "The run in a folder with notebooks and modules that leave a mark when they are executed."
    folder = shutil.copytree(trained, tmp_path / "theirs")
    notebook = json.loads((folder / "train.ipynb").read_text())
    notebook["cells"] = [
        {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": s}
        for s in (MARK, "raise SystemExit")
    ]
    (folder / "nbs").mkdir()
    for path in (folder / "train.ipynb", folder / "nbs" / "train.ipynb"):
        path.write_text(json.dumps(notebook))
    for name in ("pandas", "matplotlib", "torch", "codex_nb", "transformers", "tqdm"):
        (folder / f"{name}.py").write_text(MARK)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"started_in": "."}))
    return folder


def interrupt(folder):
    "As if the run had been stopped before its end."
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    shutil.rmtree(folder / "evaluations")


@pytest.mark.parametrize(
    "words", counts([["replay", "."]], [["replay", "."], ["resume", "."]]), ids=lambda w: w[0]
)
def test_nothing_in_a_strangers_folder_is_executed(stranger, tmp_path, words):
    if words[0] == "resume":
        interrupt(stranger)
    mark = tmp_path / "mark"
    home = tmp_path / "home"
    done = codex(*words, home=home, cwd=stranger, fresh=True, MARK=str(mark))
    assert not mark.exists(), done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert "sealed" in said or "proven" in said, said  # the package's notebook was executed


def test_resume_writes_nothing_where_the_run_says(stranger, tmp_path):
    interrupt(stranger)
    target = tmp_path / "profile"
    target.write_text("mine")
    record = json.loads((stranger / "config.json").read_text())
    record["config"]["monitor"]["prometheus_file"] = str(target)
    record["sources"]["prometheus_file"] = "given"
    (stranger / "config.json").write_text(json.dumps(record))
    done = codex("resume", stranger, home=tmp_path / "home")
    assert done.returncode == 0, done.stdout + done.stderr
    assert target.read_text() == "mine"
    assert "prometheus_file: not taken from the run" in done.stdout


def test_a_damaged_run_beside_it_does_not_stop_a_new_one(trained, tmp_path):
    home = tmp_path / "home"
    beside = home / "runs" / "damaged"
    shutil.copytree(trained, beside)
    (beside / "manifest.json").write_text('{"kind": "run", "meta": []}')
    done = codex("run", "train", *flags(SMALL), "--folder", home / "runs" / "new", home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "damaged" in codex("runs", home=home).stdout


def test_a_lock_that_leads_elsewhere_is_left_alone(trained, tmp_path, monkeypatch):
    from codex_nb.run.run_folder import list_runs

    folder = shutil.copytree(trained, tmp_path / "runs" / "theirs")
    interrupt(folder)
    (tmp_path / "private").write_text("mine")
    (folder / ".lock").unlink(missing_ok=True)
    (folder / ".lock").symlink_to(tmp_path / "private")
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    assert [r["status"] for r in list_runs()] == ["interrupted"]
    assert (tmp_path / "private").read_text() == "mine"
