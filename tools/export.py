"""`make export`: write the modules from their notebooks, in the project of the current folder.

nbdev breaks the list `__all__` at 120 columns and has no setting for it; here it is broken at 100,
as all other code is. Everything else is as nbdev writes it. `_modidx.py` is an index for nbdev: its
long lines are data, and stay.
"""

import re
import textwrap
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import nbdev_export

WIDTH = 100


def wrap_all(text):
    "The text of a module with its `__all__` in lines of at most `WIDTH` columns."

    def wrapped(match):
        return textwrap.fill(
            " ".join(match[0].split()),
            WIDTH,
            subsequent_indent=" " * len("__all__ = ["),
            break_long_words=False,
            break_on_hyphens=False,
        )

    return re.sub(r"^__all__ = \[[^]]*\]", wrapped, text, count=1, flags=re.M)


def main():
    nbdev_export()
    for p in sorted(Path(get_config().lib_path).rglob("*.py")):
        text = p.read_text()
        if (wrapped := wrap_all(text)) != text:
            p.write_text(wrapped)


if __name__ == "__main__":
    main()
