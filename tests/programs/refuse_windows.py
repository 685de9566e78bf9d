"""Use the package and its command by the name of Windows, without what Windows lacks."""

import sys

sys.modules["fcntl"] = sys.modules["resource"] = None

import codex_nb  # noqa: E402
from codex_nb.cli.main import main  # noqa: E402

sys.platform = "win32"
try:
    codex_nb.RunConfig  # noqa: B018
except ImportError as e:
    print(e)
main(["run", "train"])
