#!/bin/sh
# JupyterLab in the workspace, with the run notebooks in it. JUPYTER_TOKEN must be set.
set -eu
: "${JUPYTER_TOKEN:?set JUPYTER_TOKEN to a secret of your own}"
package=$(python -c 'import codex_nb, os; print(os.path.dirname(codex_nb.__file__))')
mkdir -p nbs
for n in "$package"/notebooks/*.ipynb; do [ -e "nbs/${n##*/}" ] || cp "$n" nbs/; done
exec jupyter lab --no-browser --ip 0.0.0.0 --port "${PORT:-8888}" --ServerApp.root_dir "$PWD"
