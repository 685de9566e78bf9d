"""DATA THEN: open DATA as a corpus; print its documents, MiB to read it, MiB in all.

THEN is `tokens` (train a tokenizer and build the token store), `check` (report on the data), or
nothing.
"""

import sys

# what reads Parquet and Arrow is no memory of the data
import pyarrow.ipc
import pyarrow.parquet  # noqa: F401
import tiktoken  # noqa: F401
from memory import peak

from codex_nb.data.corpus import CorpusConfig, open_corpus
from codex_nb.data.data_report import check_data
from codex_nb.data.tokenizer_training import TokenizerConfig, train_tokenizer
from codex_nb.data.tokens import build_tokens

base, then = peak(), sys.argv[2]
cfg = CorpusConfig(data=sys.argv[1])
if then == "check":
    report = check_data(cfg, near_limit=20_000)
    print(report["documents"], 0, round(peak() - base))
else:
    corpus = open_corpus(cfg)
    to_read = peak() - base
    if then == "tokens":
        wanted = TokenizerConfig(vocab_size=2048, max_train_bytes=2_000_000)
        build_tokens(corpus, train_tokenizer(corpus, wanted))
    print(len(corpus), round(to_read), round(peak() - base))
