"""Every chapter holds for the compiled module as it does in the notebook."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TRACED

NBS = Path(__file__).resolve().parent.parent / "nbs"
SERVER = Path(__file__).parent / "chapters.py"


@pytest.fixture(scope="session")
def server():
    p = subprocess.Popen(
        [sys.executable, SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=NBS,
        env=os.environ | TRACED,
    )

    def ask(path, log):
        p.stdin.write(f"{path}\t{log}\n")
        p.stdin.flush()
        return int(p.stdout.readline())

    yield ask
    p.stdin.close()
    p.wait(60)


@pytest.mark.parametrize(
    "chapter",
    sorted(
        (p.relative_to(NBS).as_posix() for p in NBS.rglob("[0-9][0-9]_*.ipynb")),
        key=lambda p: p.rpartition("/")[2],
    ),
)
def test_chapter(chapter, server, tmp_path):
    code = server(NBS / chapter, tmp_path / "log")
    assert code == 0, (tmp_path / "log").read_text(errors="replace")[-3000:]


def test_a_chapter_that_fails_is_seen(server, tmp_path):
    text = (NBS / "core/00_config.ipynb").read_text()
    assert text.count("test_eq(") > 3
    (tmp_path / "bad.ipynb").write_text(text.replace("test_eq(", "test_ne(", 1))
    assert (
        server(tmp_path / "bad.ipynb", tmp_path / "log") == 1
        and "test_ne" in (tmp_path / "log").read_text()
    )
