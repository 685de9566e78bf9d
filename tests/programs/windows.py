"""What a command says on Windows, as far as that can be shown elsewhere."""

import sys

sys.modules["fcntl"] = sys.modules["resource"] = None

import codex_nb  # noqa: E402
from codex_nb.cli.main import main  # noqa: E402

sys.platform = "win32"
try:
    _ = codex_nb.RunConfig
except ImportError as e:
    print(e)
main(["run", "train"])
