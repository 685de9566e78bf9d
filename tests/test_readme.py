"""The commands of the README do what it says: those that execute a notebook at full counts, the others always."""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from test_launch import BIN, ROOT

PROVE = bool(os.environ.get("PROVE"))
TEXT = (ROOT / "README.md").read_text()
COMMANDS = list(
    dict.fromkeys(
        c
        for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S)
        for l in block.splitlines()
        if (c := l.split("#")[0].strip())
    )
)
ELSEWHERE = {  # what is executed by other tests, and why not here
    "make": "the gate itself",
    "torchrun": "two hosts: tests/test_distributed.py",
    "codex-nb resume RUN": "needs one that was stopped: tests/test_launch.py",
    "codex-nb prune": "needs one that was stopped: nbs/cli/93_main.ipynb",
    "python3 carried/install.py": "tests/test_bundle.py",
    "codex-nb leaderboard": "needs a sweep: tests/test_sweep.py",
}
SMALLER = {
    "-p preset tiny": "-p preset smoke -p steps 3",
    "-p steps 500": "-p steps 3",
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


def test_all_are_looked_at():
    assert len(COMMANDS) > 35 and all(
        any(c.startswith(w) for c in COMMANDS) for w in (*ELSEWHERE, *EXECUTES)
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder in which the README's names mean something."
    home = tmp_path_factory.mktemp("readme")
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.settings import RunConfig

    with pytest.MonkeyPatch.context() as m:
        m.setenv("CODEX_NB_HOME", str(home))
        for name, width in (("first", 32), ("second", 16)):
            run = train_and_judge(
                RunConfig.from_preset(
                    "smoke",
                    width=width,
                    heads=2,
                    steps=12,
                    seq_len=64,
                    max_documents=20,
                    resamples=100,
                    max_new_tokens=8,
                ),
                home / "runs" / name,
            )
    for name in ("asyncio", "email", "json", "logging", "unittest"):
        shutil.copytree(
            Path(sysconfig.get_path("stdlib")) / name,
            home / "path" / "to" / "text" / name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copyfile(ROOT / "data" / "chat.jsonl", home / "talks.jsonl")
    shutil.copytree(
        ROOT / "nbs", home / "nbs", ignore=shutil.ignore_patterns("tutorials", "[0-9]*")
    )
    shutil.copytree(
        max((run.folder / "checkpoints").glob("step-*")),
        home / "somewhere" / "llama",
        ignore=shutil.ignore_patterns("manifest.json", "optimizer.safetensors", "state.json"),
    )
    (home / "policy.yaml").write_text(re.search(r"```yaml\n(schema.*?)```", TEXT, re.S)[1])
    return home


@pytest.mark.parametrize(
    "command",
    [
        c
        for c in COMMANDS
        if not c.startswith(tuple(ELSEWHERE)) and (PROVE or not c.startswith(EXECUTES))
    ],
)
def test_command(command, place):
    words = command
    for a, b in SMALLER.items():
        words = words.replace(a, b)
    for name, real in (
        ("RUN", "first"),
        ("OTHER", "second"),
        ("FOLDER", "somewhere/llama"),
        ("NAME", "llama"),
    ):
        words = re.sub(rf"\b{name}\b", real, words)
    if (
        "models import" not in command
        and "llama" in words
        and not (place / "models" / "llama").exists()
    ):  # in any order
        subprocess.run(
            [BIN / "codex-nb", "models", "import", "somewhere/llama"],
            cwd=place,
            check=True,
            capture_output=True,
            env=os.environ | {"CODEX_NB_HOME": str(place)},
        )
    if "models import" in command:
        shutil.rmtree(place / "models", ignore_errors=True)
    (shutil.rmtree if (place / "runs" / "big").exists() else lambda p: None)(place / "runs" / "big")
    env = os.environ | {
        "CODEX_NB_HOME": str(place),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        shlex.split(words),
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
        input="One day\n",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
