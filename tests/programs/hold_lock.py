"""Take the lock PATH, say `held`, and keep it for a minute."""

import sys
import time

from codex_nb.core.store import Lock

lock = Lock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(60)
