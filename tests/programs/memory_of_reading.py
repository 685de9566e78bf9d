"""Read a file of JSON lines; print its documents and by how many MiB memory grew."""

import sys

from memory import peak

from codex_nb.data.readers import read_jsonl

base = peak()
n = sum(1 for _ in read_jsonl(sys.argv[1]))
print(n, peak() - base)
