"""The package is made of known, licensed, locked, linted parts; a release is all or nothing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import BIN, PROVE, ROOT
from packaging.requirements import Requirement

sys.path.insert(0, str(ROOT / "tools"))


def test_the_lock_is_as_pyproject_and_the_environment():
    import lock

    assert lock.wrong() == [] and len(lock.locked()) > 100 and "://" not in lock.LOCK.read_text()


def test_check_of_the_lock_finds_each_fault():
    import lock

    one = [(Requirement("a==1.0"), ["0" * 64])]

    def said(needs=(), pins=one, installed=lambda n: "1.0"):
        return lock.wrong(pins, [Requirement(n) for n in needs], installed)

    assert said() == [] == said(["a>=0.5", "torch>=2"])
    assert said(["a>=2"]) == ["a>=2: the lock has 1.0"]
    assert said(["b"]) == ["b: not in the lock"]
    assert said(["torch>=9"]) == [f"torch>=9: the lock has {lock.TORCH}"]
    assert said(installed=lambda n: "1.1") == ["a: 1.1 is installed, the lock has 1.0"]
    assert said(pins=[(Requirement("a==1.0"), [])]) == ["a: not one version with hashes"]
    assert said(pins=[(Requirement("nvidia-cublas==1.0"), ["0" * 64])]) == [
        "nvidia-cublas: torch and its CUDA parts are not locked"
    ]


def test_bill_of_materials_and_licences():
    import sbom
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    rows = sbom.parts()
    text = sbom.make(rows)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None and text == sbom.make(
        rows
    )
    found = {c["name"]: c for c in json.loads(text)["components"]}
    assert (
        len(found) > 200
        and found["safetensors"]["scope"] == "required"
        and found["safetensors"]["hashes"]
        and found["peft"]["scope"] == "optional"
        and found["nbdev"]["scope"] == "excluded"
    )
    assert not sbom.doubts(rows)
    assert sbom.doubts(
        [
            ("x", "1", "required", [], "GPL-3.0"),
            ("y", "1", "excluded", [], "GPL-3.0"),
            ("z", "1", "optional", [], "?"),
        ]
    ) == ["x 1: GPL-3.0", "z 1: ?"]
    assert {name for name, *_, licence in rows if licence == "?"} == set()


LINTERS = {
    "format": ["ruff", "format", "--check", "--quiet"],
    "lint": ["ruff", "check", "--quiet"],
    "types": ["mypy"],
    "security": ["bandit", "-q", "-r", "codex_nb", "tools", "-c", "pyproject.toml"],
}


# Where `make check` and `make prove` look at the types of these, `make test` takes what they give
# for anything: reading the 4,000 modules of theirs that ours import takes most of a minute.
UNTYPED = ["transformers", "peft", "mlflow", "wandb", "optuna"]


@pytest.mark.parametrize("linter", LINTERS)
def test_linters_find_nothing(linter, tmp_path):
    command, *words = LINTERS[linter]
    if linter == "types" and not PROVE:
        config, names = tmp_path / "pyproject.toml", [x for m in UNTYPED for x in (m, f"{m}.*")]
        override = f'[[tool.mypy.overrides]]\nmodule = {names}\nfollow_imports = "skip"\n'
        config.write_text((ROOT / "pyproject.toml").read_text() + override)
        words = ["--config-file", config, "--cache-dir", tmp_path / "cache"]
    done = subprocess.run([BIN / command, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_linters_find_what_is_wrong(tmp_path):
    bad = tmp_path / "a.py"
    bad.write_text("import os, subprocess\nx: int = 'a'\nsubprocess.run('x'+input(), shell=True)\n")
    config = ROOT / "pyproject.toml"
    for words, message in (
        (["ruff", "format", "--check", "--config", config, tmp_path], "would be reformatted"),
        (["ruff", "check", "--config", config, tmp_path], "S602"),
        (["mypy", "--config-file", "", "--cache-dir", tmp_path / "cache", bad], "assignment"),
        (["bandit", "-q", "-c", config, bad], "B602"),
    ):
        done = subprocess.run([BIN / words[0], *words[1:]], capture_output=True, text=True)
        assert done.returncode == 1 and message in done.stdout, done.stdout + done.stderr


EXAMPLES = re.compile(r"tiger|correct-horse-battery|\{w\[:12\]\}|\bme:|hunter2")  # in tests


def secrets_in(lines):
    from codex_nb.core.safety import find_secrets

    found = [(f, line) for line in lines for f in find_secrets(line, {})]
    return [(f.kind, line) for f, line in found if not EXAMPLES.search(line[f.start : f.end])]


def test_no_secrets_in_history():
    if subprocess.run(
        ["git", "rev-parse", "--is-inside-work-tree"], cwd=ROOT, capture_output=True
    ).returncode:
        pytest.skip("no repository here")
    text = subprocess.run(
        ["git", "log", "-p", "--all", "--no-color", "--format="],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
    ).stdout
    added = {
        line[1:]
        for line in text.splitlines()
        if line.startswith("+") and not line.startswith("+++") and '"image/png"' not in line
    }
    assert len(added) > 1000 and secrets_in(added) == []
    assert secrets_in(["key = " + "AKIA" + "ABCDEFGHIJKLMNOP"])


def test_hooks_and_workflows_name_what_is_there():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [r["repo"] for r in hooks] == ["local"]
    for h in hooks[0]["hooks"]:
        assert (BIN / Path(h["entry"].split()[0]).name).exists(), h["entry"]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    seen = set()
    for p in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        flow = yaml.safe_load(p.read_text())
        assert flow["permissions"] == {"contents": "read"}, p.name  # more is given to single jobs
        for job in flow["jobs"].values():
            for step in job["steps"]:
                for line in re.findall(r"^make (.*)$", step.get("run", ""), re.M):
                    seen |= set(line.split())
                if "uses" in step:
                    assert re.search(r"@v\d+$", step["uses"]), step["uses"]
    assert seen <= targets and {"test", "docs", "build", "sbom"} <= seen


@pytest.fixture
def clone(tmp_path):
    subprocess.run(
        ["git", "clone", "--quiet", "--no-tags", ROOT, tmp_path / "clone"], check=True
    )  # one that was never released
    subprocess.run(["git", "checkout", "--quiet", "-B", "main"], cwd=tmp_path / "clone", check=True)
    for k, v in (("user.name", "a"), ("user.email", "a@localhost")):
        subprocess.run(["git", "config", k, v], cwd=tmp_path / "clone", check=True)
    return tmp_path / "clone"


def release(clone, *words):
    return subprocess.run(
        [sys.executable, "tools/release.py", *words], cwd=clone, capture_output=True, text=True
    )


def git(clone, *words):
    return subprocess.run(
        ["git", *words], cwd=clone, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(not PROVE, reason="makes a release six times; in `make prove`")
def test_release_is_all_or_nothing(clone):
    # the tools as they are here, be they committed or not
    shutil.copytree(ROOT / "tools", clone / "tools", dirs_exist_ok=True)
    (clone / "CHANGELOG.md").write_text("# Changes\n\n## 9.0.0, not yet released\n\n- All new.\n")
    git(clone, "add", "-A")
    git(clone, "commit", "--quiet", "-m", "ready")
    before = git(clone, "rev-parse", "HEAD")
    assert "must be three numbers" in release(clone, "9").stderr
    assert "no section '## 9.9.9'" in release(clone, "9.9.9").stderr
    assert "is not after" in release(clone, "0.0.1").stderr
    (clone / "README.md").write_text("changed")
    assert "not committed" in release(clone, "9.0.0").stderr
    git(clone, "checkout", "--", "README.md")
    failed = release(clone, "9.0.0", "--check", "false")
    assert failed.returncode == 1 and "not released: false failed with 1" in failed.stderr
    assert (
        git(clone, "status", "--porcelain") == ""
        and git(clone, "rev-parse", "HEAD") == before
        and git(clone, "tag") == ""
    )
    done = release(clone, "9.0.0", "--check", "true")
    assert done.returncode == 0, done.stderr
    assert git(clone, "tag") == "v9.0.0" and git(clone, "status", "--porcelain") == ""
    assert (
        '__version__ = "9.0.0"' in (clone / "codex_nb" / "__init__.py").read_text()
        and "version: 9.0.0" in (clone / "CITATION.cff").read_text()
        and re.search(r"## 9.0.0, \d{4}-", (clone / "CHANGELOG.md").read_text())
    )
    lines = (clone / "dist" / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in map(str.split, lines)}
    assert sums.keys() == {"codex_nb-9.0.0.tar.gz", "codex_nb-9.0.0-py3-none-any.whl"}
    assert all(digest in git(clone, "tag", "-n9", "v9.0.0") for digest in sums.values())
    assert "v9.0.0 is tagged already" in release(clone, "9.0.0").stderr


def test_known_vulnerabilities_are_reported():
    from vulnerabilities import told

    assert told("", "x\nno route") == (
        ["not checked: the database of known faults cannot be reached from here: no route"],
        0,
    )
    found = [
        {"name": "a", "version": "1", "vulns": []},
        {"name": "b", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["3"]}]},
        {"name": "c", "skip_reason": "not found"},
    ]
    lines, code = told(json.dumps({"dependencies": found}), "")
    assert code == 1 and len(lines) == 2 and lines[0] == "b 2: X-1, mended in 3"
    compared, unknown = lines[1].split("; ")
    assert compared == "2 of 3 packages compared with the database of known faults, 1 faults"
    assert unknown == "nothing is known of the other 1 where pip looks here"
    assert told(json.dumps({"dependencies": found[:1]}), "") == (
        ["1 of 1 packages compared with the database of known faults, 0 faults"],
        0,
    )
