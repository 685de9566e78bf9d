"""Read a file; print how many documents it has or the error, and by how many MiB memory grew."""

import resource
import sys

from codex_nb.data.documents import ReadError
from codex_nb.data.readers import read_path


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


before = peak()
try:
    print(sum(1 for _ in read_path(sys.argv[1])))
except ReadError as e:
    print(str(e)[-60:])
print((peak() - before) // 1024)
