"""Open a model in bf16 twice; print its bytes in memory, and how much the second added at most."""

import gc
import sys
from pathlib import Path

from codex_nb.model.frozen_base import freeze_in_bf16
from codex_nb.model.model_registry import load_model


def memory(name):
    "Bytes, by the kernel's count."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


load_model(sys.argv[1], dtype="bf16")  # what is made once is there
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = memory("VmRSS")
model = load_model(sys.argv[1], dtype="bf16")
size = freeze_in_bf16(model)
assert all(bool((p == 1).all()) for p in model.parameters())  # every page was needed
print(size, memory("VmHWM") - before)
