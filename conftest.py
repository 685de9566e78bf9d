"""nbval knows nothing of nbdev: give cleaned cells a count, and skip the cells that nbdev skips."""

import json
import os
import re
import subprocess

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None or cell.get("cell_type") != "code":
            continue
        cell["execution_count"] = cell.get("execution_count") or 0
        if re.search(r"^#\|\s*(eval:\s*false|slow|cuda)\b", cell["source"], re.M):
            item.add_marker(pytest.mark.skip(reason="nbdev skips this cell"))


def pytest_sessionfinish(session, exitstatus):
    "`make prove` leaves a file that says which commit was proven, and by how many tests."
    if not os.environ.get("PROVE") or hasattr(session.config, "workerinput"):
        return
    stats = session.config.pluginmanager.get_plugin("terminalreporter").stats
    commit = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty"],
        cwd=session.config.rootpath,
        capture_output=True,
        text=True,
    ).stdout.strip()
    logs = session.config.rootpath / ".ci-logs"
    logs.mkdir(exist_ok=True)
    (logs / "prove.json").write_text(
        json.dumps(
            {
                "schema": 1,
                "commit": commit,
                "exit": int(exitstatus),
                **{
                    k: sorted(r.nodeid for r in stats.get(k, []))
                    for k in ("passed", "failed", "skipped")
                },
            },
            indent=1,
        )
        + "\n"
    )
