"""Preference tuning beside a loop written from the definition, and what it does with odd pairs."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from helpers import train_losses
from test_resume import signal_at

from codex_nb.core.types import IGNORE

STEPS, PAIRS = 10, 4
SETTINGS = dict(
    seq_len=48,
    dtype="fp32",
    device="cpu",
    steps=STEPS,
    batch_size=PAIRS,
    micro_batch=2,
    warmup=0.0,
    schedule="constant",
    clip=0.5,
    lr=5e-3,
    eval_every=STEPS,
    eval_documents=4,
    save_every=STEPS,
    max_new_tokens=2,
    adapter="none",
    rank=None,
    alpha=None,
)


def trained(base, folder, **given):
    "A run, and its pairs in the order in which it took them."
    from codex_nb.data.batches import BatchSampler
    from codex_nb.data.pairs import split_pairs
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.settings import PreferConfig
    from codex_nb.run.training_inputs import prepare_data

    cfg = PreferConfig.from_preset("smoke", base=str(base), **(SETTINGS | given))
    run = train_and_judge(cfg, folder, judged=False)
    batches = BatchSampler(prepare_data(cfg)[2], PAIRS, cfg.seed)
    return run, [split_pairs(batches.step(step * PAIRS)[0]) for step in range(STEPS)]


def answer_logp(model, ids, targets):
    "Log-probability of the answer in one row without its padding, and its number of tokens."
    learned = (targets != IGNORE).nonzero()[:, 0]
    ids = ids[: int(learned[-1]) + 1]
    logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return sum(logps[i, targets[i]] for i in learned.tolist()), len(learned)


def losses_by_hand(base, steps, preference):
    from transformers import AutoModelForCausalLM

    model, reference = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, (0.9, 0.95), 1e-8, weight_decay=0.0)
    losses = []
    for batch in steps:
        rows = list(zip(batch.ids_BT, batch.targets_BT))
        total = 0
        for (ids, targets), (other_ids, other_targets) in zip(rows[::2], rows[1::2]):
            better, n = answer_logp(model, ids, targets)
            worse, m = answer_logp(model, other_ids, other_targets)
            if preference == "simpo":
                margin = 2.0 * (better / n - worse / m) - 1.0
            else:
                with torch.no_grad():
                    before, _ = answer_logp(reference, ids, targets)
                    other, _ = answer_logp(reference, other_ids, other_targets)
                margin = 0.1 * ((better - before) - (worse - other))
            total = total - F.logsigmoid(margin)
        loss = total / PAIRS
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("preference", ["dpo", "simpo"])
def test_each_step_has_the_loss_of_the_definition(preference, small_model, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    from codex_nb.run.run_record import load_parents

    run, steps = trained(small_model, tmp_path / "run", preference=preference)
    recorded = train_losses(run.folder)
    ours = [recorded[s + 1] for s in range(STEPS)]
    theirs = losses_by_hand(small_model, steps, preference)
    assert min(ours) < ours[0] - 0.1
    assert ours == pytest.approx(theirs, abs=1e-4), list(zip(ours, theirs))
    if preference == "dpo":
        assert ours[0] == pytest.approx(np.log(2), abs=1e-6)
        assert load_parents(run.folder).keys() >= {"reference", "base"}


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_policy_redacts_rejected_answers(tmp_path, monkeypatch):
    from codex_nb.data.corpus import CorpusConfig, open_corpus

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    rules = tmp_path / "rules.yaml"
    rules.write_text("schema: 1\nrules:\n- {kind: email, action: redact}\n")
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    mail = {"role": "assistant", "content": "Write to ada@example.org."}
    records = [
        {"chosen": talk, "rejected": [talk[0], mail]},
        {"prompt": "Who?", "chosen": " Ada.", "rejected": " Write to ada@example.org."},
    ]
    path = write(tmp_path / "pairs.jsonl", records)
    given = dict(validation_fraction=0.0, test_fraction=0.0, record_format="pairs")
    corpus = open_corpus(CorpusConfig(data=path, policy=str(rules), **given))
    both = list(corpus)
    texts = [d.rejected if isinstance(d.rejected, str) else d.rejected.content for d in both]
    assert len(texts) == 2 and not any("example.org" in t for t in texts), texts
    assert [d.exchanged().exchanged() for d in both] == both


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": "Once."}, "of no known format; known are: `chosen` and `rejected`"),
        ({"prompt": "2+2=", "chosen": "4", "rejected": "4"}, "are the same"),
        ({"prompt": "2+2=", "chosen": "4", "rejected": ""}, "a text that is not empty"),
        ({"prompt": "2+2=", "chosen": "4", "rejected": ["5"]}, "must have the same form"),
        ({"prompt": "2+2=", "answers": ["4", "5"], "ranks": [1, 1]}, "of which one is better"),
    ],
)
def test_what_is_no_pair_is_refused(record, message, tmp_path, monkeypatch):
    from codex_nb.core.config import ConfigError
    from codex_nb.data.corpus import CorpusConfig, open_corpus
    from codex_nb.data.documents import ReadError

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    path = write(tmp_path / "pairs.jsonl", [record])
    with pytest.raises((ReadError, ConfigError), match=message):
        open_corpus(CorpusConfig(data=path, record_format="pairs"))


def test_pairs_that_do_not_fit_are_counted(tmp_path, monkeypatch, small_model):
    from codex_nb.run.preflight import preflight, preflight_lines
    from codex_nb.run.settings import PreferConfig
    from codex_nb.run.training_inputs import prepare_data

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    words = "lamp river bread letter rain bridge horse market".split()
    records = [
        {"prompt": f"{a} {b}:", "chosen": f" {b}", "rejected": f" {a} {a}"}
        for a in words
        for b in words
    ]
    records[5]["rejected"] = " rain" * 60
    path = write(tmp_path / "pairs.jsonl", records)
    cfg = PreferConfig.from_preset("smoke", base=str(small_model), data=path, **SETTINGS)
    corpus, tokenizer, pairs = prepare_data(cfg)
    report = pairs.report()
    assert (
        report["pairs_left_out"] == 1 and report["rows"] == corpus.counts["train"]["documents"] - 1
    )
    ids, targets, positions = pairs.gather(np.arange(len(pairs)))
    assert ids.shape == (len(pairs), 96) and (positions[:, 48] == 0).all()
    assert ((targets != IGNORE).reshape(-1, 48).sum(1) > 0).all()
    assert report["supervised"] == (targets != IGNORE).sum()
    learned = f"{report['supervised']:,} of {report['tokens']:,} tokens an epoch"
    end = f"the end of text {2 * len(pairs):,} times"
    assert f"trained on: {learned}; {end}" in preflight_lines(preflight(cfg, timed=False))


def in_parts(base, folder, cuts, between=lambda: None):
    "Digest of a run, and its losses, that is stopped by SIGTERM at the cuts and resumed."
    from codex_nb.run.run_record import load_parents
    from codex_nb.run.settings import PreferConfig
    from codex_nb.run.trainer import Trainer
    from codex_nb.run.training_inputs import model_for, prepare_data, start_run
    from codex_nb.train.interrupts import Interrupted

    lora = dict(adapter="lora", rank=2, alpha=4.0, steps=6, eval_every=3, save_every=3)
    cfg = PreferConfig.from_preset("smoke", base=str(base), **(SETTINGS | lora))
    corpus, tokenizer, rows = prepare_data(cfg)
    for cut in [*cuts, None]:
        made = dict(corpus=corpus, tokenizer=tokenizer, tokens=rows.store)
        run = start_run("prefer", cfg, folder, **made)
        model = model_for(run.cfg, tokenizer)
        trainer = Trainer(run, corpus, tokenizer, rows, model, (signal_at(cut, model),))
        if cut is None:
            trainer.fit()
            continue
        with pytest.raises(Interrupted):
            trainer.fit()
        run.lock.release()
        between()
    return run.finish().digest, train_losses(folder), load_parents(folder)["reference"]


def test_a_stopped_run_ends_as_one_that_was_not(small_model, tmp_path, monkeypatch):
    from codex_nb.core.store import store_folder

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    straight = in_parts(small_model, tmp_path / "straight", [])
    stored = store_folder("reference")
    lost = lambda: shutil.rmtree(stored)  # noqa: E731
    # The reference is computed again, and is the same
    assert in_parts(small_model, tmp_path / "parts", [2, 5], lost) == straight
    assert any(stored.iterdir())


def test_pairs_become_conversations_for_a_base_that_chats(tmp_path, monkeypatch, small_model):
    from codex_nb.data.corpus import CorpusConfig, open_corpus
    from codex_nb.data.record_formats import write_documents
    from codex_nb.run import training_inputs
    from codex_nb.run.settings import PreferConfig

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    words = "lamp river bread letter rain bridge horse market".split()
    texts = [{"prompt": f"{a}?", "chosen": b, "rejected": f"{a} {b}"} for a in words for b in words]
    path, talks = write(tmp_path / "pairs.jsonl", texts), tmp_path / "talks.jsonl"
    documents = list(open_corpus(CorpusConfig(data=path, record_format="pairs")))
    assert write_documents(documents, talks, as_conversations=True) == len(texts)
    notes = {}
    for data in (path, str(talks)):
        for chats in (True, False):
            monkeypatch.setattr(training_inputs, "has_seen_conversations", lambda base: chats)
            cfg = PreferConfig.from_preset("smoke", base=str(small_model), data=data, **SETTINGS)
            corpus, tokenizer, rows = training_inputs.prepare_data(cfg)
            assert len(rows) == corpus.counts["train"]["documents"]
            notes[data, chats] = training_inputs.template_note(cfg, corpus, tokenizer)
    assert "--to messages --record-format pairs" in notes.pop((path, True))
    assert set(notes.values()) == {None}


def test_pairs_as_a_task_have_the_log_probabilities_that_the_loss_compares(
    small_model, tmp_path, monkeypatch
):
    from codex_nb.eval.ranked_pairs import pair_question
    from codex_nb.eval.tasks import ask
    from codex_nb.model.preference_loss import PreferenceLoss
    from codex_nb.run.bases import open_base
    from codex_nb.run.reference import pair_logps, preference_pairs
    from codex_nb.run.settings import PreferConfig
    from codex_nb.run.training_inputs import prepare_data

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    cfg = PreferConfig.from_preset("smoke", base=str(small_model), **SETTINGS)
    corpus, tokenizer, _ = prepare_data(cfg)
    model = open_base(cfg)
    held = preference_pairs(cfg, corpus, tokenizer, "validation")
    logps, tokens = pair_logps(PreferenceLoss(model, cfg.preference), held)
    documents = list(corpus.split("validation"))
    questions = [pair_question(documents[i]) for i in held.used]
    answers = ask(model, tokenizer, questions)
    assert len(answers) > 5
    np.testing.assert_allclose([a.nll for a in answers], -logps, atol=1e-4)
    by_token = logps / tokens
    for metric, x in {"accuracy": logps, "accuracy_per_token": by_token}.items():
        assert [a.scores[metric] for a in answers] == (x[:, 0] > x[:, 1]).astype(float).tolist()
