"""What a small distribution brings: two metrics, a schedule and a dataset."""

from codex_nb.data.documents import Document
from codex_nb.eval.metrics import TextMetric

vowels = TextMetric(lambda p, refs: float(p == refs[0] or p in refs), about="equal, to the letter")
lazy = TextMetric(lambda p, refs: 0.5, about="always the same")
bleu = TextMetric(lambda p, refs: 1.0)


def late(step, total, warmup, cfg):
    return 1.0 if 2 * step < total else 0.5


def poems():
    text = "Rose {} is red, and the violets were counted {} times by the gardener."
    return (Document(id=f"{i}", text=text.format(i, i)) for i in range(60)), {"by": "nobody"}
