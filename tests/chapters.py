"""Run chapters' cells against the compiled modules; exported cells become the module's names.

A server: it loads the large libraries once, and forks for every line "path TAB log" that it reads.
"""

import importlib
import json
import os
import re
import sys
import traceback
from pathlib import Path

from conftest import take_out

os.environ["MPLBACKEND"] = "agg"  # no screen here


def run(path):
    cells = [c for c in json.loads(Path(path).read_text())["cells"] if c["cell_type"] == "code"]
    source = ["".join(c["source"]) for c in cells]
    name = next(m[1] for s in source if (m := re.search(r"^#\|\s*default_exp ([\w.]+)", s, re.M)))
    module = importlib.import_module(f"codex_nb.{name}")
    space = {"__name__": "__main__"}
    for i, s in enumerate(source):
        if re.search(r"^#\|\s*exports?\b", s, re.M):
            space.update({k: v for k, v in vars(module).items() if not k.startswith("__")})
        elif not re.search(r"^#\|\s*(default_exp|eval:\s*false|slow|cuda)\b", s, re.M):
            exec(compile(s, f"{path}[{i}]", "exec"), space)


def serve():
    for name in (
        "numpy",
        "pandas",
        "scipy.stats",
        "matplotlib.pyplot",
        "torch",
        "torch._dynamo",
        "transformers.modeling_utils",
        "transformers.generation",
        "transformers.models.llama.modeling_llama",
        "transformers.models.gpt2.modeling_gpt2",
        "fastcore.test",
    ):
        importlib.import_module(name)
    for line in sys.stdin:
        path, log = line.rstrip("\n").split("\t")
        sys.stdout.flush()
        if pid := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
            continue
        take_out()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for fd in (1, 2):
            os.dup2(out, fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        try:
            run(path)
        except BaseException:
            traceback.print_exc()
            sys.exit(1)
        sys.exit(0)  # as any process ends, so that what was covered is written


if __name__ == "__main__":
    serve()
