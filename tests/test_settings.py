"""Settings can be found and given in every way, and what is wrong is refused at once."""

import json
import os
import subprocess
import sys

import pytest
from helpers import BIN, PROGRAMS, environment

from codex_nb.cli import main as cli
from codex_nb.core.config import ConfigError
from codex_nb.experiments import launch as launcher
from codex_nb.run.settings import FinetuneConfig, RunConfig

HELP = [["--help"], ["--version"]]
REFUSED = {
    "run train lrr=3": "lrr: unknown parameter, given 3; did you mean lr?",
    "run train lr=x": "codex-nb: lr: given 'x'; must be float",
    "run train data=nowhere": "nowhere: there is no such file or folder",
    "run train base=nothing": "base: no model 'nothing'",
    "run evaluate checkpoint=nothing": "nothing: no such run",
    'run compare runs=["a","b"]': "a: no such run",
    "sweep train -g lrr=1,2": "did you mean lr?",
    "preflight lrr=3": "did you mean lr?",
    "prepare out lrr=3": "did you mean lr?",
    "data check x lrr=3": "did you mean lr?",
    "compare a": "1 given: name two runs or more",
    "compare a b": "a: no such run",
    "generate nothing": "base: no model 'nothing'",
    "generate nothing temprature=1": "did you mean temperature?",
    "chat nothing": "base: no model 'nothing'",
    "models verify nothing": "no model 'nothing'",
    "tokenizer encode nothing a": "nothing: no tokenizer of this name",
    "verify nothing": "nothing: no such run",
    "resume nothing": "nothing: no such run",
    "replay nothing": "nothing: no such run",
    "diff a b": "a: no such run",
    "leaderboard nothing": "nothing: no such run",
    "prune nothing": "nothing: no such run",
    "card nothing": "nothing: no such run",
    "report nothing": "nothing: no such run",
    "export nothing --to csv": "nothing: no such run",
    "bundle out --model nothing": "base: no model 'nothing'",
    "settings learning_rate": "here it is called lr",
    "presets --notebook tran": "did you mean train?",
}


def test_refusals_import_no_large_library(tmp_path):
    "Help needs no settings; no refusal needs torch."
    lists = [
        ["run", "--help"],
        ["models", "list"],
        ["settings"],
        ["presets"],
        ["run", "train", "--help"],
    ]
    lines = [*HELP, *(line.split() for line in REFUSED), *lists]
    done = subprocess.run(
        [sys.executable, PROGRAMS / "refuse_quickly.py"],
        input="".join(json.dumps(words) + "\n" for words in lines),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(tmp_path),
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(lines), done.stderr
    for words, (code, out, err, heavy) in zip(lines, results, strict=True):
        line = " ".join(words)
        assert code == (1 if line in REFUSED else 0), (line, err)
        assert REFUSED.get(line, "") in err, (line, err)
        assert heavy == ([] if words in HELP else ["pydantic"]), line  # Typer imports it, too
        assert bool(out) == (code == 0), line
    assert os.listdir(tmp_path) == []


def refusal(capsys, *words):
    "What a command writes that ends with an error."
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_all_errors_of_a_call_at_once(capsys, monkeypatch, tmp_path):
    "By the names that were typed, also old ones."
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    err = refusal(capsys, "run", "train", "preset=tinny", "epohcs=3", "lr=7", "keep_apart=1")
    lines = [line.split(":")[0] for line in err.splitlines()]
    assert lines == ["codex-nb", "  epohcs", "  preset", "  keep_apart", "  lr"], err
    assert "4 settings cannot be used" in err and "optim.lr" not in err
    err = refusal(capsys, "run", "train", "lr", "-p", "steps=1", "steps=2", "seed=NaN")
    assert [line.split(":")[0] for line in err.splitlines()[1:]] == ["  lr", "  seed", "  steps"]


@pytest.fixture
def given(monkeypatch, tmp_path):
    "What `launch` is given by a command."
    calls = []

    def launch(notebook, parameters=None, *more, **named):
        calls.append(parameters)
        return launcher.Outcome(None, "refused", 1, "not started in this test")

    monkeypatch.setattr(launcher, "launch", launch)
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    return calls


def test_three_ways_to_give_settings(given, capsys, tmp_path):
    "The command line wins over the file, also where a limit clears another."
    file = tmp_path / "run.yaml"
    file.write_text("preset: tiny\nsteps: 9\noptim: {lr: 2e-3, beta1: 0.8}\ncompile: off\n")
    words = ["lr=1e-3", "-p", "epochs", "3", "-p", "seed=4", "--config", str(file)]
    refusal(capsys, "run", "train", *words)
    expected = {"preset": "tiny", "lr": 1e-3, "epochs": 3, "seed": 4, "beta1": 0.8}
    assert given == [expected | {"compile": "off"}]
    refusal(capsys, "sweep", "train", "-g", "width=32,64", *words)
    assert given[1]["given"] == given[0]
    file.write_text("lr: 1e-3\n\nepohcs: 3\n")
    err = refusal(capsys, "run", "train", "--config", str(file))
    assert f"{file}:3: epohcs: unknown parameter; did you mean epochs?" in err


def test_every_command_has_a_heading_and_a_sentence(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert "Other commands" not in shown and "..." not in shown.partition("Run:")[2]
    listed = [name for names in cli.HEADINGS.values() for name in names]
    for name in listed:
        assert f"\n  {name} " in shown, name


def test_a_shell_completes_commands_and_settings(tmp_path):
    for typed, expected in (("codex-nb pres", "presets"), ("codex-nb run train warm", "warmup=")):
        env = environment(tmp_path, COMP_WORDS=typed, COMP_CWORD=str(typed.count(" ")))
        done = subprocess.run(
            [BIN / "codex-nb"],
            capture_output=True,
            text=True,
            env=env | {"_CODEX_NB_COMPLETE": "complete_bash"},
        )
        assert done.stdout.split() == [expected], done.stderr


def test_an_error_in_a_notebook_is_brief(capsys):
    "The line of the cell and the message; `%tb` shows the rest."
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell(colors="nocolor")
    InteractiveShell._instance, before = shell, InteractiveShell._instance
    try:
        shell.run_cell("import codex_nb as cx\ncx.RunConfig.from_preset(lr=7)")
        brief = capsys.readouterr().out
        shell.run_line_magic("tb", "")
        full = capsys.readouterr().out
        shell.run_cell("{}['no fault of a user']")
        fault = capsys.readouterr().out
    finally:
        InteractiveShell._instance = before
    assert "----> 2 cx.RunConfig.from_preset(lr=7)" in brief and "core/config.py" not in brief
    assert brief.rstrip().endswith("ConfigError: lr: given 7; must be float, > 0, <= 1")
    assert len(brief.splitlines()) < 10
    assert "core/config.py" in full and "%tb" not in full
    assert "KeyError" in fault


def test_windows_is_refused_in_one_sentence():
    "As far as can be shown elsewhere: without what Windows lacks, and by its name."
    done = subprocess.run(
        [sys.executable, PROGRAMS / "refuse_windows.py"], capture_output=True, text=True
    )
    assert done.returncode == 1
    for text in (done.stdout, done.stderr):
        assert "runs on Linux and macOS, and not on Windows" in text and text.count("\n") == 1


@pytest.mark.parametrize("cls", [RunConfig, FinetuneConfig])
def test_a_setting_of_another_tool_names_ours(cls):
    with pytest.raises(ConfigError, match="here it is called lr"):
        cls.check(learning_rate=1e-3)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "qwen3_moe", "gpt2"])
def test_parameters_are_counted_without_building(arch):
    from codex_nb.model.causal_lm import build_model, count_parameters
    from codex_nb.model.model_config import ModelConfig
    from codex_nb.run.setting_table import parameter_count

    for tied in (True, False):
        kv_heads = None if arch == "gpt2" else 2
        cfg = ModelConfig(
            arch=arch, width=32, layers=2, heads=4, kv_heads=kv_heads, tie_embeddings=tied
        )
        assert parameter_count(cfg, 300) == count_parameters(build_model(cfg, 300, 0, 0))
