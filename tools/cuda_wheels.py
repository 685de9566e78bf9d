"""Collect the wheels that a machine with a GPU lacks, where it reaches no package registry.

    ssh MACHINE python3 -m pip list --format freeze > there.txt
    python tools/cuda_wheels.py there.txt --python 3.12 --out wheels
    scp -r wheels MACHINE:codex_nb/

and there, in the folder of this repository:

    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site make cuda

torch, and whatever else is on that machine, stays as it is. The wheels have the versions of this
environment; one of this package is among them, because its plug-ins are found by their metadata.
"""

import argparse
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("lora", "parquet", "gpu")
# The oldest systems first: pip takes a wheel for exactly these, not for older ones by itself.
GLIBC = ("1", "2014", "_2_17", "_2_24", "_2_26", "_2_27", "_2_28", "_2_31", "_2_34")


def missing(there, python):
    "Names and versions of what the package needs and is not in `there`."
    marks = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    marks |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    found = {}

    def visit(name, extras):
        name = canonicalize_name(name)
        if name in there or name in found:
            return
        distribution = metadata.distribution(name)
        if name != "codex-nb":
            found[name] = distribution.version
        for text in distribution.requires or []:
            need = Requirement(text)
            if need.marker is None or any(
                need.marker.evaluate(marks | {"extra": extra}) for extra in ("", *extras)
            ):
                visit(need.name, need.extras)

    visit("codex-nb", EXTRAS)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("there", type=Path, help="what `pip list --format freeze` prints there")
    parser.add_argument("--python", default="3.12", help="the version of Python there")
    parser.add_argument("--out", type=Path, default=Path("wheels"), help="a folder to write to")
    args = parser.parse_args()
    lines = args.there.read_text("utf-8").splitlines()
    there = {canonicalize_name(line.partition("==")[0].strip()) for line in lines if line.strip()}
    if "torch" not in there:
        raise SystemExit(f"{args.there}: torch is not among them, and is too large to carry")
    pip = [sys.executable, "-m", "pip"]
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}=={version}" for name, version in missing(there, args.python).items()]
    platforms = [w for glibc in GLIBC for w in ("--platform", f"manylinux{glibc}_x86_64")]
    only = ["--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    only += ["--python-version", args.python, *platforms]
    subprocess.run([*pip, "download", "--quiet", *only, "--dest", args.out, *wanted], check=True)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", args.out]
    subprocess.run([*pip, *build, ROOT], check=True)
    wheels = sorted(args.out.glob("*.whl"))
    size = sum(w.stat().st_size for w in wheels) / 2**20
    print(f"{len(wheels)} wheels, {size:.0f} MB, in {args.out}")


if __name__ == "__main__":
    main()
