"""What is missing is missed by name, with the line that installs it: by the doctor, and by every command that needs it."""

import json
import os
import subprocess

import pytest
from test_launch import BIN, ROOT

PROVE = bool(os.environ.get("PROVE"))


def blocked(tmp_path, *names):
    for n in names:
        (tmp_path / "block" / n).mkdir(parents=True)
        (tmp_path / "block" / n / "__init__.py").write_text(
            f'raise ModuleNotFoundError("No module named {n!r}", name={n!r})'
        )
    return os.environ | {
        "PYTHONPATH": str(tmp_path / "block"),
        "CODEX_NB_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }


def codex(env, *words, **kw):
    return subprocess.run(
        [BIN / "codex-nb", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        **kw,
    )


from codex_nb.deploy.doctor import EXTRAS, NEEDED, remedy_for


@pytest.mark.parametrize("names", [(n,) for n in EXTRAS] if PROVE else [tuple(EXTRAS)])
def test_without_what_is_optional(names, tmp_path):
    done = codex(blocked(tmp_path, *names), "doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["healthy"], done.stdout + done.stderr
    checks = {c["name"]: c for c in found["checks"]}
    for n in names:
        assert (
            not checks[n]["available"]
            and checks[n]["remedy"] == remedy_for(n)
            and f"No module named '{n}'" in checks[n]["found"]
            and f"codex_nb[{EXTRAS[n][0]}]" in remedy_for(n)
        )
    assert all(c["available"] for n, c in checks.items() if n in NEEDED)
    assert not (tmp_path / "home").exists()


COMMANDS = {
    "run": ["run", "train"],
    "finetune": ["run", "finetune"],
    "evaluate": ["run", "evaluate"],
    "prepare": ["prepare", "RUN"],
    "preflight": ["preflight"],
    "sweep": ["sweep", "train", "-g", "lr=1e-3"],
    "compare": ["compare", "RUN", "RUN"],
    "generate": ["generate", "RUN", "--prompt", "a"],
}


def test_without_torch(tmp_path):
    env = blocked(tmp_path, "torch")
    done = codex(env, "doctor")
    assert (
        done.returncode == 1 and "BAD  torch" in done.stdout and "pip install torch" in done.stdout
    ), done.stdout + done.stderr
    assert codex(env, "--help").returncode == 0 and codex(env, "runs").returncode == 0
    for name, words in COMMANDS.items() if PROVE else list(COMMANDS.items())[::3]:
        done = codex(env, *(tmp_path / "RUN" if w == "RUN" else w for w in words))
        assert (
            done.returncode == 1
            and "torch is not installed" in done.stderr
            and "pip install torch" in done.stderr
            and "Traceback" not in done.stderr
        ), (name, done.stderr[-1500:])
    assert not (tmp_path / "home" / "runs").exists()
