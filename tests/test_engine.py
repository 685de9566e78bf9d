"""The loop asks the device for no number between two loggings."""

from unittest.mock import patch

import pytest
import torch
from torch import nn


class PackedDataset:
    seq_len = 16

    def __len__(self):
        return 64


class BatchSampler:
    "As `batches.Batches`, over ids that are drawn."

    rows, batch_size, micro_batch = PackedDataset(), 4, 2

    def step(self, position, end=None):
        from codex_nb.core.types import Batch

        ids = torch.randint(1, 64, (2, 17), generator=torch.Generator().manual_seed(position))
        return [Batch(ids[:, :-1], ids[:, 1:], torch.arange(16).expand(2, 16), torch.arange(2))] * 2


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(64, 8), nn.LayerNorm(8)


def loss(model, b):
    from codex_nb.model.loss import chunked_loss

    return chunked_loss(
        model.norm(model.embed(b.ids_BT)).flatten(0, 1),
        model.embed.weight,
        b.targets_BT.flatten(),
        dtype=torch.bfloat16,
    )


def test_loop_does_not_wait_for_the_device_between_loggings():
    """Tensors on the device `meta` have no numbers: asking for one is an error.

    The loop comes as far as the first hook that logs.
    """
    from codex_nb.train.engine import FitConfig, Hook, TrainState, fit
    from codex_nb.train.optim import EMA, OptimConfig, lr_at, make_optimizer

    cfg, state = OptimConfig(), TrainState()
    with patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta"]):
        model = Small().to("meta")
        with pytest.raises(RuntimeError, match="meta"):
            fit(
                model,
                BatchSampler(),
                loss,
                make_optimizer(model, cfg),
                lambda step, total: lr_at(step, total, cfg),
                FitConfig(steps=60),
                state,
                [Hook(lambda s: s.drain_metrics(), 57)],
                ema=EMA(model, 0.9),
            )
    assert state.step == 57 and state.tokens == 0  # counted when it is known which steps were good


def test_bad_step_on_a_device_changes_nothing():
    "AdamW decides on the device whether to step; here the same kernel on the CPU."
    from codex_nb.train.optim import OptimConfig, _on_device, make_optimizer

    torch.manual_seed(0)
    model = Small()
    optimizer = make_optimizer(model, OptimConfig())
    for ok in (True, False, True):
        loss(model, BatchSampler().step(0)[0]).backward()
        before = [p.detach().clone() for p in model.parameters()] + [
            t.clone() for s in optimizer.state.values() for t in s.values()
        ]
        _on_device(optimizer, torch.tensor(ok))
        after = [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())]
        if before[2:]:
            assert all(map(torch.equal, before, after)) != ok
        optimizer.zero_grad()
