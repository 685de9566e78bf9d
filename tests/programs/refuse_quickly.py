"""Refuse command lines in one process; print what was imported for each, as JSON lines."""

import contextlib
import io
import json
import sys

from codex_nb.cli.main import main

HEAVY = ("torch", "transformers", "pandas", "matplotlib", "rich")

for line in sys.stdin:
    words = json.loads(line)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(words)
        code = 0
    except SystemExit as e:
        code = e.code or 0
    heavy = [name for name in (*HEAVY, "pydantic") if name in sys.modules]
    print(json.dumps([code, out.getvalue(), err.getvalue(), heavy]), flush=True)
