"""`make readme`: README.md from nbs/index.ipynb; with a folder, write it there instead."""

import re
import sys
from pathlib import Path

import nbformat
from docs import TEMPORARY
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def main(to):
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [c for c in nb.cells if not c.source.startswith("#| hide")]
    alts = [
        m[1] for c in nb.cells for m in [re.search(r'^#\| fig-alt: "(.*)"$', c.source, re.M)] if m
    ]
    for c in nb.cells:
        c.source = re.sub(r"^#\| .*\n", "", c.source, flags=re.M)
    text, resources = MarkdownExporter().from_notebook_node(
        nb, {"output_files_dir": "README_files", "unique_key": "README"}
    )
    text = TEMPORARY.sub("~/work", text)  # where a reader's runs would be
    alt = iter(alts)
    text = re.sub(r"!\[[^\]]*\]\((README_files/[^)]+)\)", lambda m: f"![{next(alt)}]({m[1]})", text)

    def link(m):
        # the page is in nbs/, the file beside that folder
        in_nbs = (ROOT / "nbs" / m[1].partition("#")[0]).exists()
        return f"]({'nbs/' if in_nbs else ''}{m[1]})"

    text = re.sub(r"\]\((?!https?:|README_files/)([^)\s]+)\)", link, text)
    (to / "README_files").mkdir(exist_ok=True)
    for p in (to / "README_files").iterdir():
        p.unlink()
    for name, data in resources["outputs"].items():
        (to / name).write_bytes(data)
    (to / "README.md").write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
