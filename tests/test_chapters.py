"""`make test` executes every chapter once, against the compiled module: what it must notice.

The chapters themselves are collected by nbval (`pytest nbs --nbval --warm`). Here are small ones
that claim to be codex_nb.core.config, damaged in each way that only this execution would find.
"""

import json
import subprocess
import sys

import pytest
from helpers import ROOT, environment
from nbformat import v4

EXPORT = "#| export\ndef suggest(word, known):\n    return 'as the notebook has it'"
LESSON = "suggest('epohcs', ['epochs'])"
SHOWN = "'did you mean epochs?'"

# cells, what they are said to show, and what must be found
CHAPTERS = {
    "in-order": ((EXPORT, LESSON), {2: SHOWN}, None),
    "another-output": ((EXPORT, LESSON), {2: "'something'"}, "Cell outputs differ"),
    "failing-lesson": ((EXPORT, "assert suggest('a', ['b']) == 1"), {}, "AssertionError"),
    "used-before-its-cell": ((LESSON, EXPORT), {1: SHOWN}, "NameError"),
    "not-in-the-module": (("#| export\nnowhere = 1", "nowhere"), {2: "1"}, "AttributeError"),
    "for-a-module-alone": (("#| export\nfrom .safety import redact",), {}, "ImportError"),
}


def notebook(cells, shown):
    sources = ["#| default_exp core.config", *cells]
    nb = v4.new_notebook(cells=[v4.new_code_cell(s, execution_count=1) for s in sources])
    for number, text in shown.items():
        data = {"text/plain": text}
        nb.cells[number].outputs = [v4.new_output("execute_result", data, execution_count=1)]
    return json.dumps(nb)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    "What the execution of all of them said: name -> its failure, as text."
    folder = tmp_path_factory.mktemp("chapters")
    for name, (cells, shown, _) in CHAPTERS.items():
        (folder / f"{name}.ipynb").write_text(notebook(cells, shown))
    words = ["pytest", folder, "--nbval", "--nbval-current-env", "--warm", "--color=no"]
    words += ["--rootdir", folder, "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", *words, "--confcutdir", folder, "-p", "conftest"],
        cwd=ROOT,
        env=environment(folder, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    failures, _, summary = done.stdout.partition("short test summary info")
    assert "5 failed" in summary, done.stdout + done.stderr
    sections = failures.split("\n____")
    return {name: "".join(s for s in sections if f"{name}.ipynb::" in s) for name in CHAPTERS}


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_that_does_not_hold_for_its_module_is_found(name, report):
    *_, message = CHAPTERS[name]
    if message is None:
        assert report[name] == ""
    else:
        assert message in report[name], report[name]
