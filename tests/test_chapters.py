"""Every chapter holds for the compiled module as it does in the notebook."""
import subprocess, sys
from pathlib import Path
import pytest

NBS = Path(__file__).resolve().parent.parent/"nbs"

@pytest.mark.parametrize("chapter", sorted(p.name for p in NBS.glob("[0-9]*.ipynb")))
def test_chapter(chapter):
    done = subprocess.run([sys.executable, str(Path(__file__).parent/"chapters.py"), str(NBS/chapter)], capture_output=True, text=True, cwd=NBS)
    assert done.returncode == 0, done.stderr[-3000:]
