"""`make test`: every check, with the time of each, its log, and a summary; what was shown is kept as evidence.

`make prove` is the same at full counts, and puts the evidence into the package. `PROVE=1 .venv/bin/python tests/gate.py --again tests/test_x.py` executes a file of tests once more, where the test itself was wrong, and
renews its results; they say of which commit they are, and are refused when the package is no longer the one that was shown.
"""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / ".ci-logs"
BIN = Path(sys.executable).parent
# run notebooks, benchmarks and tutorials are executed once, by nbval, which also compares what they print
PARTS = {
    "pip check": [[BIN / "python", "-m", "pip", "check"]],
    "nbdev_test": [[BIN / "nbdev_test", "--n_workers", "2", "--timing", "--file_re", r"^\d\d_"]],
    "nbval": [
        [
            BIN / "python",
            "-m",
            "pytest",
            "--nbval",
            "--nbval-current-env",
            "--nbval-sanitize-with",
            "tests/nbval.cfg",
            "nbs",
            "-n",
            "2",
            "--dist",
            "loadfile",
            "-p",
            "no:cacheprovider",
            "--junitxml",
            LOGS / "nbval.xml",
        ]
    ],
    "pytest": [
        [BIN / "python", "-m", "coverage", "erase"],
        [
            BIN / "python",
            "-m",
            "coverage",
            "run",
            "-m",
            "pytest",
            "tests",
            "-n",
            "2",
            "--dist",
            "worksteal",
            "-p",
            "no:cacheprovider",
            "--durations",
            "10",
            "--junitxml",
            LOGS / "pytest.xml",
        ],
    ],
    "coverage": [
        [BIN / "python", "-m", "coverage", "combine", "-q"],
        [BIN / "python", "-m", "coverage", "report", "--fail-under", "90"],
    ],
}


def results(path, notebooks):
    "Test or notebook -> how often it passed, failed and was skipped."
    out = {}
    for case in ET.parse(path).iter("testcase"):
        where = case.get("classname")
        name = (
            f"{where.removesuffix('.ipynb').replace('.', '/')}.ipynb"
            if notebooks
            else f"{where.replace('.', '/')}.py::{case.get('name').partition('[')[0]}"
        )
        r = out.setdefault(name, {"passed": 0, "failed": 0, "skipped": 0})
        skip = case.find("skipped")
        state = (
            "skipped"
            if skip is not None
            else "failed"
            if case.find("failure") is not None or case.find("error") is not None
            else "passed"
        )
        r[state] += 1
        if skip is not None:
            r["why"] = skip.get("message", "")[:120]
    return out


def evidence():
    "What this run of all checks has shown, of which code."
    import torch

    sys.path.insert(0, str(ROOT))
    from codex_nb.core.artifacts import code_files

    git = lambda *words: subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    shown = {}
    for name in ("nbval", "pytest"):
        if (LOGS / f"{name}.xml").exists():
            shown |= results(LOGS / f"{name}.xml", name == "nbval")
    return {
        "schema": 1,
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", ".", ":!data/evidence.json")),
        "made": datetime.date.today().isoformat(),
        "counts": "full" if os.environ.get("PROVE") else "small",
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}",
        "modules": code_files(),
        "results": dict(sorted(shown.items())),
    }


KEPT = ROOT / "data" / "evidence.json"


def surroundings(home):  # of every check; notebooks choose for themselves how they draw
    return {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | {
        "CODEX_NB_HOME": home,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONHASHSEED": "0",
    }


def again(files):
    "Renew the results of some files of tests, of the same code at the same counts."
    kept, now = json.loads(KEPT.read_text()), evidence()
    if differ := [k for k in ("modules", "counts", "machine") if kept[k] != now[k]]:
        sys.exit(f"{KEPT}: its {' and '.join(differ)} are not those of now: make prove")
    if now["dirty"]:
        sys.exit("there are changes beside the commit: commit them first")
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [
                BIN / "python",
                "-m",
                "pytest",
                *files,
                "-n",
                "2",
                "--dist",
                "worksteal",
                "-p",
                "no:cacheprovider",
                "--junitxml",
                LOGS / "again.xml",
            ],
            cwd=ROOT,
            env=surroundings(home),
        )
    if done.returncode:
        return done.returncode
    fresh = {
        k: r | {"commit": now["commit"]} for k, r in results(LOGS / "again.xml", False).items()
    }
    kept["results"] = dict(
        sorted(
            (
                {k: r for k, r in kept["results"].items() if k.partition("::")[0] not in files}
                | fresh
            ).items()
        )
    )
    KEPT.write_text(json.dumps(kept, indent=0) + "\n")
    return 0


def main():
    LOGS.mkdir(exist_ok=True)
    if "--again" in sys.argv:
        sys.exit(again(sys.argv[sys.argv.index("--again") + 1 :]))
    for old in LOGS.glob("*.xml"):
        old.unlink()
    began, failed, counts = time.monotonic(), [], {"passed": 0, "failed": 0, "skipped": 0}
    for name, commands in PARTS.items():
        log, start, code = LOGS / f"{name.replace(' ', '-')}.log", time.monotonic(), 0
        with tempfile.TemporaryDirectory() as home, open(log, "w") as out:
            for c in commands:
                code = (
                    code
                    or subprocess.run(
                        [str(x) for x in c],
                        cwd=ROOT,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        env=surroundings(home),
                    ).returncode
                )
        text = log.read_text()
        closing = (
            re.findall(r"^(?=.*\d+ passed)(?=.* in [\d.]+s).*$", text, re.M)[-1:]
            if "pytest" in str(commands)
            else []
        )
        for line in closing:
            for n, what in re.findall(r"(\d+) (passed|failed|skipped)\b", line):
                counts[what] += int(n)
        print(
            f"{'ok    ' if code == 0 else 'FAILED'} {name:12} {time.monotonic() - start:6.0f} s"
            + ("" if code == 0 else f"   log: {log}"),
            flush=True,
        )
        if code:
            failed.append(name)
            print("\n".join(text.splitlines()[-40:]), flush=True)
    total = re.findall(r"^TOTAL.*?(\d+)%", (LOGS / "coverage.log").read_text(), re.M)
    for path in [LOGS / "evidence.json", *([KEPT] if "--keep" in sys.argv else [])]:
        path.write_text(json.dumps(evidence(), indent=0) + "\n")
    print(
        f"{time.monotonic() - began:.0f} s in all" + (f", coverage {total[-1]} %" if total else "")
    )
    print(
        f"{counts['passed']} passed, {max(counts['failed'], len(failed))} failed, {counts['skipped']} skipped"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
