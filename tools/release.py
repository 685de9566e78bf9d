"""`make release VERSION=0.2.0`: bump, check, build, commit and tag.

When anything fails, the files are as they were. The version is that of settings.ini; from there it
goes into codex_nb/__init__.py and CITATION.cff. Nothing is sent anywhere: pushing the tag starts
the workflow that publishes.
"""

import argparse
import configparser
import datetime
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def git(*words, check=True):
    return subprocess.run(
        ["git", *words], cwd=ROOT, check=check, capture_output=True, text=True
    ).stdout.strip()


def version():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    return ini["DEFAULT"]["version"]


def refused(new):
    "Why this cannot be released, one line each."

    def number(v):
        return tuple(map(int, v.split(".")))

    if not re.fullmatch(r"\d+\.\d+\.\d+", new):
        return [f"VERSION: {new!r} must be three numbers, such as 0.2.0"]
    found = []
    if git("status", "--porcelain"):
        found.append("there are changes that are not committed: commit or stash them")
    if git("tag", "--list", f"v{new}"):
        found.append(f"v{new} is tagged already")
    if (
        number(new) < number(version())
        or number(new) == number(version())
        and git("tag", "--list", "v*")
    ):
        found.append(f"{new} is not after {version()}")
    if not re.search(rf"^## {re.escape(new)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M):
        found.append(f"CHANGELOG.md: no section '## {new}'")
    return found


def replace(path, pattern, text):
    said, n = re.subn(pattern, text, path.read_text(), count=1, flags=re.M)
    if not n:
        sys.exit(f"{path.name}: nothing like {pattern}")
    path.write_text(said)


def bump(new):
    today = datetime.date.today().isoformat()
    replace(ROOT / "settings.ini", r"^version = .*$", f"version = {new}")
    replace(ROOT / "CITATION.cff", r"^version: .*$", f"version: {new}")
    replace(ROOT / "CHANGELOG.md", rf"^## {re.escape(new)}\b.*$", f"## {new}, {today}")
    subprocess.run(
        [sys.executable, ROOT / "tools" / "export.py"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"},
    )


def build(epoch):
    "Wheel and source archive, built twice; exits when the two differ."
    digests = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as d:
            subprocess.run(
                [sys.executable, "-m", "hatchling", "build", "-d", d],
                cwd=ROOT,
                check=True,
                capture_output=True,
                env=os.environ | {"SOURCE_DATE_EPOCH": epoch},
            )
            digests.append(
                {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(d).iterdir()}
            )
            (ROOT / "dist").mkdir(exist_ok=True)
            for p in Path(d).iterdir():
                shutil.copyfile(p, ROOT / "dist" / p.name)
    if digests[0] != digests[1]:
        sys.exit(f"the build is not reproducible: {digests}")
    (ROOT / "dist" / "SHA256SUMS").write_text(
        "".join(f"{h}  {n}\n" for n, h in sorted(digests[0].items()))
    )
    return digests[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "version", nargs="?", help="such as 0.2.0; without it, only build what is committed"
    )
    parser.add_argument("--check", default="make test", help="the command that must pass")
    asked = parser.parse_args()
    if not asked.version:
        return print(
            "\n".join(
                f"{h}  dist/{n}" for n, h in sorted(build(git("log", "-1", "--format=%ct")).items())
            )
        )
    if found := refused(asked.version):
        sys.exit("\n".join(found))
    done = False
    try:
        bump(asked.version)
        for words in (["tools/lock.py", "--check"], ["-m", "ruff", "check", "--quiet"]):
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
        subprocess.run(asked.check.split(), cwd=ROOT, check=True)
        git("commit", "--all", "--quiet", "--message", f"Version {asked.version}")
        done = True
    except subprocess.CalledProcessError as e:
        sys.exit(f"not released: {' '.join(map(str, e.cmd))} failed with {e.returncode}")
    finally:
        if not done:
            git("checkout", "--quiet", "--", ".")
    made = build(git("log", "-1", "--format=%ct"))
    subprocess.run([sys.executable, ROOT / "tools" / "sbom.py"], cwd=ROOT, check=True)
    git(
        "tag",
        "--annotate",
        f"v{asked.version}",
        "--message",
        f"codex_nb {asked.version}\n\n" + "\n".join(f"{h}  {n}" for n, h in sorted(made.items())),
    )
    print(
        "\n".join(
            [
                *(f"{h}  dist/{n}" for n, h in sorted(made.items())),
                f"tagged v{asked.version}; to publish it: git push origin main v{asked.version}",
            ]
        )
    )


if __name__ == "__main__":
    main()
