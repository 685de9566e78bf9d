"""`make lock`: refresh requirements.lock, then check it.

With --check nothing is refreshed; with --keep versions stay.

The lock holds everything but torch and its CUDA parts, for Python 3.11 to 3.13, with hashes. torch
is installed before it, from wherever pip finds it, so it is left out here by a marker that is never
true; what torch itself needs besides CUDA is named in its place.
"""

import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
IMAGE_LOCK = ROOT / "docker" / "requirements.lock"
IMAGE_EXTRAS = ["lab", "lora", "mlflow", "parquet", "sweep", "tensorboard", "text-metrics"]
TORCH = "2.13.0"
TORCH_CUDA = ("cu126", "cu130")  # CUDA versions that this torch has wheels for
TORCH_NEEDS = "filelock typing-extensions sympy networkx jinja2 fsspec setuptools".split()
CUDA = ("nvidia-cu", "nvidia-nccl", "triton", "cuda-")


def compiled(extras, more, *options):
    "What uv resolves, with hashes, without torch and this package."
    with tempfile.TemporaryDirectory() as d:
        (Path(d) / "override.txt").write_text(f"torch=={TORCH} ; python_version < '3'\n")
        (Path(d) / "more.in").write_text("\n".join([*TORCH_NEEDS, *more]) + "\n")
        out = subprocess.run(
            [
                sys.executable,
                "-m",
                "uv",
                "pip",
                "compile",
                "pyproject.toml",
                f"{d}/more.in",
                *(w for e in extras for w in ("--extra", e)),
                "--universal",
                "--python-version",
                "3.11",
                "--override",
                f"{d}/override.txt",
                "--generate-hashes",
                "--no-header",
                "--no-annotate",
                "--quiet",
                *options,
            ],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    blocks = [b for b in out.replace("\\\n", "\\\0").split("\n") if b.strip()]
    kept = [b.replace("\\\0", "\\\n") for b in blocks if not b.startswith(("torch==", "codex-nb"))]
    if bad := [b.split("==")[0] for b in kept if b.startswith(CUDA)]:
        sys.exit(f"the lock would hold CUDA packages: {', '.join(bad)}")
    return "\n".join(kept) + "\n"


def refresh(keep=False):
    "With `keep`, versions that are locked stay where pyproject.toml allows it."
    with tempfile.TemporaryDirectory() as d:

        def pins():  # of what is locked now
            (Path(d) / "pins.txt").write_text("".join(f"{r}\n" for r, _ in locked()))
            return "--constraint", f"{d}/pins.txt"

        text = compiled(["dev"], ["pip"], *(pins() if keep else ()))
        LOCK.write_text(
            f"# Made by `make lock`. torch is installed before this file, as torch=={TORCH}.\n"
            + text
        )
        IMAGE_LOCK.write_text(
            "# Made by `make lock`: what the image holds besides torch, "
            "in the versions of requirements.lock.\n"
            + compiled(IMAGE_EXTRAS, ["pip", "uv", "hatchling"], *pins())
        )


def locked(text=None):
    "Name -> (requirement, hashes), of every line; a package may have several, for several markers."
    out = []
    for line in (text or LOCK.read_text()).replace("\\\n", " ").splitlines():
        if not line or line.startswith("#"):
            continue
        words, *hashes = line.split("--hash=sha256:")
        out.append((Requirement(words.strip()), [h.strip() for h in hashes]))
    return out


def wanted(path=ROOT / "pyproject.toml"):
    "Every requirement of the package and its extras."
    p = tomllib.loads(path.read_text())
    lines = [
        *p["build-system"]["requires"],
        *p["project"]["dependencies"],
        *(r for e in p["project"]["optional-dependencies"].values() for r in e),
    ]
    return [r for r in map(Requirement, lines) if canonicalize_name(r.name) != "codex-nb"]


def wrong(lock=None, needs=None, installed=version):
    "One line for everything about the lock that does not hold."
    lock, found = lock if lock is not None else locked(), []
    pins = {}
    for r, hashes in lock:
        pin = [s.version for s in r.specifier if s.operator == "=="]
        if len(pin) != 1 or not hashes:
            found.append(f"{r.name}: not one version with hashes")
        if r.name.startswith(CUDA) or r.name == "torch":
            found.append(f"{r.name}: torch and its CUDA parts are not locked")
        if pin:
            pins.setdefault(canonicalize_name(r.name), []).append((pin[0], r.marker))
    for r in needs if needs is not None else wanted():
        have = [(TORCH, None)] if r.name == "torch" else pins.get(canonicalize_name(r.name), [])
        if not have:
            found.append(f"{r}: not in the lock")
        found += [
            f"{r}: the lock has {v}"
            for v, _ in have
            if not r.specifier.contains(v, prereleases=True)
        ]
    if lock == locked() and IMAGE_LOCK.exists():
        found += [
            f"docker/requirements.lock: {r.name}: not as in requirements.lock"
            for r, h in locked(IMAGE_LOCK.read_text())
            if (str(r.specifier), sorted(h))
            not in [(str(o.specifier), sorted(oh)) for o, oh in lock if o.name == r.name]
        ]
    for name, versions in pins.items():
        for v, marker in versions:
            if marker is not None and not marker.evaluate():
                continue
            try:
                have = installed(name)
            except PackageNotFoundError:
                have = "absent"
            if have != v:
                found.append(f"{name}: {have} is installed, the lock has {v}")
    return found


def main():
    if "--check" not in sys.argv:
        refresh("--keep" in sys.argv)
    found = wrong(
        installed=version
        if "--check" in sys.argv
        else lambda n: next(
            str(s.version)
            for r, _ in locked()
            if canonicalize_name(r.name) == n and (r.marker is None or r.marker.evaluate())
            for s in r.specifier
        )
    )
    print(
        "\n".join(
            [
                *found,
                f"requirements.lock: {len(locked())} packages, "
                + (f"{len(found)} problems" if found else "all as pyproject.toml asks"),
            ]
        )
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
