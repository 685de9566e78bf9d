"""Find near duplicates among made sketches, and print the memory that it took, in bytes.

Of ten documents, five are alone, three resemble an earlier one and two share some bands with many.
"""

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from codex_nb.data.near_duplicates import PERMUTATIONS, find_near_duplicates


def made_sketches(n, path):
    "Sketches as texts would have them, by a thousand at a time."
    rng = np.random.default_rng(0)
    template = rng.integers(2**32, size=PERMUTATIONS, dtype=np.uint32)
    with open(path, "wb") as f:
        for start in range(0, n, 1000):
            rows = rng.integers(2**32, size=(min(1000, n - start), PERMUTATIONS), dtype=np.uint32)
            kind = rng.integers(10, size=len(rows))
            similar = np.flatnonzero(kind < 3)[1:]
            rows[similar, 10:] = rows[similar[0], 10:]
            rows[kind > 7, :60] = template[:60]
            f.write(rows.astype("<u4").tobytes())


def memory():
    "The memory of this process that is not a mapped file, which the system may drop."
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def peak_of(n):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        made_sketches(n, folder / "made")
        peak, ended, before = 0, threading.Event(), memory()

        def watch():
            nonlocal peak
            while not ended.wait(0.002):
                peak = max(peak, memory() - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        found = find_near_duplicates([folder / "made"], np.empty((0, 2), np.int64), folder)
        seconds = time.perf_counter() - start
        ended.set()
        watcher.join()
        return {"documents": n, "found": len(found.pairs), "bytes": peak, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps([peak_of(int(n)) for n in sys.argv[1:]]))
