"""What is missing is named, with the line that installs it: by the doctor and by every command."""

import json

import pytest
from helpers import PROVE, codex, counts

from codex_nb.deploy import doctor
from codex_nb.deploy.doctor import EXTRAS, NEEDED, remedy_for


def blocking(folder, *names):
    "A folder for PYTHONPATH in which packages cannot be imported."
    for name in names:
        package = folder / "block" / name
        package.mkdir(parents=True)
        error = f'ModuleNotFoundError("No module named {name!r}", name={name!r})'
        (package / "__init__.py").write_text(f"raise {error}\n")
    return str(folder / "block")


@pytest.mark.parametrize("names", [(n,) for n in EXTRAS] if PROVE else [tuple(EXTRAS)])
def test_doctor_is_content_without_the_extras_and_says_how_to_install_them(names, tmp_path):
    blocked = blocking(tmp_path, *names)
    done = codex("doctor", "--json", home=tmp_path / "home", PYTHONPATH=blocked)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["healthy"], done.stdout + done.stderr
    checks = {c["name"]: c for c in found["checks"]}
    for n in names:
        assert not checks[n]["available"] and checks[n]["remedy"] == remedy_for(n)
        assert f"No module named '{n}'" in checks[n]["found"]
        assert f"codex_nb[{EXTRAS[n][0]}]" in remedy_for(n)
    assert all(c["available"] for n, c in checks.items() if n in NEEDED)
    assert not (tmp_path / "home").exists()


def test_a_mac_has_a_check_of_its_gpu(monkeypatch):
    "By simulation: the name of the system, and what torch says."
    import torch

    monkeypatch.setattr(doctor.platform, "system", lambda: "Darwin")
    for available, expected in ((True, "device=mps"), (False, "training uses the CPU")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda a=available: a)
        monkeypatch.setattr(doctor, "_check_package", lambda *_: doctor.Check("package", ""))
        checks = {c.name: c for c in doctor.probe()}
        assert expected in checks["mps"].found and checks["mps"].available is available
        assert "cuda" not in checks and "run on Linux only" in checks["python"].found


COMMANDS = {
    "run": ["run", "train"],
    "finetune": ["run", "finetune"],
    "evaluate": ["run", "evaluate"],
    "prepare": ["prepare", "NEW"],
    "preflight": ["preflight"],
    "sweep": ["sweep", "train", "-g", "lr=1e-3"],
    "compare": ["compare", "RUN", "RUN"],
    "generate": ["generate", "RUN", "--prompt", "a"],
}


def test_commands_without_torch_say_how_to_install_it(tmp_path):
    where = dict(home=tmp_path / "home", PYTHONPATH=blocking(tmp_path, "torch"))
    (tmp_path / "RUN" / "checkpoints").mkdir(parents=True)  # what is there at the first look
    for name in ("config.json", "manifest.json"):
        (tmp_path / "RUN" / name).write_text("{}")
    done = codex("doctor", **where)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BAD  torch" in done.stdout and "pip install torch" in done.stdout
    assert codex("--help", **where).returncode == 0 and codex("runs", **where).returncode == 0
    for name in counts(list(COMMANDS)[::6], list(COMMANDS)):
        words = [tmp_path / w if w in ("RUN", "NEW") else w for w in COMMANDS[name]]
        done = codex(*words, **where)
        assert done.returncode == 1 and "Traceback" not in done.stderr, (name, done.stderr)
        assert "torch is not installed" in done.stderr, (name, done.stderr)
        assert "pip install torch" in done.stderr, name
    assert not (tmp_path / "home" / "runs").exists()
