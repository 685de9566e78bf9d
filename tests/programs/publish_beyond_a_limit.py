"""Replace FOLDER by a file larger than this process may write; print the error."""

import resource
import signal
import sys

from codex_nb.core.artifacts import DiskError, publish

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with publish(sys.argv[1], "numbers", replace=True) as d:
        (d.path / "x").write_bytes(bytes(1_000_000))
except DiskError as e:
    print(e)
