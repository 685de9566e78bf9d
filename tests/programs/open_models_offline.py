"""Make, import, verify and open a model where there is no network; refuse names of a hub."""

import socket
import sys
from pathlib import Path

from codex_nb.core.config import ConfigError
from codex_nb.data.tokenizer import SPECIALS, save_tokenizer
from codex_nb.data.tokenizer_training import TokenizerConfig, byte_tokenizer
from codex_nb.model.causal_lm import (
    ModelConfig,
    build_model,
    count_parameters,
    hide_progress_bars,
)
from codex_nb.model.model_registry import find_model, import_model, load_model, verify_model

try:
    socket.create_connection(("192.0.2.1", 80), timeout=2)
except OSError:
    pass
else:
    sys.exit("there is a network")
tokenizer = byte_tokenizer(iter(()), TokenizerConfig(), Path())
tokenizer.add_special_tokens([*SPECIALS])
shape = ModelConfig(width=32, layers=1, heads=2, seq_len=16)
model = build_model(shape, tokenizer.get_vocab_size(), 0, 0)
with hide_progress_bars():
    model.save_pretrained("made")
save_tokenizer(tokenizer, "made")
import_model("made", "small")
assert verify_model(find_model("small")) == []
assert count_parameters(load_model(find_model("small"))) == count_parameters(model)
for name in ("gpt2", "openai-community/gpt2", "meta-llama/Llama-3.2-1B"):
    try:
        find_model(name)
    except ConfigError as e:
        assert "looked at" in str(e) and "codex-nb models import" in str(e), e
    else:
        sys.exit(f"{name} was found")
print("done")
