"""What is covered is counted in the tests' own processes and in those that execute chapters: every command they start would become a third slower by it."""

import os


def take_out():
    return {
        k: os.environ.pop(k) for k in list(os.environ) if k.startswith("COVERAGE_PROCESS_")
    }  # how coverage reaches what is started


TRACED = take_out() if "PYTEST_XDIST_WORKER" in os.environ else {}
