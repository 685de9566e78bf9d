"""Count four short steps, and print a line before the last."""

import time

import tqdm  # noqa: F401  # not only when the first bar is due

from codex_nb.core import progress

progress._Terminal.first = 0.1
for i in progress.track(range(4), "step", 4):
    time.sleep(0.3)
    if i == 2:
        progress.print_above("a line")
