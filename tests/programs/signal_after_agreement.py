"""`codex_nb.run.recipe` where one rank receives SIGTERM right after the ranks agreed to go on."""

import os
import signal
import sys

from codex_nb.run.recipe import main
from codex_nb.train.distributed import World, exit_process

all_gather, steps = World.all_gather, []


def all_gather_then_signal(self, value):
    gathered = all_gather(self, value)
    if isinstance(value, tuple):  # (reason to stop, whether at once): once after every step
        steps.append(value)
        if len(steps) == 5 and self.rank == int(os.environ["SIGNALLED_RANK"]):
            os.kill(os.getpid(), signal.SIGTERM)
    return gathered


World.all_gather = all_gather_then_signal
exit_process(main(sys.argv[1:]))
