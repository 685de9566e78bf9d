#!/bin/sh
# Install the package that lies around this folder into the environment $1, and take out what only
# building needed.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
"$1/bin/python" -m pip install --quiet --no-deps --no-build-isolation "$root"
"$1/bin/python" -m pip uninstall --quiet --yes uv hatchling trove-classifiers pluggy
"$1/bin/python" -m pip check
