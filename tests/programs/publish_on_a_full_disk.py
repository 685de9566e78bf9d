"""Replace an artifact on the full disk /mnt, written by `bytes`, `torch` or `safetensors`."""

import os
import sys

from codex_nb.core.artifacts import DiskError, open_artifact, publish


def write(path):
    if sys.argv[1] == "bytes":
        return path.write_bytes(bytes(8_000_000))
    import torch

    if sys.argv[1] == "torch":
        return torch.save(torch.zeros(2_000_000), path)
    from safetensors.torch import save_file

    return save_file({"x": torch.zeros(2_000_000)}, path)


with publish("/mnt/a", "numbers") as d:
    (d.path / "x").write_text("old")
try:
    with publish("/mnt/a", "numbers", replace=True) as d:
        write(d.path / "x")
except DiskError as e:
    print(e.errno, e)
assert (open_artifact("/mnt/a").path / "x").read_text() == "old" and os.listdir("/mnt") == ["a"]
