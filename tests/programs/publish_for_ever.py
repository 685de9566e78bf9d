"""Publish FOLDER again and again, with the number of the time in every file; say `first` once."""

import itertools
import sys

from codex_nb.core.artifacts import publish

for n in itertools.count(1):
    with publish(sys.argv[1], "numbers", config={"n": n}, replace=True) as d:
        for i in range(6):
            (d.path / f"{i}.bin").write_bytes(n.to_bytes(4, "big") * 50_000)
    if n == 1:
        print("first", flush=True)
