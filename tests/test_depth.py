"""One number for the size of a new model: what it decides, what wins over it, and what stays."""

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO

import pytest
from helpers import PROVE, codex, run_record, shared_folder

from codex_nb.core.config import ConfigError
from codex_nb.run import depth as rule
from codex_nb.run.depth import FOLLOWED, MAX_DEPTH, depth_notes, depth_plan
from codex_nb.run.judging import train_and_judge
from codex_nb.run.run_list import differing_settings
from codex_nb.run.run_record import RunRecord
from codex_nb.run.settings import KINDS, RunConfig

# depth: width, heads, vocab_size, seq_len, tokens, rows of a step, learning rate
TABLE = {
    1: (64, 1, 1024, 256, 2_293_760, 8, 0.019),
    2: (128, 2, 2048, 256, 13_107_200, 32, 0.0095),
    3: (192, 3, 4096, 256, 42_270_720, 64, 0.0063),
    4: (256, 4, 8192, 256, 104_857_600, 64, 0.0047),
    6: (384, 6, 16384, 512, 338_165_760, 64, 0.0032),
    12: (768, 12, 32768, 1024, 2_202_009_600, 128, 0.0016),
    20: (1280, 20, 65536, 2048, 9_542_041_600, 128, 0.00095),
    64: (4096, 64, 65536, 2048, 263_066_746_880, 1024, 0.0003),
}
SMALL = dict(
    depth=1,
    data="sample",
    vocab_size=400,
    seq_len=32,
    steps=12,
    batch_size=4,
    eval_every=6,
    save_every=4,
    keep_last=9,
    eval_documents=4,
    max_documents=8,
    max_new_tokens=4,
    resamples=100,
    threads=1,
)


@pytest.mark.parametrize("depth", TABLE)
def test_what_a_depth_decides(depth):
    cfg = RunConfig.check(depth=depth)
    names = ("width", "heads", "vocab_size", "seq_len", "tokens", "batch_size", "lr")
    assert tuple(cfg.value(n) for n in names) == TABLE[depth]
    assert (cfg.model.layers, cfg.optim.optimizer, cfg.corpus.data) == (depth, "muon", "stdlib")
    assert {cfg.sources[n] for n in (*names, "layers", "micro_batch")} == {f"depth {depth}"}
    assert cfg.fit.micro_batch * cfg.model.seq_len <= 1 << 14
    assert (cfg.run_name, cfg.preset) == (f"depth-{depth}", "")


def test_every_depth_is_a_model_and_larger_than_the_one_before():
    before = depth_plan(1)
    for depth in range(2, MAX_DEPTH + 1):
        cfg, plan = RunConfig.check(depth=depth), depth_plan(depth)
        assert cfg.model.width // cfg.model.heads == 64
        assert plan.tokens > before.tokens and plan.lr <= before.lr
        assert plan.batch_size * plan.seq_len >= before.batch_size * before.seq_len
        before = plan


def test_what_is_given_wins():
    plain = RunConfig.check(depth=3)
    decided = [n for n, source in plain.sources.items() if source == "depth 3"]
    others = dict(data="sample", optimizer="adamw", width=128, heads=2, lr_end=0.5, warmup=0.5)
    assert len(decided) == 15
    for name in decided:
        value = others.get(name) or (plain.value(name) / 2 if name == "lr" else 2)
        value = 512 if name in ("vocab_size", "seq_len") else value
        cfg = RunConfig.check(depth=3, **{name: value})
        assert (cfg.value(name), cfg.sources[name]) == (value, "given"), name
    cfg = RunConfig.check(depth=3, steps=7)
    assert (cfg.fit.steps, cfg.fit.tokens) == (7, None)
    assert RunConfig.check(depth=3, mixture={"sample": 1.0}).corpus.data is None


def test_what_depends_on_what_is_given_follows():
    def changed(**given):
        plain, cfg = RunConfig.check(depth=4).values(), RunConfig.check(depth=4, **given).values()
        often = {"eval_every", "save_every", "micro_batch"}
        return {n for n in plain if cfg[n] != plain[n]} - given.keys() - often

    assert changed(tokens=1 << 20) == {"batch_size"}
    assert changed(batch_size=8) == {"lr"}
    assert changed(width=512) >= {"heads", "vocab_size", "seq_len", "tokens", "lr"}
    assert changed(lr=1e-3) == set()
    assert set(FOLLOWED) < {*RunConfig.check(depth=4).values()}


def test_a_depth_leaves_other_runs_their_digests():
    "Without one, a run is what it was before there was a choice."
    assert RunConfig.check("smoke", device="cpu").digest() == (
        "9ae1ad41165bb0c78bbbec6cd42b90d1133ddb24a452410cdf688668a4a38408"
    )
    old = RunConfig.check("smoke").to_dict()
    del old["depth"]  # a record of an earlier version
    assert RunConfig.from_dict(old).digest() == RunConfig.check("smoke").digest()
    assert RunConfig.check(depth=1).digest() != RunConfig.check(depth=2).digest()


@pytest.mark.parametrize(
    "kind,given,message",
    [
        ("train", dict(depth=0), "depth: given 0; must be int, >= 1, <= 64"),
        ("train", dict(depth=65), "depth: given 65; must be int, >= 1, <= 64"),
        ("train", dict(depth="12"), "depth: given '12'; must be int, >= 1, <= 64"),
        ("train", dict(depth=True), "depth: given True; must be int"),
        ("train", dict(depth=2.0), "depth: given 2.0; must be int"),
        ("train", dict(depth=2, preset="tiny"), "preset: tiny and depth=2 were both given"),
        ("train", dict(depth=2, base="x"), "depth: given together with base"),
        ("train", dict(depth=2, width=100, heads=3), "width 100 cannot be divided among 3 heads"),
        ("train", dict(depth=2, vocab_size="x"), "vocab_size: given 'x'; must be int"),
        ("train", dict(depth=2, nproc=5), "batch_size: 32 rows cannot be divided equally among 5"),
        ("finetune", dict(depth=2), "depth: given together with base"),
        ("prefer", dict(depth=2, preset="lora"), "depth: given together with base"),
        ("evaluate", dict(depth=2), "depth: unknown parameter, given 2"),
    ],
)
def test_one_error_for_a_depth_that_cannot_be(kind, given, message):
    with pytest.raises(ConfigError) as error:
        KINDS[kind].check(given.pop("preset", None), **given)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_wrong_depth_and_a_wrong_name_are_refused_together():
    with pytest.raises(ConfigError, match="(?s)2 settings.*preset: tiny.*epohcs"):
        RunConfig.check("tiny", depth=2, epohcs=3)


def test_notes_say_what_is_measured_and_how_often_text_is_repeated():
    (measured, longest), beyond = max(rule.MEASURED.items()), max(rule.MEASURED) + 1
    assert len(depth_notes(measured, {}, measured, longest, longest)) == 1
    (_, note) = depth_notes(measured, {}, measured, longest + 1, longest)
    assert f"measured up to {longest:,} tokens at this depth, and are extrapolated" in note
    (_, note) = depth_notes(beyond, {}, beyond, 10, 10)
    assert f"measured up to depth {measured}, and are extrapolated" in note
    (_, note) = depth_notes(1, {}, 1, 4001, 1000)
    assert "4,001 tokens are 4 passes over the 1,000 of the training split" in note
    assert len(depth_notes(1, {}, 1, 4000, 1000)) == len(depth_notes(1, {}, 1, 9, None)) == 1
    by_steps = RunConfig.check(depth=beyond, steps=10).depth_notes(1)
    assert "passes over the 1 of" in by_steps[-1] and f"width={64 * beyond}" in by_steps[0]
    assert RunConfig.check("smoke").depth_notes(1) == []


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    "A workspace with a finished run, and what was printed."

    def make(home):
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
            patch.setenv("CODEX_NB_HOME", str(home))
            train_and_judge(RunConfig.from_preset(**SMALL), home / "runs" / "deep")
        (home / "printed").write_text(printed.getvalue())

    return shared_folder(tmp_path_factory, "depth-run", make)


def test_a_run_prints_and_records_what_its_depth_has_decided(trained):
    record = run_record(trained / "runs" / "deep")
    cfg, printed = record["config"], (trained / "printed").read_text()
    assert (cfg["depth"], cfg["model"]["width"], cfg["model"]["layers"]) == (1, 64, 1)
    assert record["sources"]["width"] == "depth 1" and record["sources"]["depth"] == "given"
    assert "note: depth 1: width=64, layers=1, heads=1" in printed
    assert "\n" in printed and "extrapolated" not in printed
    differs = differing_settings(RunRecord.load(trained / "runs" / "deep"))
    assert differs["depth"] == 1 and "width" not in differs


@pytest.mark.skipif(not PROVE, reason="three runs, as other settings are tested: in make prove")
def test_a_depth_run_that_was_stopped_resumes_to_the_same_end(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "home")
    run = tmp_path / "home" / "runs" / "deep"
    sealed = json.loads((run / "manifest.json").read_text())["digest"]
    (run / "manifest.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    done = codex("resume", "deep", home=tmp_path / "home")
    assert done.returncode == 0 and "step-00000008" in done.stdout, done.stderr + done.stdout
    assert json.loads((run / "manifest.json").read_text())["digest"] == sealed
    assert run_record(run) == run_record(trained / "runs" / "deep")


def test_a_depth_run_replays_and_keeps_its_values_when_the_rule_changes(trained, monkeypatch):
    from codex_nb.experiments.launch import check_parameters, recorded_parameters

    if PROVE:
        done = codex("replay", "deep", "--steps", "4", home=trained)
        assert done.returncode == 0, done.stderr + done.stdout
    recorded = RunRecord.load(trained / "runs" / "deep")
    for name in ("REFERENCE_LR", "TOKENS_PER_WEIGHT"):
        monkeypatch.setattr(rule, name, getattr(rule, name) * 3)
    monkeypatch.setattr(rule, "_power_of_two", lambda x: 16)
    assert RunConfig.check(**SMALL).optim.lr != recorded.settings().optim.lr
    _, parameters = recorded_parameters(trained / "runs" / "deep")
    assert check_parameters(RunConfig, parameters).digest() == recorded.digest
