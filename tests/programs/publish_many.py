"""Say `ready`, then publish FOLDER/0, FOLDER/1, ... forever."""

import itertools
import sys

from codex_nb.core.artifacts import publish

print("ready", flush=True)
for n in itertools.count():
    with publish(f"{sys.argv[1]}/{n}", "numbers") as d:
        for i in range(6):
            (d.path / f"{i}.bin").write_bytes(bytes([n % 256]) * 200_000)
