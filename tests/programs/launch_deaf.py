"""Launch a notebook that ignores SIGINT, and ask it to stop when its last cell is running."""

import sys
from pathlib import Path

import nbformat

import codex_nb.experiments.launch as launch

CELLS = (
    "preset = 'smoke'",
    "from codex_nb.run.run_folder import Run\n"
    "from codex_nb.run.settings import RunConfig\n"
    "run = Run.start('train', RunConfig.from_notebook(globals()))",
    "import signal, time\n"
    "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "(run.folder / '.deaf').touch()\n"
    "time.sleep(1000)",
)

home = Path(sys.argv[1])
cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
cells[0].metadata["tags"] = ["parameters"]
nbformat.write(nbformat.v4.new_notebook(cells=cells), home / "train.ipynb")
launch.IDLE_SECONDS = 2
deaf = home / "run" / ".deaf"
outcome = launch.launch(str(home / "train.ipynb"), {}, home / "run", should_stop=deaf.exists)
print(outcome.code, outcome.status, outcome.error)
