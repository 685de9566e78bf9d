"""Renew `data/portable.json`, the digests that `codex-nb prove-digest` compares with.

Needed where a change gives other weights on purpose, such as another tokenizer for the sample.
"""

from pathlib import Path

from codex_nb.experiments.portable_digest import (
    first_difference,
    portable_digests,
    record_digests,
    recorded_digests,
)

if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "data" / "portable.json"
    found = portable_digests()
    difference = first_difference(found, recorded_digests()) if path.is_file() else "everything"
    record_digests(found, path)
    print(f"{path}: {'as before' if difference is None else f'first difference: {difference}'}")
