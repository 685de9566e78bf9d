"""`make vulnerabilities`: ask pip-audit about every locked package.

It says of how many nothing could be learned.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lock import LOCK, TORCH  # noqa: E402


def told(out, error):
    "Lines for the terminal and an exit code, from what pip-audit printed."
    try:
        found = json.loads(out)["dependencies"]
    except (ValueError, KeyError):
        reason = (error.strip().splitlines() or ["no answer"])[-1]
        unreached = "the database of known faults cannot be reached from here"
        return [f"not checked: {unreached}: {reason}"], 0
    asked, unknown = [d for d in found if "vulns" in d], [d for d in found if "vulns" not in d]
    bad = [
        f"{d['name']} {d['version']}: {v['id']}"
        + (f", mended in {', '.join(v['fix_versions'])}" if v["fix_versions"] else "")
        for d in asked
        for v in d["vulns"]
    ]
    summary = (
        f"{len(asked)} of {len(found)} packages compared with the database of known faults, "
        f"{len(bad)} faults"
    )
    if unknown:
        summary += f"; nothing is known of the other {len(unknown)} where pip looks here"
    return [*bad, summary], int(bool(bad))


def main():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip_audit",
            "--require-hashes",
            "--disable-pip",
            "--progress-spinner",
            "off",
            "--format",
            "json",
            "-r",
            LOCK,
        ],
        capture_output=True,
        text=True,
    )
    lines, code = told(done.stdout, done.stderr)
    print("\n".join([*lines, f"torch {TORCH} is not in the lock and was not asked about"]))
    sys.exit(code)


if __name__ == "__main__":
    main()
