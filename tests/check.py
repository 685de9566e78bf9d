"""`make check`: what can be seen within a minute, for before each commit.

Layout, lint, types, modules in step with their notebooks, clean notebooks; and chapters that
changed are executed against their modules. A chapter has changed when it is not as it was when it
last passed here, or, where it never did, not as in the last commit. `make test` shows the rest.
"""

import filecmp
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gate import BIN, LOGS, NBVAL, ROOT, environment

STAMP = LOGS / "check.json"


def run(*words, cwd=ROOT, **env):
    "Run a tool; its output when it fails, else nothing."
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [str(w) for w in words],
            cwd=cwd,
            env=environment(home) | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return done.stdout if done.returncode else ""


def layout():
    return run(BIN / "ruff", "format", "--check", ".")


def lint():
    return run(BIN / "ruff", "check", "--output-format", "concise", ".")


def types():
    return run(BIN / "mypy")


def differing(a, b, kind):
    "Files of a kind that are not the same in two folders."
    names = {p.relative_to(d) for d in (a, b) for p in d.rglob(f"*{kind}")}
    names = {n for n in names if ".ipynb_checkpoints" not in n.parts}

    def same(n):
        return (a / n).is_file() and (b / n).is_file() and filecmp.cmp(a / n, b / n, False)

    return sorted(str(n) for n in names if not same(n))


def generated():
    "Modules that are not as their notebooks say, and notebooks that are not clean."
    with tempfile.TemporaryDirectory() as d:
        copy = Path(d) / "codex_nb"
        copy.mkdir()
        for name in ("nbs", "codex_nb"):
            shutil.copytree(ROOT / name, copy / name, symlinks=True)
        for name in ("settings.ini", "pyproject.toml", "_quarto.yml", "README.md"):
            shutil.copyfile(ROOT / name, copy / name)
        for p in (copy / "codex_nb").rglob("*.py"):
            if p.name != "__init__.py":
                p.unlink()
        failed = run(BIN / "python", ROOT / "tools" / "export.py", cwd=copy)
        modules = differing(ROOT / "codex_nb", copy / "codex_nb", ".py")
        failed = failed or run(BIN / "nbdev_clean", cwd=copy)
        notebooks = differing(ROOT / "nbs", copy / "nbs", ".ipynb")
    problems = [failed] if failed else []
    problems += [f"codex_nb/{n}: not as its notebook says: make export" for n in modules]
    problems += [f"nbs/{n}: not clean: nbdev_clean" for n in notebooks]
    return "\n".join(problems)


def changed():
    "Chapter -> digest, of those that changed; and the digests of all."
    words = ["git", "diff", "--name-only", "HEAD", "--", "nbs"]
    out = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout
    new = ["git", "ls-files", "--others", "--exclude-standard", "--", "nbs"]
    out += subprocess.run(new, cwd=ROOT, capture_output=True, text=True).stdout
    differ, passed = set(out.splitlines()), json.loads(STAMP.read_text()) if STAMP.exists() else {}
    found = {}
    for p in sorted((ROOT / "nbs").glob("*/[0-9][0-9]_*.ipynb")):
        name, digest = p.relative_to(ROOT).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()
        if passed[name] != digest if name in passed else name in differ:
            found[name] = digest
    return found, passed


def chapters(files):
    "Execute chapters against their modules, and compare what they print."
    if not files:
        return ""
    words = ["-m", "pytest", *files, "--warm", *NBVAL, "-p", "no:cacheprovider", "--color=no"]
    return run(BIN / "python", *words, *(["-n", "2"] if len(files) > 3 else []))


def main():
    began, failed = time.monotonic(), 0
    LOGS.mkdir(exist_ok=True)
    found, passed = changed()
    checks = {
        "types": types,
        f"chapters ({len(found)} changed)": lambda: chapters(list(found)),
        "modules and notebooks": generated,
        "layout": layout,
        "lint": lint,
    }
    with ThreadPoolExecutor(2) as pool:
        for name, problems in zip(checks, [pool.submit(check) for check in checks.values()]):
            text = problems.result().strip()
            print(f"{'FAILED' if text else 'ok    '} {name}", flush=True)
            failed += bool(text)
            if text:
                print("\n".join(text.splitlines()[-30:]), flush=True)
            elif name.startswith("chapters"):
                STAMP.write_text(json.dumps(passed | found, indent=0) + "\n")
    print(f"{time.monotonic() - began:.0f} s in all")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
