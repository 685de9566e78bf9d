"""Notebooks under nbval: cells that nbdev skips are skipped.

With `--warm`, kernels are forked from a process that has imported torch, and what a chapter exports
is taken from the compiled module: one execution shows that the module does what the chapter says,
and that the outputs are those stored.
"""

import ast
import json
import os
import re
import subprocess
import symtable
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tests"))

SKIPPED = re.compile(r"^#\|\s*(eval:\s*false|slow|cuda)\b", re.M)
EXPORTED = re.compile(r"^#\|\s*exports?\b", re.M)
MODULE = re.compile(r"^#\|\s*default_exp ([\w.]+)", re.M)


def pytest_addoption(parser):
    parser.addoption(
        "--warm",
        action="store_true",
        help="with --nbval: forked kernels, and compiled modules in place of exported cells",
    )


def pytest_configure(config):
    if config.option.warm:
        import warm
        from jupyter_client.provisioning import local_provisioner

        local_provisioner.launch_kernel = warm.launch_kernel
        if not os.environ.get("WARM_SERVER"):
            warm.start_server()  # one for all workers


def bound_names(source):
    "What a cell defines: (names that it always binds, names that it may bind)."
    always = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            always.append(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            always.extend((a.asname or a.name).split(".")[0] for a in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            always.extend(t.id for t in targets if isinstance(t, ast.Name))
    symbols = symtable.symtable(source, "cell", "exec").get_symbols()
    bound = [s.get_name() for s in symbols if s.is_assigned() or s.is_imported()]
    return always, [name for name in bound if name not in always]


def from_module(module, source):
    "A cell that takes what `source` defines from the module; no name is there before its cell."
    given = source.splitlines()
    future = [line for line in given if line.startswith("from __future__")]
    always, perhaps = bound_names("\n".join(line for line in given if line not in future))
    lines = [f"import codex_nb.{module} as _module"]
    for name in dict.fromkeys(always):
        lines.append(f"{name} = _module.{name}")
    for name in dict.fromkeys(perhaps):
        lines.append(f"if hasattr(_module, {name!r}): {name} = _module.{name}")
    return "\n".join([*future, *lines])


def pytest_collection_modifyitems(config, items):
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None or cell.get("cell_type") != "code":
            continue
        cell["execution_count"] = cell.get("execution_count") or 0  # cleaned cells have none
        if SKIPPED.search(cell["source"]):
            item.add_marker(pytest.mark.skip(reason="nbdev skips this cell"))
        elif config.option.warm and EXPORTED.search(cell["source"]):
            sources = (c["source"] for c in item.parent.nb.cells if c["cell_type"] == "code")
            module = next(m[1] for s in sources if (m := MODULE.search(s)))
            cell["source"] = from_module(module, cell["source"])


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
