"""Coverage is counted in the tests' own processes and in kernels that execute chapters.

Every command that tests start would become a third slower by it.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
from helpers import shared_folder

sys.path.insert(0, str(Path(__file__).parent / "programs"))


def take_out():
    "Remove the variables by which coverage reaches what is started; return them."
    names = [k for k in os.environ if k.startswith("COVERAGE_PROCESS_")]
    return {k: os.environ.pop(k) for k in names}


TRACED = take_out() if "PYTEST_XDIST_WORKER" in os.environ else {}


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    "The folder of a small model that is in order, with its tokenizer; not to be written to."
    from codex_nb.data.corpus import CorpusConfig, open_corpus
    from codex_nb.data.tokenizer_training import TokenizerConfig, train_tokenizer
    from codex_nb.model.causal_lm import ModelConfig, build_model, hide_progress_bars

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CODEX_NB_HOME", str(folder / "home"))
            corpus = open_corpus(CorpusConfig(data="sample"))
            tokenizer = train_tokenizer(corpus, TokenizerConfig(vocab_size=400))
        shape = ModelConfig(width=32, layers=1, heads=2, seq_len=64)
        with hide_progress_bars():
            model = build_model(shape, tokenizer.vocab_size, tokenizer.eot, 0)
            model.save_pretrained(folder / "small")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer.path / name, folder / "small" / name)

    return shared_folder(tmp_path_factory, "small-model", make) / "small"


@pytest.fixture(scope="session")
def described_runs(tmp_path_factory):
    "Two workspaces with the runs of `described.make_runs`, `hostile` and `plain`; not written to."
    from described import HOSTILE, make_runs

    def make(folder):
        for home, name in (("hostile", HOSTILE), ("plain", "plain ")):
            (folder / home).mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CODEX_NB_HOME", str(folder / home))
                make_runs(folder / home, name)

    return shared_folder(tmp_path_factory, "described-runs", make)
