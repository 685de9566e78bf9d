"""`codex_nb.run.recipe` where one rank receives SIGTERM in the middle of an evaluation."""

import os
import signal
import sys

from codex_nb.run import callbacks
from codex_nb.run.recipe import main
from codex_nb.train.distributed import exit_process

generate = callbacks.generate


def signal_then_generate(*args):
    if os.environ["RANK"] == os.environ["SIGNALLED_RANK"]:
        os.kill(os.getpid(), signal.SIGTERM)
    return generate(*args)


callbacks.generate = signal_then_generate
exit_process(main(sys.argv[1:]))
