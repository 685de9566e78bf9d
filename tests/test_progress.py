"""What takes long is seen to work: on a terminal, across processes, not where it is unwanted."""

import io
import json
import os
import pty
import subprocess
import sys
import time

import nbformat
import pytest
from helpers import PROGRAMS

from codex_nb.core import progress


def screen(written):
    "What a terminal shows at the end."
    lines, column = [[]], 0
    for character in written:
        if character == "\r":
            column = 0
        elif character == "\n":
            lines.append([])
            column = 0
        else:
            lines[-1][column : column + 1] = [character]
            column += 1
    return [line for line in ("".join(line).rstrip() for line in lines) if line]


def on_terminal(program):
    "All that a program writes to a terminal."
    here, there = pty.openpty()
    env = os.environ | {"CODEX_NB_PROGRESS": "", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, program], stdout=there, stderr=there, env=env)
    os.close(there)
    written = b""
    while True:
        try:
            written += os.read(here, 4096)
        except OSError:  # the other end is closed
            break
    os.close(here)
    assert process.wait() == 0, written
    return written.decode().replace("\r\n", "\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def wanted(monkeypatch):
    monkeypatch.delenv("CODEX_NB_PROGRESS", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_bar_on_a_terminal_leaves_nothing_but_what_was_printed():
    written = on_terminal(PROGRAMS / "counted.py")
    assert "\r 25 % " in written and "step 1 of 4" in written
    assert screen(written) == ["a line"]


def test_work_of_a_launched_notebook_is_seen_on_the_terminal_alone(wanted, tmp_path, monkeypatch):
    from codex_nb.experiments import launch

    loop = (
        "import time\nfrom codex_nb.core.progress import track\n"
        "for i in track(range(6), 'step', 6):\n    time.sleep(0.4)\n    if i == 4: print('a line')"
    )
    parameters = nbformat.v4.new_code_cell("preset = None", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(loop)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(notebook, tmp_path / "train.ipynb")
    saved, write = [], launch._RunWriter.write

    def keep(writer, buf, path):
        saved.append(buf)
        write(writer, buf, path)

    monkeypatch.setattr(launch._RunWriter, "write", keep)
    monkeypatch.setattr(progress._Terminal, "first", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    outcome = launch.launch(str(tmp_path / "train.ipynb"), {}, tmp_path / "run", echo=True)
    assert outcome.status == "refused"  # it has started no run
    written = terminal.getvalue()
    assert "starting" in written and " 50 % " in written and "step 3 of 6" in written
    assert screen(written) == ["a line"]
    (outputs,) = [
        c["outputs"] for c in json.loads(saved[-1])["cells"] if "track(" in "".join(c["source"])
    ]
    assert ["".join(o["text"]) for o in outputs] == ["a line\n"]
    assert not os.environ.get("CODEX_NB_PROGRESS")


def test_training_says_step_loss_speed_and_where_it_was_stopped(wanted, tmp_path, monkeypatch):
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.settings import RunConfig

    texts, ends = [], []

    class Screen:
        first = every = 1e6

        def show(self, text, fraction): ...

        def hide(self): ...

        def close(self, text):
            ends.append(text)

    def look(work, *given):
        outer, *inner = progress._display.open
        texts.append(outer.line(inner))

    for name in ("at", "update"):
        change = getattr(progress.Progress, name)
        monkeypatch.setattr(
            progress.Progress,
            name,
            lambda work, *given, change=change: (change(work, *given), look(work)),
        )
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    monkeypatch.setattr(progress, "_find_screen", Screen)
    shape = {"width": 32, "layers": 1, "heads": 2, "seq_len": 32, "batch_size": 8, "minutes": 9}
    few = {"eval_documents": 4, "eval_every": 2, "max_documents": 4, "max_new_tokens": 4}
    train_and_judge(
        RunConfig.from_preset(
            "smoke",
            **shape | few | {"sinks": "none", "compile": "off", "patience": 1, "min_delta": 99},
        )
    )
    assert any(t.startswith("reading: document") for t in texts)
    assert any(t.startswith("step 2 of ") and "  loss " in t and " tokens/s" in t for t in texts)
    assert any(", scoring: batch 1 of " in t for t in texts)
    assert any(end.startswith("stopped at step 4 of ") for end in ends)
    assert any(end.startswith("evaluating: document") for end in ends)
    assert progress._display.open == []


def test_quiet_command_shows_no_progress_and_leaves_the_setting_alone(
    wanted, tmp_path, monkeypatch
):
    from codex_nb.cli.main import main

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    settings = []
    begin = progress._Display.begin

    def spy(display, work):
        settings.append(os.environ.get("CODEX_NB_PROGRESS"))
        begin(display, work)

    monkeypatch.setattr(progress._Display, "begin", spy)
    (tmp_path / "a.txt").write_text("A text.\n" * 200)
    words = ["data", "check", str(tmp_path / "a.txt"), "--no-rows", "--no-near"]
    for more, expected in ([], None), (["--quiet"], "off"):
        settings.clear()
        with pytest.raises(SystemExit) as end:
            main([*words, *more])
        assert not end.value.code and {*settings} == {expected}
    assert "CODEX_NB_PROGRESS" not in os.environ


def test_counting_costs_a_loop_next_to_nothing():
    began = time.perf_counter()
    for _ in progress.track(range(100_000), "item"):
        pass
    assert time.perf_counter() - began < 1  # 10 µs each; 0.2 µs where nothing else runs
