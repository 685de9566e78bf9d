"""Save into /mnt, filled so that each file of a checkpoint once has no space: SCRATCH TIMES."""

import shutil
import sys
from pathlib import Path

from small_checkpoint import make, save

from codex_nb.core.artifacts import DiskError, problems

made, times, disk = make(Path(sys.argv[1]) / "tokenizer"), int(sys.argv[2]), Path("/mnt")
old, new, filler = disk / "step-00000001", disk / "step-00000002", disk / "filler"
save(old, made, 1)
size = sum(f.stat().st_size for f in old.iterdir())
for i in range(times):
    left = 4096 * (1 + i * size // 4096 // times)
    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - left)))
    try:
        save(new, made, 2)
    except DiskError as e:
        assert "/mnt/step-00000002" in str(e) and "bytes free" in str(e), e
    else:
        sys.exit("it fitted")
    assert not new.exists() and problems(old) == [] and not list(disk.glob(".tmp-*"))
    filler.unlink()
save(new, made, 2)
print("all", times)
