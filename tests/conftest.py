"""Coverage is counted in the tests' own processes and in kernels that execute chapters.

Every command that tests start would become a third slower by it.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "programs"))


def take_out():
    "Remove the variables by which coverage reaches what is started; return them."
    names = [k for k in os.environ if k.startswith("COVERAGE_PROCESS_")]
    return {k: os.environ.pop(k) for k in names}


TRACED = take_out() if "PYTEST_XDIST_WORKER" in os.environ else {}
