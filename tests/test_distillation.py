"""Distillation beside a loop written from the definition, and what it refuses."""

import os
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from forger import edit, reseal
from helpers import (
    PROVE,
    checkpoint_files,
    codex,
    flags,
    shared_folder,
    train_losses,
    train_records,
    write_tokenizer,
)

from codex_nb.core.config import ConfigError
from codex_nb.core.types import IGNORE
from codex_nb.run.settings import DistillConfig

STEPS, ROWS, LR, CLIP = 10, 4, 5e-3, 0.5
SETTINGS = dict(
    width=16,
    layers=1,
    heads=2,
    seq_len=32,
    dtype="fp32",
    device="cpu",
    steps=STEPS,
    batch_size=ROWS,
    micro_batch=2,
    optimizer="adamw",
    weight_decay=0.0,
    warmup=0.0,
    schedule="constant",
    clip=CLIP,
    lr=LR,
    eval_every=STEPS,
    eval_documents=2,
    save_every=STEPS,
    max_new_tokens=2,
)


@pytest.fixture(scope="session")
def teacher(small_model, tmp_path_factory):
    "A model that is sure of what it says, with ids that its tokenizer does not have."

    def make(folder):
        from transformers import AutoModelForCausalLM

        from codex_nb.model.causal_lm import hide_progress_bars

        shutil.copytree(small_model, folder / "teacher")
        with hide_progress_bars(), torch.no_grad(), torch.random.fork_rng():
            model = AutoModelForCausalLM.from_pretrained(small_model)
            torch.manual_seed(0)
            model.resize_token_embeddings(416, mean_resizing=False)
            for weight in model.parameters():
                weight.mul_(4)
            model.save_pretrained(folder / "teacher")

    return shared_folder(tmp_path_factory, "teacher", make) / "teacher"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    return tmp_path


def settings(teacher, **given):
    return DistillConfig.from_preset("smoke", teacher=str(teacher), **(SETTINGS | given))


def documents_in(batch):
    "Ids and targets of every document in every row: each is read alone."
    for ids, targets, positions in zip(batch.ids_BT, batch.targets_BT, batch.positions_BT):
        cuts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        for start, end in zip(cuts, cuts[1:]):
            yield ids[start:end], targets[start:end]


def losses_by_hand(student, teacher, steps, vocab_size, weight, T, k):
    "Hinton 2015, one document at a time, with whole logits."
    optimizer = torch.optim.AdamW(student.parameters(), LR, (0.9, 0.95), 1e-8, weight_decay=0.0)
    losses = []
    for batch in steps:
        total, n = 0, 0
        for ids, targets in documents_in(batch):
            learned = targets != IGNORE
            n += int(learned.sum())
            with torch.no_grad():
                p = teacher(input_ids=ids[None]).logits[0, learned, :vocab_size]
                p = (p / T).softmax(-1)
            z = student(input_ids=ids[None]).logits[0, learned]
            q = (z / T).softmax(-1)
            if k:
                p, best = p.topk(k)
                p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], 1)
                q = q.gather(1, best)
                q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], 1)
            kl = (p * (p.log() - q.log())).sum()
            data = F.cross_entropy(z, targets[learned], reduction="sum")
            total = total + (1 - weight) * data + weight * T**2 * kl
        loss = total / n
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


HINTON = dict(teacher_weight=0.7, teacher_temperature=2.0, save_every=4)
KEPT = HINTON | dict(data="chat", packing="best-fit", teacher_top_k=8)


@pytest.fixture(scope="session")
def kept(teacher, tmp_path_factory):
    "A workspace with a run that learned from what its teacher gave its most likely tokens."

    def make(folder):
        from codex_nb.run.judging import train_and_judge

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CODEX_NB_HOME", str(folder))
            train_and_judge(settings(teacher, **KEPT), folder / "runs" / "whole", judged=False)

    return shared_folder(tmp_path_factory, "kept", make)


def compare_with_the_definition(cfg, teacher, folder):
    from transformers import AutoModelForCausalLM

    from codex_nb.data.batches import BatchSampler
    from codex_nb.run.run_record import RunRecord
    from codex_nb.run.training_inputs import model_for, prepare_data

    _, tokenizer, dataset = prepare_data(cfg)
    batches = BatchSampler(dataset, ROWS, cfg.seed)
    steps = [batches.step(step * ROWS)[0] for step in range(STEPS)]
    d = cfg.distillation
    theirs = losses_by_hand(
        model_for(RunRecord.load(folder).settings(), tokenizer),
        AutoModelForCausalLM.from_pretrained(teacher).eval(),
        steps,
        tokenizer.vocab_size,
        d.teacher_weight,
        d.teacher_temperature,
        d.teacher_top_k,
    )
    ours = [train_losses(folder)[s + 1] for s in range(STEPS)]
    assert ours == pytest.approx(theirs, abs=1e-4), list(zip(ours, theirs))
    assert min(ours) < ours[0] - 0.05
    values = train_records(folder)[0]["values"]
    mixed = 0.3 * values["cross_entropy"] + 0.7 * 4 * values["kl"]
    assert values["loss"] == pytest.approx(mixed, abs=1e-4) and 0 <= values["agreement"] <= 1


def test_each_step_has_the_loss_of_the_definition(teacher, home):
    from codex_nb.run.judging import train_and_judge

    cfg = settings(teacher, **HINTON)
    run = train_and_judge(cfg, home / "run", judged=False)
    compare_with_the_definition(cfg, teacher, run.folder)


def test_so_it_has_with_the_most_likely_tokens_of_conversations(teacher, home, kept):
    shutil.copytree(kept, home, dirs_exist_ok=True)
    compare_with_the_definition(settings(teacher, **KEPT), teacher, home / "runs" / "whole")


def start(cfg, folder):
    "A run of some settings, with all that its trainer takes."
    from codex_nb.run.training_inputs import model_for, prepare_data, start_run

    corpus, tokenizer, dataset = prepare_data(cfg)
    data = dict(corpus=corpus, tokenizer=tokenizer, tokens=dataset.store)
    run = start_run("distill", cfg, folder, **data)
    return run, corpus, tokenizer, dataset, model_for(run.cfg, tokenizer)


def test_resumes_bit_for_bit_from_what_the_teacher_gave(teacher, home, kept):
    from codex_nb.experiments.verify import verify_run
    from codex_nb.run import teacher as asked
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.trainer import Trainer
    from codex_nb.train.checkpoint import CheckpointError
    from codex_nb.train.engine import Hook
    from codex_nb.train.interrupts import Interrupted

    shutil.copytree(kept, home, dirs_exist_ok=True)
    cfg, whole = settings(teacher, **KEPT), home / "runs" / "whole"

    def interrupt(state):
        if state.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:  # nobody asks the teacher twice
        patch.setattr(asked, "open_teacher", None)
        parts = start(cfg, home / "runs" / "again")
        with pytest.raises(Interrupted):
            Trainer(*parts, (Hook(interrupt),), on_second_signal="raise").fit()
        parts[0].lock.release()
        again = train_and_judge(cfg, home / "runs" / "again", judged=False)
    assert checkpoint_files(whole, STEPS) == checkpoint_files(again.folder, STEPS)
    assert train_losses(whole) == train_losses(again.folder)

    found = verify_run(whole)
    assert found["ok"] and {"teacher", "teacher_targets"} <= found["parents"].keys()
    edit(again.folder / "parents.json", lambda parents: parents.update(teacher="ab" * 32))
    reseal(again.folder)
    found = verify_run(again.folder)
    assert any("teacher" in problem for problem in found["problems"]), found

    # Started with this teacher, a run does not go on with another one.
    edit(whole / "parents.json", lambda parents: parents.update(teacher="ab" * 32))
    (whole / "manifest.json").unlink()
    parts = start(cfg, whole)
    edit(whole / "parents.json", lambda parents: parents.update(teacher="ab" * 32))
    with pytest.raises(CheckpointError, match="teacher"):
        Trainer(*parts).fit()


def test_teacher_with_other_tokens_is_refused(teacher, home, small_model):
    from codex_nb.run.training_inputs import prepare_data

    shutil.copytree(teacher, home / "other")
    (home / "other" / "tokenizer.json").unlink()
    write_tokenizer(home / "other", ["a lamp, a river and a bridge"], ["<|endoftext|>"])
    cfg = DistillConfig.from_preset(
        "smoke", teacher=str(home / "other"), base=str(small_model), device="cpu"
    )
    with pytest.raises(ConfigError, match="teacher: .*has other tokens .* leave out base"):
        prepare_data(cfg)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"teacher": "nowhere"}, "teacher: no model 'nowhere'; looked at"),
        ({"teacher_weight": 1.5}, "teacher_weight: "),
        ({"nproc": 2, "parallel": "fsdp"}, "parallel: fsdp is not possible with distillation"),
        ({"compile": "on"}, "compile: on is not possible with distillation"),
        ({"determinism": "portable"}, "determinism: portable arithmetic has no distillation"),
        ({"vocab_size": 300}, "vocab_size: given together with teacher"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(given, message):
    from codex_nb.run.sources import check_sources

    with pytest.raises(ConfigError) as e:
        check_sources(DistillConfig.check("smoke", **given))
    assert message in str(e.value) and len(str(e.value).splitlines()) == 1


def test_preflight_counts_the_teacher_in(teacher):
    from codex_nb.run.preflight import preflight

    asked, kept = (preflight(settings(teacher, teacher_top_k=k)) for k in (0, 8))
    assert asked["memory"]["teacher"] > 0 and "teacher" not in kept["memory"]
    assert asked["seconds_per_step"] > 0 and kept["seconds_per_step"] > 0


@pytest.mark.skipif(not PROVE, reason="the notebook alone takes ten seconds: in make prove")
def test_the_notebook_runs_headless(teacher, home):
    from codex_nb.experiments.verify import verify_run

    given = SETTINGS | {"teacher": str(teacher), "steps": 4, "resamples": 100}
    done = codex("run", "distill", "--folder", home / "runs" / "one", *flags(given), home=home)
    assert done.returncode == 0, done.stderr
    assert verify_run(home / "runs" / "one")["ok"]
    if PROVE:
        done = codex("replay", home / "runs" / "one", home=home)
        assert "proven: L3, given teacher" in done.stdout, done.stdout


@pytest.mark.skipif(not PROVE, reason="two processes, as other losses are tested; make prove")
@pytest.mark.parametrize("k", [0, 8])
def test_two_processes_learn_the_same(k, teacher, home):
    from codex_nb.run.judging import train_and_judge

    one, two = (
        train_and_judge(settings(teacher, teacher_top_k=k, nproc=n), home / str(n), judged=False)
        for n in (1, 2)
    )
    ours, theirs = train_losses(one.folder), train_losses(two.folder)
    assert ours == pytest.approx(theirs, abs=1e-4)
