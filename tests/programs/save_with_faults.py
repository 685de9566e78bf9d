"""Save a checkpoint into FOLDER for each line `AT HOW`, with a fault at the AT-th file operation.

HOW is `error` (the disk is full) or `exit` (the process ends at once). Each save has a process of
its own; what it says, and its exit code, go to standard output.
"""

import builtins
import os
import pathlib
import shutil
import sys

import torch
from small_checkpoint import make, save

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
made = make(folder.parent / "tokenizer")
operations, at, how = 0, -1, ""


def count_operation():
    global operations
    operations += 1
    if operations == at:
        if how == "exit":
            os._exit(9)
        raise OSError(28, "No space left on device")


def guard(module, name):
    real = getattr(module, name)

    def guarded(*args, **kwargs):
        count_operation()
        return real(*args, **kwargs)

    setattr(module, name, guarded)


for name in ("fsync", "rename", "replace", "mkdir"):
    guard(os, name)
guard(shutil, "copyfile")
guard(pathlib.Path, "write_text")
guard(pathlib.Path, "chmod")
real_open = builtins.open


def open_guarded(file, mode="r", *args, **kwargs):
    if any(c in mode for c in "wxa+"):
        count_operation()
    return real_open(file, mode, *args, **kwargs)


builtins.open = open_guarded
for line in sys.stdin:
    at, how = int(line.split()[0]), line.split()[1]
    pid = os.fork()
    if pid:
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    try:
        save(folder / "step-00000002", made, 2)
    except OSError as e:
        print("error", type(e).__name__, e, flush=True)
    print("operations", operations, flush=True)
    os._exit(0)
