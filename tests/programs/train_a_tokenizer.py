"""KIND: train a tokenizer on the sample; print its digest."""

import sys

from codex_nb.data.corpus import CorpusConfig, open_corpus
from codex_nb.data.tokenizer_training import TokenizerConfig, train_tokenizer

cfg = TokenizerConfig(tokenizer=sys.argv[1], vocab_size=450)
print(train_tokenizer(open_corpus(CorpusConfig(data="sample")), cfg).digest)
