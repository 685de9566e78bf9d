"""A small real distribution, built and installed: what it brings is listed, tried out, and used."""

import importlib
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from test_launch import BIN, ROOT

SOURCE = """
from codex_nb.data.documents import Document
from codex_nb.eval.metrics import TextMetric
vowels = TextMetric(lambda p, refs: float(p == refs[0] or p in refs), about="equal, to the letter")
lazy = TextMetric(lambda p, refs: 0.5, about="always the same")
bleu = TextMetric(lambda p, refs: 1.0)
def late(step, total, rise, cfg): return 1.0 if 2*step < total else 0.5
def poems(): return (Document(id=f"{i}", text=f"Rose {i} is red, and the violets were counted {i} times by the gardener.") for i in range(60)), {"by": "nobody"}
"""
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "rose-garden"
version = "2.5"
[project.entry-points."codex_nb.metric"]
vowels = "rose_garden:vowels"
lazy = "rose_garden:lazy"
gone = "rose_garden.nowhere:thing"
[project.entry-points."codex_nb.schedule"]
late = "rose_garden:late"
[project.entry-points."codex_nb.dataset"]
poems = "rose_garden:poems"
[tool.setuptools]
py-modules = ["rose_garden"]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    def install(conflict):
        d = tmp_path_factory.mktemp("garden")
        (d / "src").mkdir()
        (d / "src" / "rose_garden.py").write_text(SOURCE)
        (d / "src" / "pyproject.toml").write_text(
            PROJECT.replace('lazy = "', 'bleu = "rose_garden:bleu"\nlazy = "')
            if conflict
            else PROJECT
        )
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--no-build-isolation",
                "--target",
                d / "site",
                d / "src",
            ],
            check=True,
            capture_output=True,
        )
        return d / "site"

    return install


def codex(site, home, *words, **more):  # in a process of its own
    return subprocess.run(
        [BIN / "codex-nb", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": str(site), "CODEX_NB_HOME": str(home), "OMP_NUM_THREADS": "1"}
        | more,
    )


def here(site, home, *words, **more):  # in this one, which is quicker
    from codex_nb.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.modules.pop("rose_garden", None)
    with (
        patch.object(sys, "path", [str(site), *sys.path]),
        patch.dict(os.environ, {"CODEX_NB_HOME": str(home)} | more),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        importlib.invalidate_caches()
        try:
            main([*map(str, words)])
        except SystemExit as e:
            code = e.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def test_a_distribution(installed, tmp_path):
    site = installed(False)
    listed = codex(site, tmp_path, "plugins", "--json")
    assert listed.returncode == 1  # one cannot be loaded
    ours = {x["name"]: x for x in json.loads(listed.stdout) if x["source"] == "rose-garden"}
    assert {n: (x["kind"], x["version"], x["state"]) for n, x in ours.items()} == {
        "vowels": ("metric", "2.5", "ok"),
        "lazy": ("metric", "2.5", "ok"),
        "gone": ("metric", "2.5", "fails"),
        "poems": ("dataset", "2.5", "ok"),
        "late": ("schedule", "2.5", "ok"),
    }
    assert (
        "ModuleNotFoundError" in ours["gone"]["error"]
        and "ModuleNotFoundError" in here(site, tmp_path, "plugins").stdout
    )
    assert here(site, tmp_path, "plugins", "check", "vowels").returncode == 0
    wrong = here(site, tmp_path, "plugins", "check", "lazy")
    assert (
        wrong.returncode == 1
        and "an expected answer gets 0.5, not 1" in wrong.stdout
        and "does not keep" in wrong.stdout
    )
    assert (
        here(site, tmp_path, "plugins", "check", "poems").stdout
        == "dataset poems keeps its contract\n"
    )
    broken = here(site, tmp_path, "plugins", "check", "gone")
    assert (
        broken.returncode == 1
        and "of rose-garden cannot be loaded" in broken.stderr
        and "Traceback" not in broken.stderr
    )
    used = here(site, tmp_path, "data", "check", "poems", "--json", "--no-near")
    assert used.returncode == 0 and '"documents": 60' in used.stdout, used.stdout + used.stderr


def test_a_schedule_in_a_run(installed, tmp_path):
    "Asked for by name, it is trained with; where its package is missing, the run is refused before it begins."
    from test_launch import SMALL

    site, words = (
        installed(False),
        [
            "run",
            "train",
            *SMALL[3:],
            "-p",
            "steps",
            "4",
            "-p",
            "lr",
            "0.01",
            "-p",
            "warmup",
            "0",
            "-p",
            "lr_end",
            "0",
            "-p",
            "schedule",
            "late",
            "--quiet",
        ],
    )
    assert here(site, tmp_path, "plugins", "check", "schedule:late").returncode == 0
    done = codex(site, tmp_path, *words, "--folder", tmp_path / "runs" / "r")
    assert done.returncode == 0, done.stderr
    assert [
        r["values"]["lr"]
        for l in (tmp_path / "runs" / "r" / "metrics.ndjson").read_text().splitlines()
        if (r := json.loads(l))["split"] == "train"
    ] == [0.01, 0.01, 0.005, 0.005]
    refused = here(tmp_path, tmp_path / "new", *words)
    assert (
        refused.returncode == 1
        and "there is no schedule 'late'" in refused.stderr
        and "Traceback" not in refused.stderr
        and not (tmp_path / "new").exists()
    )


def test_a_name_that_is_taken(installed, tmp_path):
    site = installed(True)
    listed = json.loads(here(site, tmp_path, "plugins", "--json").stdout)
    assert {(x["source"], x["state"]) for x in listed if x["name"] == "bleu"} == {
        ("codex_nb", "conflict"),
        ("rose-garden", "conflict"),
    }
    refused = here(site, tmp_path, "plugins", "check", "metric:bleu")
    assert (
        refused.returncode == 1
        and "is offered by" in refused.stderr
        and {"rose-garden"} <= {w.strip(":,") for w in refused.stderr.split()}
    ), refused.stderr
    chosen = json.loads(
        here(site, tmp_path, "plugins", "--json", CODEX_NB_PREFER="metric:bleu=codex_nb").stdout
    )
    assert {(x["source"], x["state"]) for x in chosen if x["name"] == "bleu"} == {
        ("codex_nb", "ok"),
        ("rose-garden", "passed over"),
    }
    assert (
        here(
            site,
            tmp_path,
            "plugins",
            "check",
            "metric:bleu",
            CODEX_NB_PREFER="metric:bleu=codex_nb",
        ).returncode
        == 0
    )
    assert (
        "write KIND:NAME=PACKAGE" in here(site, tmp_path, "plugins", CODEX_NB_PREFER="bleu").stderr
    )
