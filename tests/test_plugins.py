"""A small real distribution, built and installed: what it brings is listed, checked and used."""

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from helpers import PROGRAMS, codex, flags, shared_folder, train_records

CHOICE = "metric:bleu=codex_nb"


@pytest.fixture(scope="session")
def garden(tmp_path_factory):
    "A folder into which the distribution was installed."

    def make(folder):
        source = shutil.copytree(PROGRAMS / "rose_garden", folder / "source")
        words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
        pip = [sys.executable, "-m", "pip", *words, folder / "site", source]
        subprocess.run(pip, check=True, capture_output=True)

    return shared_folder(tmp_path_factory, "garden", make) / "site"


@pytest.fixture
def garden_with_conflict(garden, tmp_path):
    "The same, offering a metric of a name that is taken."
    site = shutil.copytree(garden, tmp_path / "site")
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    text, line = entry_points.read_text(), "lazy = rose_garden:lazy\n"
    assert line in text
    entry_points.write_text(text.replace(line, line + "bleu = rose_garden:bleu\n"))
    return site


def installed(site, home, *words):
    "Run `codex-nb` in a new process that sees what is installed at `site`."
    return codex(*words, home=home, PYTHONPATH=str(site))


def inside(site, home, *words, **env):
    "The same within this process, which is quicker."
    from codex_nb.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.modules.pop("rose_garden", None)
    with (
        patch.object(sys, "path", [str(site), *sys.path]),
        patch.dict(os.environ, {"CODEX_NB_HOME": str(home)} | env),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        importlib.invalidate_caches()
        try:
            main([*map(str, words)])
        except SystemExit as e:
            code = e.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def test_installed_plugins_are_listed_checked_and_used(garden, tmp_path):
    listed = installed(garden, tmp_path, "plugins", "--json")
    assert listed.returncode == 1  # one cannot be loaded
    ours = {x["name"]: x for x in json.loads(listed.stdout) if x["source"] == "rose-garden"}
    assert {n: (x["kind"], x["version"], x["state"]) for n, x in ours.items()} == {
        "vowels": ("metric", "2.5", "ok"),
        "lazy": ("metric", "2.5", "ok"),
        "gone": ("metric", "2.5", "fails"),
        "poems": ("dataset", "2.5", "ok"),
        "late": ("schedule", "2.5", "ok"),
    }
    assert "ModuleNotFoundError" in ours["gone"]["error"]
    assert "ModuleNotFoundError" in inside(garden, tmp_path, "plugins").stdout

    def check(name):
        return inside(garden, tmp_path, "plugins", "check", name)

    assert check("vowels").returncode == 0
    wrong = check("lazy")
    assert wrong.returncode == 1 and "an expected answer gets 0.5, not 1" in wrong.stdout
    assert "does not keep" in wrong.stdout
    assert check("poems").stdout == "dataset poems keeps its contract\n"
    broken = check("gone")
    assert broken.returncode == 1 and "of rose-garden cannot be loaded" in broken.stderr
    assert "Traceback" not in broken.stderr
    used = inside(garden, tmp_path, "data", "check", "poems", "--json", "--no-near")
    assert used.returncode == 0, used.stderr
    assert '"documents": 60' in used.stdout


def test_schedule_of_a_plugin_is_trained_with_or_the_run_is_refused(garden, tmp_path):
    settings = dict(steps=4, width=32, seq_len=32, batch_size=2, eval_documents=1)
    settings |= dict(max_documents=4, max_new_tokens=4, resamples=100)
    settings |= dict(lr=0.01, warmup=0, lr_end=0, schedule="late")
    words, folder = ["run", "train", *flags(settings), "--quiet"], tmp_path / "runs" / "r"
    assert inside(garden, tmp_path, "plugins", "check", "schedule:late").returncode == 0
    done = installed(garden, tmp_path, *words, "--folder", folder)
    assert done.returncode == 0, done.stderr
    rates = [r["values"]["lr"] for r in train_records(folder)]
    assert rates == [0.01, 0.01, 0.005, 0.005]
    # where its package is missing, the run is refused before it begins
    refused = inside(tmp_path, tmp_path / "new", *words)
    assert refused.returncode == 1 and "there is no schedule 'late'" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "new").exists()


def test_two_plugins_of_one_name_are_a_conflict_until_one_is_chosen(garden_with_conflict, tmp_path):
    def states(**env):
        listed = json.loads(
            inside(garden_with_conflict, tmp_path, "plugins", "--json", **env).stdout
        )
        return {(x["source"], x["state"]) for x in listed if x["name"] == "bleu"}

    def check(**env):
        return inside(garden_with_conflict, tmp_path, "plugins", "check", "metric:bleu", **env)

    assert states() == {("codex_nb", "conflict"), ("rose-garden", "conflict")}
    refused = check()
    assert refused.returncode == 1 and "is offered by" in refused.stderr
    assert "rose-garden" in refused.stderr
    chosen = states(CODEX_NB_PREFER=CHOICE)
    assert chosen == {("codex_nb", "ok"), ("rose-garden", "passed over")}
    assert check(CODEX_NB_PREFER=CHOICE).returncode == 0
    badly = inside(garden_with_conflict, tmp_path, "plugins", CODEX_NB_PREFER="bleu")
    assert "write KIND:NAME=PACKAGE" in badly.stderr


@pytest.mark.parametrize("order", [("mine", "theirs"), ("theirs", "mine")])
def test_two_offers_are_named_in_one_order_however_they_are_found(order, tmp_path, monkeypatch):
    from codex_nb.core.plugins import PluginError, get

    for package in order:
        info = tmp_path / package / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[codex_nb.number]\nplain = math:pi\n")
    monkeypatch.setattr(sys, "path", [*(str(tmp_path / p) for p in order), *sys.path])
    with pytest.raises(PluginError, match="by mine and by theirs: .*=number:plain=theirs"):
        get("number", "plain")
