"""`make test`: every check, with the time of each, its log, and a summary."""
import os, re, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT/".ci-logs"
BIN = Path(sys.executable).parent
PARTS = {
    "pip check": [[BIN/"python", "-m", "pip", "check"]],
    "nbdev_test": [[BIN/"nbdev_test", "--n_workers", "2", "--timing"]],
    "nbval": [[BIN/"python", "-m", "pytest", "--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval.cfg", "nbs", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]],
    "pytest": [[BIN/"python", "-m", "coverage", "erase"], [BIN/"python", "-m", "coverage", "run", "-m", "pytest", "tests", "-n", "2", "-p", "no:cacheprovider", "--durations", "10"]],
    "coverage": [[BIN/"python", "-m", "coverage", "combine", "-q"], [BIN/"python", "-m", "coverage", "report", "--fail-under", "90"]],
}

def main():
    LOGS.mkdir(exist_ok=True)
    began, failed, counts = time.monotonic(), [], {"passed": 0, "failed": 0, "skipped": 0}
    for name, commands in PARTS.items():
        log, start, code = LOGS/f"{name.replace(' ', '-')}.log", time.monotonic(), 0
        with tempfile.TemporaryDirectory() as home, open(log, "w") as out:
            env = os.environ | {"CODEX_NB_HOME": home, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONHASHSEED": "0"}
            env.pop("MPLBACKEND", None) # notebooks choose for themselves
            for c in commands: code = code or subprocess.run([str(x) for x in c], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=env).returncode
        text = log.read_text()
        closing = re.findall(r"^(?=.*\d+ passed)(?=.* in [\d.]+s).*$", text, re.M)[-1:] if "pytest" in str(commands) else []
        for line in closing:
            for n, what in re.findall(r"(\d+) (passed|failed|skipped)\b", line): counts[what] += int(n)
        print(f"{'ok    ' if code == 0 else 'FAILED'} {name:12} {time.monotonic()-start:6.0f} s" + ("" if code == 0 else f"   log: {log}"), flush=True)
        if code: failed.append(name); print("\n".join(text.splitlines()[-40:]), flush=True)
    total = re.findall(r"^TOTAL.*?(\d+)%", (LOGS/"coverage.log").read_text(), re.M)
    print(f"{time.monotonic()-began:.0f} s in all" + (f", coverage {total[-1]} %" if total else ""))
    print(f"{counts['passed']} passed, {max(counts['failed'], len(failed))} failed, {counts['skipped']} skipped")
    sys.exit(1 if failed else 0)

if __name__ == "__main__": main()
