"""Run `codex-nb WORDS` with no more than 8 GB of address space: an explosion is an error here."""

import resource
import sys

from codex_nb.cli.main import main

LIMIT = 8 << 30

resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
main(sys.argv[1:])
