"""`codex_nb.run.recipe` where an evaluation takes longer than ranks wait for each other."""

import datetime
import sys
import time

from codex_nb.run.callbacks import Evaluator
from codex_nb.run.recipe import main
from codex_nb.run.trainer import Trainer
from codex_nb.train.distributed import dist, exit_process

LIMIT = 3  # Seconds
fit, score = Trainer.fit, Evaluator._score_and_sample


def fit_impatiently(self):
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=LIMIT))
    return fit(self)


def score_slowly(self, sample_name):
    time.sleep(LIMIT + 1)
    return score(self, sample_name)


Trainer.fit, Evaluator._score_and_sample = fit_impatiently, score_slowly
exit_process(main(sys.argv[1:]))
