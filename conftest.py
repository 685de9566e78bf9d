"""Notebooks under nbval, and how notebooks and tests are shared out.

Cells that nbdev skips are skipped. With `--warm`, kernels are forked from a process that has
imported torch, and after a cell that exports, what it defines is taken from the compiled module:
one execution shows that the notebook runs from top to bottom, that its outputs are those stored,
and that its lessons hold for the module.
"""

import ast
import os
import re
import symtable
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tests"))

SKIPPED = re.compile(r"^#\|\s*(eval:\s*false|slow|cuda)\b", re.M)
EXPORTED = re.compile(r"^#\|\s*exports?\b", re.M)
SHIMS = Path(__file__).parent / "tests" / "bin"
MODULE = re.compile(r"^#\|\s*default_exp ([\w.]+)", re.M)


def pytest_addoption(parser):
    parser.addoption(
        "--warm",
        action="store_true",
        help="with --nbval: forked kernels, and lessons about the compiled modules",
    )


def pytest_configure(config):
    # What a slow machine would show of it is not among the outputs that are expected.
    os.environ.setdefault("CODEX_NB_PROGRESS", "off")
    if not config.option.warm:
        return
    import warm
    from jupyter_client.provisioning import local_provisioner
    from nbval.kernel import RunningKernel

    local_provisioner.launch_kernel = warm.launch_kernel
    if not os.environ.get("WARM_SERVER"):
        warm.start_server()  # one for all workers

    def stop(kernel):
        "Let the kernel end by itself, so that what was covered is written."
        kernel.kc.stop_channels()
        kernel.km.shutdown_kernel(now=False)

    RunningKernel.stop = stop
    # what notebooks call `codex-nb` is forked as well
    os.environ["PATH"] = f"{SHIMS}:{os.environ['PATH']}"


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
    "Lines that take what a cell defines from the compiled module."
    always, perhaps = bound_names(source)
    lines = [f"import codex_nb.{module} as _module"]
    for name in dict.fromkeys(always):
        lines.append(f"{name} = _module.{name}")
    for name in dict.fromkeys(perhaps):
        lines.append(f"if hasattr(_module, {name!r}): {name} = _module.{name}")
    return lines


def teach_the_module(cells):
    "Let the lessons of a chapter be about its module: before each, take over what was exported."
    module, exported = None, []
    for cell in cells:
        source = cell["source"]
        if found := MODULE.search(source):
            module = found[1]
        elif SKIPPED.search(source):
            continue
        elif EXPORTED.search(source):
            exported += from_module(module, source)
        elif exported and not source.startswith("%%"):
            cell["source"] = "\n".join([*exported, source])
            exported = []


# What takes longest is begun first, so that no process waits for another in the end.
LONGEST = (
    "nbs/tutorials/8",
    "nbs/tutorials/3",
    "nbs/tutorials/6",
    "nbs/tutorials/2",
    "nbs/tutorials/4",
    "tests/test_bundle",
    "tests/test_resume",
    "tests/test_distributed",
    "nbs/tutorials",
    "tests/test_sweep",
    "tests/test_signals",
    "tests/test_sinks",
    "tests/test_house",
    "nbs/deploy",
    "nbs/run",
    "nbs/experiments",
    "nbs",
    "tests/test_launch",
    "tests/test_judging",
    "tests/test_replay",
)
# Their tests share what is made once in a process.
TOGETHER = ("test_data.py", "test_house.py", "test_resume.py", "test_sinks.py", "test_tokens.py")


def place(nodeid):
    "Where an item stands in the order."
    return next((i for i, start in enumerate(LONGEST) if nodeid.startswith(start)), len(LONGEST))


def pytest_collection_modifyitems(config, items):
    notebooks = {}
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None or cell.get("cell_type") != "code":
            continue
        cell["execution_count"] = cell.get("execution_count") or 0  # cleaned cells have none
        if SKIPPED.search(cell["source"]):
            item.add_marker(pytest.mark.skip(reason="nbdev skips this cell"))
        if config.option.warm and 'os.environ["PATH"] =' in cell["source"]:
            cell["source"] += f"\nos.environ['PATH'] = f\"{SHIMS}:{{os.environ['PATH']}}\""
        notebooks.setdefault(item.path, []).append(cell)
    if config.option.warm:
        for cells in notebooks.values():
            teach_the_module(cells)
        items.sort(key=lambda item: place(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A notebook, and a file whose tests share something, stay in one process; other tests do not."
    if not config.option.warm:
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if file.endswith((".ipynb", *TOGETHER)) else nodeid

    config.option.loadscopereorder = False
    return Scheduler(config, log)
