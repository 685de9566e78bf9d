#!/bin/sh
# Make the environment $1 from the lock beside this file. TORCH_BACKEND: cpu, a CUDA such as cu130,
# or `pip` for whatever torch pip finds where it is set up to look.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
torch=torch==$(sed -n 's/^TORCH = "\(.*\)"$/\1/p' "$here/../tools/lock.py")
python3 -m venv "$1"
"$1/bin/python" -m pip install --quiet --no-cache-dir --require-hashes --no-deps \
    -r "$here/requirements.lock"
case "${TORCH_BACKEND:=cpu}" in
    pip) "$1/bin/python" -m pip install --quiet --no-cache-dir --no-deps "$torch" ;;
    cpu) "$1/bin/uv" pip install --quiet --no-cache --python "$1/bin/python" --no-deps \
        --torch-backend cpu "$torch" ;;
    *) "$1/bin/uv" pip install --quiet --no-cache --python "$1/bin/python" \
        --torch-backend "$TORCH_BACKEND" "$torch" ;; # not --no-deps: CUDA comes as packages
esac
