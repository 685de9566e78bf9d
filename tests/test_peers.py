"""Losses of our steps beside Hugging Face's `Trainer`: the same data, order, rates and rounding."""

import pytest
import torch
from helpers import train_losses

from codex_nb.core.types import IGNORE

STEPS, ROWS, MICRO, WARMUP, END = 20, 4, 2, 2, 0.1
RATES = {"none": 5e-3, "lora": 5e-2}  # High, so that the losses move
# Names of our settings -> values; beside them what `Trainer` is given below
SETTINGS = dict(
    data="chat",
    seq_len=48,
    dtype="fp32",
    device="cpu",
    steps=STEPS,
    batch_size=ROWS,
    micro_batch=MICRO,
    warmup=WARMUP / STEPS,
    schedule="linear",
    lr_end=END,
    clip=0.5,  # is at work in most steps
    weight_decay=0.1,
    decay_groups=False,
    eval_every=STEPS,
    eval_documents=2,
    save_every=STEPS,
    max_new_tokens=2,
)


def our_losses(base, folder, **given):
    "A run's losses, its rows in the order in which it took them, and its model as it began."
    from codex_nb.data.batches import BatchSampler
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.settings import FinetuneConfig
    from codex_nb.run.training_inputs import prepare_training

    settings = SETTINGS | {"lr": RATES[given["adapter"]]} | given
    cfg = FinetuneConfig.from_preset("smoke", base=str(base), **settings)
    run = train_and_judge(cfg, folder, judged=False)
    inputs = prepare_training(cfg)
    batches = BatchSampler(inputs.dataset, ROWS, cfg.seed, MICRO)
    rows = [b for step in range(STEPS) for b in batches.step(step * ROWS)]
    losses = train_losses(run.folder)
    return [losses[s + 1] for s in range(STEPS)], rows, inputs.model


def examples(batches):
    "Rows as `Trainer` takes them: labels are the ids themselves, which the model shifts."
    for batch in batches:
        for ids, targets, positions in zip(batch.ids_BT, batch.targets_BT, batch.positions_BT):
            last = targets[-1:].clamp_min(0)
            yield {
                "input_ids": torch.cat([ids, last]),
                "labels": torch.cat([torch.tensor([IGNORE]), targets]),
                "position_ids": torch.cat([positions, positions[-1:] + 1]),
            }


def rate(step):
    "The fraction of the peak rate: a linear rise and fall."
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 1 - (1 - END) * (step - WARMUP) / (STEPS - 1 - WARMUP)


def losses_of_trainer(model, lr, rows, folder):
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    losses = []

    class Recording(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=ROWS // MICRO,
        max_steps=STEPS,
        max_grad_norm=SETTINGS["clip"],
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    data = list(examples(rows))
    Recording(model, args, train_dataset=data, optimizers=(optimizer, schedule)).train()
    parts = ROWS // MICRO
    return [sum(losses[i : i + parts]) for i in range(0, len(losses), parts)]


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_each_step_has_the_loss_that_trainer_has(adapter, small_model, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from codex_nb.model.adapters import adapter_tensors, import_peft

    peft = import_peft()

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    low_rank = dict(rank=4, alpha=8.0, targets=["q_proj", "v_proj", "down_proj"])
    given = {"adapter": adapter} | (low_rank if adapter == "lora" else {"rank": None})
    ours, rows, begun = our_losses(small_model, tmp_path / "ours", **given)
    model = AutoModelForCausalLM.from_pretrained(small_model, use_cache=False)
    if adapter == "lora":
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=low_rank["targets"]
        )
        model = peft.get_peft_model(model, settings)
        peft.set_peft_model_state_dict(model, adapter_tensors(begun))
    assert any((b.targets_BT == IGNORE).any() for b in rows)  # conversations have masks
    theirs = losses_of_trainer(model, RATES[adapter], rows, tmp_path / "theirs")
    assert min(ours) < ours[0] - 0.1
    assert ours == pytest.approx(theirs, abs=1e-4), list(zip(ours, theirs))
