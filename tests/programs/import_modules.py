"""Import MODULE... of codex_nb, see that nothing is installed that only development needs."""

import importlib
import importlib.util
import sys

import codex_nb

for module in sys.argv[1:]:
    importlib.import_module(f"codex_nb.{module}")
for package in ("nbdev", "fastcore", "mlflow", "pytest", "peft"):
    if importlib.util.find_spec(package):
        sys.exit(f"{package} is here")
print(codex_nb.__file__)
