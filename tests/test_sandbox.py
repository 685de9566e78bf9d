"""Programs that a model has written: not run unless asked for, and then they reach nothing."""

import json
import subprocess
import time

import psutil
import pytest
import yaml
from helpers import PROGRAMS, TESTS

from codex_nb.core.config import ConfigError
from codex_nb.core.sandbox import Limits, sandbox_problem
from codex_nb.eval.benchmarks import BENCHMARKS, read_benchmark
from codex_nb.eval.code_checks import CodeTest, check_code_setting, run_code, score_code
from codex_nb.eval.eval_config import TaskConfig

needs_sandbox = pytest.mark.skipif(
    sandbox_problem() is not None, reason=f"no sandbox on this machine: {sandbox_problem()}"
)
SQUARE = CodeTest("assert f(3) == 9\nassert f(-2) == 4", ("f",))
RIGHT = "def f(x):\n    return x * x\n"
CODE = TESTS / "fixtures" / "code_benchmarks"
HUMANEVAL = json.loads((CODE / "humaneval.json").read_text())
# With a class of the answer's own, code in front of the tests, and an import of its own
MBPP = json.loads((CODE / "mbpp.json").read_text())


def no_process(*args, **kwargs):
    raise AssertionError("a process was started")


def code_questions(tmp_path):
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(HUMANEVAL) + "\n")
    rows = [MBPP | {"task_id": n} for n in (2, 3, 4, 11)]
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_benchmark("humaneval", tmp_path)[0] + read_benchmark("mbpp", tmp_path)[0][-1:]


def test_without_the_setting_nothing_is_written_or_started(tmp_path, monkeypatch):
    from codex_nb.eval import tasks

    monkeypatch.setattr(subprocess, "Popen", no_process)
    monkeypatch.setattr(tasks, "_write_texts", no_process)
    for q in code_questions(tmp_path):
        with pytest.raises(ConfigError, match="not run unless you ask for it"):
            tasks.ask(None, None, [q], TaskConfig(task="x"))
        with pytest.raises(ConfigError, match="-p run_code sandbox"):
            score_code([RIGHT], [q.code], "refuse")
    assert TaskConfig().run_code == "refuse"


def test_without_bubblewrap_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="install the package bubblewrap"):
        check_code_setting("sandbox")


def test_bubblewrap_that_cannot_make_namespaces_is_refused(tmp_path, monkeypatch):
    "It is there, and the system forbids what it needs."
    program = tmp_path / "bwrap"
    program.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create a namespace' >&2\nexit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(program))
    with pytest.raises(ConfigError, match=r"cannot make a sandbox here .*allow user namespaces"):
        check_code_setting("sandbox")


@needs_sandbox
def test_right_answers_pass_and_wrong_ones_do_not(tmp_path):
    for q in code_questions(tmp_path):
        right = q.answers[0].removesuffix("\n[DONE]")
        assert run_code(right, q.code) == "passed"
        wrong = right.replace("- 1", "- 2").replace("1 + length", "2 + length")
        assert wrong != right and run_code(wrong, q.code).startswith("AssertionError: assert ")


def test_programs_are_asked_for_in_the_words_of_the_harness(tmp_path):
    from pathlib import Path

    lm_eval = pytest.importorskip("lm_eval")
    jinja2 = pytest.importorskip("jinja2")
    yaml.SafeLoader.add_constructor("!function", lambda loader, node: node.value)
    for q, row in zip(code_questions(tmp_path), (HUMANEVAL, MBPP)):
        name = q.id.partition("/")[0].lower()
        path = Path(lm_eval.__file__).parent / "tasks" / name / f"{name}.yaml"
        known = yaml.safe_load(path.read_text())
        asked = jinja2.Template(known["doc_to_text"], keep_trailing_newline=True).render(**row)
        assert q.prompt == asked
        assert [*q.stop] == known["generation_kwargs"]["until"]
        assert BENCHMARKS[name].shots == known["num_fewshot"]
    assert q.answers[0] == MBPP["code"] + "\n[DONE]"


ANSWERS = PROGRAMS / "answers"
REACHES = (ANSWERS / "reaches.py").read_text()
REACHED = {
    "file": "FileNotFoundError",
    "users": "FileNotFoundError",
    "processes": "FileNotFoundError",
    "tests": False,
    "packages": "ModuleNotFoundError",
    "write": ["OSError"] * 4,
    "change": "OSError",
    "fill": "OSError",
    "internet": "PermissionError",
    "sockets": ["PermissionError"] * 5,
    "fork": "PermissionError",
    "process": "PermissionError",
    "thread": "RuntimeError",
    "namespace": "EPERM",
    "memory": ["MemoryError", "EPERM"],
    "signal": "ProcessLookupError",
    "variables": ["LD_LIBRARY_PATH", "PYTHONHASHSEED"],
}


@needs_sandbox
def test_a_program_reaches_nothing(tmp_path, monkeypatch):
    "One program tries it all and says what came of it; each single result is compared."
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    own = tmp_path / "own.txt"
    own.write_text("mine")
    lines = [f"found = f({str(own)!r}, 80)"]
    lines += [f"assert found[{k!r}] == {v!r}" for k, v in REACHED.items()]
    lines += [f"assert found.keys() == {set(REACHED)!r}"]
    assert run_code(REACHES, CodeTest("\n".join(lines), ("f",))) == "passed"
    assert own.read_text() == "mine"


FORGERIES = sorted(path.stem for path in ANSWERS.glob("forge_*.py"))


@needs_sandbox
@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_faked(name):
    assert len(FORGERIES) > 11
    assert run_code((ANSWERS / f"{name}.py").read_text(), SQUARE) != "passed"


@needs_sandbox
def test_no_program_outlives_its_limits():
    "Neither one that computes, nor one that waits; and no process is left of any."
    limits = Limits(seconds=1, wall=60)
    start = time.monotonic()
    busy = "def f(x):\n    while True:\n        x += 1\n"
    assert run_code(busy, SQUARE, limits) == "more than 1 s of processor time"
    waits = "import time\ndef f(x):\n    time.sleep(60)\n"
    assert run_code(waits, SQUARE, Limits(wall=1)) == "more than 1 s"
    quiet = "import os, time\nos.closerange(3, 64)\ntime.sleep(60)\n"
    assert run_code(quiet, SQUARE, Limits(wall=1)) == "more than 1 s"
    hungry = "def f(x):\n    return len([bytes(1 << 20) for _ in range(4096)])\n"
    assert run_code(hungry, SQUARE, limits).startswith("MemoryError: assert f(3)")
    assert time.monotonic() - start < 60
    left = [p.cmdline() for p in psutil.Process().children(recursive=True)]
    assert not [words for words in left if "/python/bin/python3" in words]
