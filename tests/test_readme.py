"""The commands of the README and of the guides do what they say.

Those that execute a notebook are run in `make prove`, the others always.
"""

import json
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from helpers import BIN, NBS, PROVE, ROOT, codex, environment, shared_folder


def text_of(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


GUIDES = sorted((NBS / "guides").glob("*.ipynb"))
TEXT = "\n\n".join([(ROOT / "README.md").read_text(), *map(text_of, GUIDES)])


def commands_of(text):
    "The commands in a text's blocks of shell, each once, without comments."
    lines = [
        line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.split("\n")
    ]
    return list(dict.fromkeys(c for line in lines if (c := line.split("#")[0].strip())))


COMMANDS = commands_of(TEXT)
ELSEWHERE = {  # what is executed by other tests, and why not here
    "make": "the gate itself",
    "torchrun": "two hosts: tests/test_distributed.py",
    "codex-nb resume RUN": "needs one that was stopped: tests/test_launch.py",
    "codex-nb prune": "needs one that was stopped: nbs/cli/93_main.ipynb",
    "python3 carried/install.py": "tests/test_bundle.py",
    "codex-nb leaderboard": "needs a sweep: tests/test_sweep.py",
    "codex-nb serve": "has no end: tests/test_serve.py",
    "codex-nb run train -p depth": "takes ten minutes: tests/test_depth.py",
    "codex-nb export RUN --to gguf": "needs tokenizer=bpe-gpt2: tests/test_export_model.py",
}
SMALLER = {
    "-p preset tiny": "-p preset smoke -p steps 3",
    "-p steps 500": "-p steps 3",
    "-p steps 300": "-p steps 3",
    "--trials 20": "--trials 2",
    "-p preset gpt2-124m": "-p preset smoke",
}
EXECUTES = (
    "papermill",
    "codex-nb run",
    "codex-nb sweep",
    "codex-nb replay",
    "codex-nb bundle",
    "codex-nb preflight",
    "codex-nb doctor",
)
NAMES = {"RUN": "first", "OTHER": "second", "FOLDER": "somewhere/llama", "NAME": "llama"}


def test_every_command_is_executed_somewhere():
    assert len(COMMANDS) > 35
    for start in (*ELSEWHERE, *EXECUTES):
        assert any(c.startswith(start) for c in COMMANDS), start


def make_place(home):
    "A folder in which the README's names mean something."
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.settings import RunConfig

    settings = dict(heads=2, steps=12, seq_len=64, max_documents=20, resamples=100)
    settings |= dict(max_new_tokens=8)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CODEX_NB_HOME", str(home))
        for name, width in (("first", 32), ("second", 16)):
            cfg = RunConfig.from_preset("smoke", width=width, **settings)
            run = train_and_judge(cfg, home / "runs" / name)
    for name in ("asyncio", "email", "json", "logging", "unittest"):
        shutil.copytree(
            Path(sysconfig.get_path("stdlib")) / name,
            home / "path" / "to" / "text" / name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copyfile(ROOT / "data" / "chat.jsonl", home / "chats.jsonl")
    (home / "alpaca.json").write_text('[{"instruction": "Add.", "input": "2, 2", "output": "4"}]')
    (home / "nbs").mkdir()
    for p in NBS.glob("*.ipynb"):
        shutil.copyfile(p, home / "nbs" / p.name)
    shutil.copytree(
        max((run.folder / "checkpoints").glob("step-*")),
        home / "somewhere" / "llama",
        ignore=shutil.ignore_patterns("manifest.json", "optimizer.safetensors", "state.json"),
    )
    (home / "policy.yaml").write_text(re.search(r"```yaml\n(schema.*?)```", TEXT, re.S)[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = shared_folder(tmp_path_factory, "readme", make_place)
    return shutil.copytree(made, tmp_path_factory.mktemp("place") / "home")


def with_names_of(place, command):
    "The words of a command, smaller and with names that mean something here."
    for a, b in SMALLER.items():
        command = command.replace(a, b)
    for name, real in NAMES.items():
        command = re.sub(rf"\b{name}\b", real, command)
    return shlex.split(command)


def here(command):
    return not command.startswith(tuple(ELSEWHERE)) and (PROVE or not command.startswith(EXECUTES))


@pytest.mark.parametrize("command", [c for c in COMMANDS if here(c)])
def test_command_of_the_readme_succeeds(command, place):
    words = with_names_of(place, command)
    where = dict(home=place, cwd=place)
    imported = place / "models" / "llama"
    if "models import" in command:
        shutil.rmtree(place / "models", ignore_errors=True)
    elif "llama" in words and not imported.exists():  # in any order
        codex("models", "import", "somewhere/llama", **where)
    shutil.rmtree(place / "runs" / "big", ignore_errors=True)
    if words[0] == "codex-nb":
        done = codex(*words[1:], input="One day\n", **where)
    else:
        done = subprocess.run(
            words,
            cwd=place,
            env=environment(place, PATH=f"{BIN}:{environment(place)['PATH']}"),
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
