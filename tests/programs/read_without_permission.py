"""Read a file as a user who may not; print the error."""

import os
import sys

from codex_nb.data.documents import ReadError
from codex_nb.data.readers import read_path

if os.getuid() == 0:
    os.setuid(65534)
try:
    list(read_path(sys.argv[1]))
except ReadError as e:
    print("ReadError", e)
