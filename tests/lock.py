"""Refresh requirements.lock: everything but torch and its CUDA parts, for Python 3.11 to 3.13, with hashes.

torch is installed before the lock, from wherever pip finds it, so it is left out here by a marker that is never true;
what torch itself needs besides CUDA is named in its place.
"""
import subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_NEEDS = "filelock typing-extensions sympy networkx jinja2 fsspec setuptools".split()

def main():
    with tempfile.TemporaryDirectory() as d:
        (Path(d)/"override.txt").write_text("torch==2.13.0 ; python_version < '3'\n")
        (Path(d)/"more.in").write_text("\n".join([*TORCH_NEEDS, "pip"]) + "\n")
        out = subprocess.run([sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", f"{d}/more.in", "--extra", "dev", "--universal", "--python-version", "3.11",
            "--override", f"{d}/override.txt", "--generate-hashes", "--no-header", "--no-annotate", "--quiet"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    blocks = [b for b in out.replace("\\\n", "\\\0").split("\n") if b.strip()]
    kept = [b.replace("\\\0", "\\\n") for b in blocks if not b.startswith(("torch==", "codex-nb"))]
    bad = [b.split("==")[0] for b in kept if b.startswith(("nvidia-cu", "nvidia-nccl", "triton", "cuda-"))]
    if bad: sys.exit(f"the lock would hold CUDA packages: {', '.join(bad)}")
    (ROOT/"requirements.lock").write_text("# Made by `make lock`. torch is installed before this file, as torch==2.13.0.\n" + "\n".join(kept) + "\n")
    print(f"requirements.lock: {len(kept)} packages")

if __name__ == "__main__": main()
