"""Build the token store of the sample; print the folder's name, the digest and the package."""

import codex_nb
from codex_nb.data.corpus import CorpusConfig, open_corpus
from codex_nb.data.tokenizer_training import TokenizerConfig, train_tokenizer
from codex_nb.data.tokens import build_tokens

corpus = open_corpus(CorpusConfig(data="sample"))
store = build_tokens(corpus, train_tokenizer(corpus, TokenizerConfig(tokenizer="bytes")))
print(store.artifact.path.name, store.digest, codex_nb.__file__)
