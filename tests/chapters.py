"""Run a chapter's cells against the compiled module: exported cells are replaced by the module's names."""
import importlib, json, os, re, sys
from pathlib import Path

os.environ["MPLBACKEND"] = "agg" # no screen here

def run(path):
    cells = [c for c in json.loads(Path(path).read_text())["cells"] if c["cell_type"] == "code"]
    source = ["".join(c["source"]) for c in cells]
    name = next(m[1] for s in source if (m := re.search(r"^#\|\s*default_exp (\w+)", s, re.M)))
    module = importlib.import_module(f"codex_nb.{name}")
    space = {"__name__": "__main__"}
    for i, s in enumerate(source):
        if re.search(r"^#\|\s*export\b", s, re.M): space.update({k: v for k, v in vars(module).items() if not k.startswith("__")})
        elif not re.search(r"^#\|\s*(default_exp|eval:\s*false|slow|cuda)\b", s, re.M): exec(compile(s, f"{path}[{i}]", "exec"), space)

if __name__ == "__main__": run(sys.argv[1])
