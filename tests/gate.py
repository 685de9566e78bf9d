"""`make test`: every check, with times, logs and a summary; what was shown is kept as evidence.

`make prove` executes more: full counts, real processes instead of forked ones, chapters as
notebooks (nbdev_test, nbval) and against the modules, every tutorial and benchmark. It measures
what is covered, which makes Python code half as fast, and puts the evidence into the package.

`PROVE=1 .venv/bin/python tests/gate.py --again tests/test_x.py` executes a file of tests once more,
where the test itself was wrong, and renews its results; they say of which commit they are, and are
refused when the package is no longer the one that was shown.
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
KEPT = ROOT / "data" / "evidence.json"
BIN = Path(sys.executable).parent
PYTHON = [BIN / "python", "-m"]
PROVE = bool(os.environ.get("PROVE"))

NBVAL = "--nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg".split()
# One more than there are processors: tests often wait for what they have started
WORKERS = str(min(8, (os.cpu_count() or 1) + 1))


def pytest(name, *words):
    "A command that runs pytest, with its results in NAME.xml."
    how = ["-n", WORKERS, "-p", "no:cacheprovider", "--durations", "15"]
    return ["-m", "pytest", *words, *how, "--junitxml", LOGS / f"{name}.xml"]


# What the small form leaves out: benchmarks, which say little when they run small; tutorials, which
# show with larger runs what nbs/index, train and finetune, test_bases and test_formats, test_sweep,
# test_replay, test_segments and test_attest, test_distributed and test_judging, test_plugins,
# test_signals and test_launch test; and the tables of forgeries and of architectures, whose rows
# test_forgery tests and compares with the page, and test_architectures tests. The notebook distill
# trains three models; test_distillation executes it with smaller ones.
LEFT_OUT = ["nbs/tutorials"]
if PROVE:  # nbval executes everything but the lessons about compiled modules
    LEFT_OUT += [f"nbs/{p.name}" for p in (ROOT / "nbs").glob("*.ipynb")]
else:
    LEFT_OUT += [f"nbs/reference/{name}.ipynb" for name in ("threat_model", "architectures")]
    LEFT_OUT += ["nbs/distill.ipynb"]
IGNORED = [f"--ignore={path}" for path in ["nbs/benchmarks", *LEFT_OUT]]
TESTS = pytest("tests", "nbs", "tests", "--warm", *NBVAL, *IGNORED)
PARTS = {"pip check": [[*PYTHON, "pip", "check"]], "tests": [[BIN / "python", *TESTS]]}
if PROVE:
    PARTS = {
        "pip check": PARTS["pip check"],
        "nbdev_test": [
            [BIN / "nbdev_test", "--n_workers", WORKERS, "--timing", "--file_re", r"^\d\d_"]
        ],
        "nbval": [[BIN / "python", *pytest("nbval", "nbs", *NBVAL, "--dist", "loadfile")]],
        "tests": [[*PYTHON, "coverage", "erase"], [*PYTHON, "coverage", "run", *TESTS]],
        "coverage": [
            [*PYTHON, "coverage", "combine", "-q"],
            [*PYTHON, "coverage", "report", "--fail-under", "90"],
        ],
    }


def name_of(case):
    "The test or notebook that a result belongs to."
    path = case.get("classname")
    if path.endswith(".ipynb"):
        return f"{path.removesuffix('.ipynb').replace('.', '/')}.ipynb"
    return f"{path.replace('.', '/')}.py::{case.get('name').partition('[')[0]}"


def state_of(case):
    if case.find("skipped") is not None:
        return "skipped"
    failed = case.find("failure") is not None or case.find("error") is not None
    return "failed" if failed else "passed"


def results(*paths):
    "Test or notebook -> how often it passed, failed and was skipped."
    out = {}
    for case in (case for path in paths for case in ET.parse(path).iter("testcase")):
        counts = out.setdefault(name_of(case), {"passed": 0, "failed": 0, "skipped": 0})
        state = state_of(case)
        counts[state] += 1
        if state == "skipped":
            counts["why"] = case.find("skipped").get("message", "")[:120]
    return out


def failures(part):
    "Tests, and cells of notebooks, that failed in a part."
    path = LOGS / f"{part}.xml"
    cases = ET.parse(path).iter("testcase") if path.exists() else []
    return [f"{c.get('classname')} {c.get('name')}" for c in cases if state_of(c) == "failed"]


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def evidence():
    "What this run of all checks has shown, of which code."
    import torch

    sys.path.insert(0, str(ROOT))
    from codex_nb.core.artifacts import code_files

    paths = [LOGS / f"{name}.xml" for name in ("nbval", "tests")]
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return {
        "schema": 1,
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", ".", ":!data/evidence.json")),
        "made": datetime.date.today().isoformat(),
        "counts": "full" if PROVE else "small",
        "machine": f"{system}, torch {torch.__version__}",
        "modules": code_files(),
        "results": dict(sorted(results(*filter(Path.exists, paths)).items())),
    }


def environment(home):
    "Of every check; notebooks choose for themselves how they draw."
    inherited = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "WARM_SERVER")}
    return inherited | {
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
        words = [BIN / "python", *pytest("again", *files, "--dist", "worksteal")]
        done = subprocess.run(words, cwd=ROOT, env=environment(home))
    if done.returncode:
        return done.returncode
    fresh = results(LOGS / "again.xml")
    renewed = {name: r | {"commit": now["commit"]} for name, r in fresh.items()}
    others = {k: r for k, r in kept["results"].items() if k.partition("::")[0] not in files}
    kept["results"] = dict(sorted((others | renewed).items()))
    KEPT.write_text(json.dumps(kept, indent=0) + "\n")
    return 0


def run_part(name):
    "Run one part; whether it succeeded, and its log."
    log = LOGS / f"{name.replace(' ', '-')}.log"
    with tempfile.TemporaryDirectory() as home, open(log, "w") as out:
        for words in PARTS[name]:
            done = subprocess.run(
                [str(w) for w in words],
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(home),
            )
            if done.returncode:
                return False, log
    return True, log


def main():
    LOGS.mkdir(exist_ok=True)
    if "--again" in sys.argv:
        sys.exit(again(sys.argv[sys.argv.index("--again") + 1 :]))
    for old in LOGS.glob("*.xml"):
        old.unlink()
    began, failed, counts = time.monotonic(), [], {"passed": 0, "failed": 0, "skipped": 0}
    for name in PARTS:
        start = time.monotonic()
        ok, log = run_part(name)
        text = log.read_text()
        closing = re.findall(r"^(?=.*\d+ passed)(?=.* in [\d.]+s).*$", text, re.M)
        for n, state in re.findall(r"(\d+) (passed|failed|skipped)\b", "".join(closing[-1:])):
            counts[state] += int(n)
        took = f"{time.monotonic() - start:6.0f} s"
        state, where = ("ok    ", "") if ok else ("FAILED", f"   log: {log}")
        print(f"{state} {name:12} {took}{where}", flush=True)
        if not ok:
            failed.append(name)
            print("\n".join(text.splitlines()[-40:]), flush=True)
            for test in failures(name):
                print(f"failed: {test}", flush=True)
    for path in [LOGS / "evidence.json", *([KEPT] if "--keep" in sys.argv else [])]:
        path.write_text(json.dumps(evidence(), indent=0) + "\n")
    report = LOGS / "coverage.log"
    total = re.findall(r"^TOTAL.*?(\d+)%", report.read_text(), re.M) if PROVE else []
    covered = f", coverage {total[-1]} %" if total else ""
    print(f"{time.monotonic() - began:.0f} s in all{covered}")
    counts["failed"] = max(counts["failed"], len(failed))
    print(", ".join(f"{n} {state}" for state, n in counts.items()))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
