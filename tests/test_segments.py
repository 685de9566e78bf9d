"""Segments of a run, drawn at random and executed again, reveal a forgery as often as predicted."""

import json
import random
import shutil
from functools import partial

import pytest
from forger import MANIFEST, copy, derive, edit_lines, read, reseal, rows_of, write_rows
from helpers import PROVE, codex, counts, files_below, trained_runs

SMALL = dict(width=16, heads=2, layers=1, seq_len=32, batch_size=4, steps=24, save_every=2)
SMALL |= dict(keep_last=99, eval_every=8, eval_documents=2, max_documents=12, resamples=100)
SMALL |= dict(max_new_tokens=4)
SEGMENTS, DRAWN = 12, 3
ENDS = list(range(SMALL["save_every"], SMALL["steps"] + 1, SMALL["save_every"]))


def config(**given):
    from codex_nb.run.settings import RunConfig

    settings = SMALL | given
    if "base" in given:  # has a shape of its own
        settings = {k: v for k, v in settings.items() if k not in ("width", "heads", "layers")}
    return RunConfig.from_preset("smoke", **settings)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    "A workspace with an honest run, and one of another seed."
    settings = dict(honest=SMALL | dict(seed=0), other=SMALL | dict(seed=1))
    return trained_runs(tmp_path_factory, "segments", settings)


@pytest.fixture
def honest(runs, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(runs))
    return runs / "runs" / "honest"


def here(run, segment, folder, parameters):
    "Execute a segment in this process, which is quicker than in one of its own."
    from codex_nb.experiments import segments
    from codex_nb.run.recipe import train_rank

    if segment.of != segments.TRAINING:
        return segments.execute_scoring(run, segment, parameters)

    def train(prepared, cfg):
        assert train_rank(prepared / "config.json", attached=True) == 0

    done = folder.with_name(f"{folder.name}-done")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of one that was refused
        segments.execute_training(run, segment, folder, parameters, train)
        done.touch()
    return segments.compare_training(run, segment, folder)


class Remembered:
    "Executes a segment only once from each state: from equal states it arrives at equal ones."

    def __init__(self, folder):
        self.folder, self.scored = folder, {}

    def __call__(self, run, segment, folder, parameters):
        from codex_nb.experiments.segments import TRAINING
        from codex_nb.run.run_record import load_states

        if segment.of == TRAINING:
            start = load_states(run.folder).get(segment.span.start, "initial")
            return here(run, segment, self.folder / f"{start}-{segment.span.stop}", parameters)
        evaluation = run.parts[segment.of]
        key = (evaluation / MANIFEST).read_bytes(), segment
        if key not in self.scored:
            self.scored[key] = here(run, segment, folder, parameters)
        return self.scored[key]


def checkpoint_at(run, step):
    return run / "checkpoints" / f"step-{step:08}"


def cut_back(run, step):
    "As if the run had been interrupted after a step."
    for p in (run / "checkpoints").iterdir():
        if int(p.name[5:]) > step:
            shutil.rmtree(p)
    shutil.rmtree(run / "evaluations")
    (run / MANIFEST).unlink()


def put_weights(checkpoint, weights):
    from safetensors.torch import save_file

    from codex_nb.core.artifacts import read_manifest, seal

    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    m = read_manifest(checkpoint)
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint, m.kind, m.config, m.parents, m.meta)


def finish(run):
    "Train to the end from the last checkpoint, evaluate and seal, as anybody can."
    from codex_nb.run.judging import train_and_judge

    train_and_judge(config(), run)
    return run


def splice_weights(run, other, step):
    "Weights of another seed in one state, from which training goes on."
    from codex_nb.train.checkpoint import read_weights

    cut_back(run, step)
    put_weights(checkpoint_at(run, step), read_weights(checkpoint_at(other, step)))
    return finish(run)


def swap_data(run, other, step, rate=1e-2):
    "A few steps on something else before one state, from which training goes on."
    import torch

    from codex_nb.model.model_registry import load_model

    cut_back(run, step)
    model = load_model(checkpoint_at(run, step)).train()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for i in range(3):
        ids = torch.randint(5, 250, (4, 32), generator=torch.Generator().manual_seed(i))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    weights = {k: v.detach().clone() for k, v in model.named_parameters()}
    put_weights(checkpoint_at(run, step), weights)
    return finish(run)


def tune_on_test_set(run, other, step):
    "The last state is trained further on what it is evaluated on."
    return swap_data(run, other, SMALL["steps"])


def splice_run(run, other, step):
    "Everything after a state is from the run of another seed."
    log, others = rows_of(run / "metrics.ndjson"), rows_of(other / "metrics.ndjson")
    samples = rows_of(run / "samples.ndjson"), rows_of(other / "samples.ndjson")
    states = rows_of(run / "states.ndjson"), rows_of(other / "states.ndjson")
    for name, (a, b) in dict(metrics=(log, others), samples=samples, states=states).items():
        rows = [r for r in a if r["step"] <= step] + [r for r in b if r["step"] > step]
        write_rows(run / f"{name}.ndjson", rows)
    for p in (run / "checkpoints").iterdir():
        if int(p.name[5:]) > step:
            copy(other / "checkpoints" / p.name, p)
    evaluate_again(run)
    derive(run)  # what the checkpoints remember of the evaluations before them
    reseal(run)
    return run


def evaluate_again(run):
    "With the settings of the run, whoever trained its weights; then seal it."
    from codex_nb.core.artifacts import open_artifact
    from codex_nb.data.corpus import open_corpus
    from codex_nb.run.judging import judge, open_trained
    from codex_nb.run.run_folder import Run, seal_run
    from codex_nb.tracking.metrics_log import metrics_csv

    shutil.rmtree(run / "evaluations")
    (run / MANIFEST).unlink()
    last = open_artifact(checkpoint_at(run, SMALL["steps"]))
    corpus = open_corpus(config().corpus)
    judge(Run(run, "train", config(), None, True), *open_trained(last), corpus, last)
    metrics_csv(run / "metrics.ndjson", run / "metrics.csv")
    seal_run(run, "finished")


def edit_figure(run, other, step):
    def better(rows):
        r = next(r for r in rows if r["split"] == "train" and r["step"] == step)
        r["values"]["loss"] /= 2
        r["exact"]["loss"] = r["values"]["loss"].hex()

    edit_lines(run / "metrics.ndjson", better)
    derive(run)
    reseal(run)
    return run


def smooth(rows):
    losses = [r for r in rows if r["split"] == "train"]
    for i, r in enumerate(losses):
        near = [x["values"]["loss"] for x in losses[max(0, i - 3) : i + 1]]
        r["values"]["loss"] = loss = sum(near) / len(near) - 0.01
        r["exact"]["loss"] = loss.hex()


def smooth_losses(run, other, step):
    edit_lines(run / "metrics.ndjson", smooth)
    derive(run)
    reseal(run)
    return run


def evaluate_another(run, other, step):
    "The records are those of the other run's model."
    path = "evaluations/validation/records.ndjson"
    shutil.copyfile(other / path, run / path)
    derive(run)
    reseal(run)
    return run


# How to forge at a step, and the last steps of the segments of training which that forges;
# none: the evaluation alone.
KINDS = {
    "weights of another seed spliced in": (splice_weights, lambda step: {step}),
    "a run of another seed spliced in": (splice_run, lambda step: set(ENDS[step // 2 :])),
    "a figure edited": (edit_figure, lambda step: {step}),
    "losses smoothed": (smooth_losses, lambda step: set(ENDS)),
    "data swapped for a while": (swap_data, lambda step: {step}),
    "fine-tuned on the test set": (tune_on_test_set, lambda step: {ENDS[-1]}),
    "evaluation of another model": (evaluate_another, lambda step: set()),
}


def probability_as_far(seen, probabilities):
    """That as many or as few of independent events happen, or fewer still: exact, the smaller side.

    Where an event is nearly certain, a normal approximation calls a single miss impossible.
    """
    ways = [1.0]
    for p in probabilities:
        ways = [a * (1 - p) + b * p for a, b in zip([*ways, 0], [0, *ways])]
    return min(sum(ways[: seen + 1]), sum(ways[seen:]))


def test_planted_forgeries_are_found_as_often_as_predicted(runs, honest, tmp_path, monkeypatch):
    from codex_nb.experiments import segments
    from codex_nb.experiments.replay import sealed_level

    # An audit verifies L0 first; each forged run holds there, which is looked at once for each.
    holds = {}

    def level(run):
        if run not in holds:
            holds[run] = sealed_level(run)
            assert holds[run].holds, holds[run]
        return holds[run]

    monkeypatch.setattr(segments, "sealed_level", level)
    other, execute, forged = runs / "runs" / "other", Remembered(tmp_path / "made"), {}
    found, expected = {kind: [] for kind in KINDS}, {kind: [] for kind in KINDS}
    for i in range(counts(7, 1008)):
        kind = list(KINDS)[i % len(KINDS)]
        forge, ends = KINDS[kind]
        step = 2 * random.Random(i).randrange(1, SEGMENTS)
        if (kind, step) not in forged:
            run = copy(honest, tmp_path / f"forged-{len(forged)}")
            forged[kind, step] = forge(run, other, step)
        audit = segments.audit_run(forged[kind, step], DRAWN, number=i, run_segment=execute)
        forged_ends = ends(step)
        drawn = {s.span.stop for s in audit.drawn if s.of == segments.TRAINING}
        assert audit.ok is (bool(forged_ends) and not drawn & forged_ends), (kind, step, audit)
        n = len(forged_ends)
        escapes = segments.escape_probability(SEGMENTS, DRAWN, n) if n else 0
        found[kind].append(not audit.ok)
        expected[kind].append(1 - escapes)
    for kind in KINDS:
        n, mean = len(found[kind]), sum(expected[kind])
        print(f"{kind:36} {sum(found[kind]):4} of {n:4} found, {mean:6.1f} predicted")
        assert probability_as_far(sum(found[kind]), expected[kind]) > 1e-5, kind
    if PROVE:
        print(f"{sum(map(sum, found.values()))} of {i + 1} forgeries found")


def test_an_honest_run_passes_every_segment(honest, tmp_path):
    from codex_nb.experiments.segments import audit_run

    audit = audit_run(honest, 99, number=0, run_segment=Remembered(tmp_path))
    assert audit.ok and len(audit.findings) == SEGMENTS + 1
    assert audit.totals == {"training": (SEGMENTS, 24), "evaluations/validation": (1, 12)}


OTHER_KINDS = {
    "a limit in minutes": dict(minutes=0.02, steps=None, save_every=20),
    "early stopping": dict(patience=1, min_delta=9.0, eval_every=3, steps=24, save_every=4),
    "muon, an average, bf16": dict(optimizer="muon", ema=0.9, dtype="bf16", save_every=7),
    "an adapter": dict(adapter="lora", rank=2, adapter_dropout=0.1, seed=0),
    "two processes": dict(nproc=2, save_every=8),
}


@pytest.mark.parametrize("kind", counts(["early stopping", "an adapter"], list(OTHER_KINDS)))
def test_runs_of_every_kind_can_be_audited(kind, runs, honest, tmp_path):
    from codex_nb.experiments.segments import audit_run, execute
    from codex_nb.run.judging import train_and_judge

    given = dict(OTHER_KINDS[kind])
    if kind == "an adapter":
        given["base"] = str(checkpoint_at(honest, 24))
    cfg = config(**given)
    run = train_and_judge(cfg, runs / "runs" / kind.replace(" ", "-")).folder
    run_segment = execute if kind == "two processes" else partial(here)
    audit = audit_run(run, 99, number=0, folder=tmp_path / "made", run_segment=run_segment)
    assert audit.ok, audit.lines()
    assert audit.totals["training"][0] > 1


def test_another_machine_proves_nothing(honest, tmp_path):
    from codex_nb.experiments.segments import audit_run

    run = copy(honest, tmp_path / "claimed")
    for p in (run / "checkpoints").iterdir():
        state = read(p / "state.json")
        state["exact"]["cpu"] = "another"
        (p / "state.json").write_text(json.dumps(state))
    reseal(run)
    audit = audit_run(run, 1, number=0, part=(1, 2), run_segment=here)
    assert [f.holds for f in audit.findings] == [None] and not audit.ok
    assert "cpu" in audit.findings[0].detail


def test_checkpoints_that_were_deleted_are_covered_by_longer_segments(honest, tmp_path):
    from codex_nb.experiments.segments import audit_run, segments

    run = copy(honest, tmp_path / "thinned")
    for step in (2, 4, 8, 20):
        shutil.rmtree(checkpoint_at(run, step))
    edit_lines(run / "states.ndjson", lambda rows: rows[0].update(digest="ab" * 32))
    reseal(run)
    spans = [s.span for s in segments(run)["training"]]
    assert spans[:2] == [range(0, 6), range(6, 10)] and len(spans) == 8
    audit = audit_run(run, 8, number=0, run_segment=Remembered(tmp_path / "made"))
    wrong = [f for f in audit.findings if not f.holds]
    assert [f.detail for f in wrong] == ["the state of step 2 is another one"]
    assert not audit.gaps


def test_what_segments_do_not_cover_is_not_proven(honest, tmp_path):
    "A run whose chain was removed, as an older version would have left it."
    from codex_nb.experiments.segments import audit_run

    run = copy(honest, tmp_path / "bare")
    (run / "states.ndjson").unlink()
    edit_lines(run / "metrics.ndjson", lambda rows: smooth(rows))
    derive(run)
    reseal(run)
    audit = audit_run(run, 9, number=0, run_segment=here)
    assert all(f.holds for f in audit.findings) and not audit.ok
    assert audit.gaps == ("training, steps 1 to 24: no state after them was kept",)


@pytest.mark.parametrize("step", [8, 24])
def test_a_segment_compares_all_of_its_records(step, honest, tmp_path):
    "Also where the record of training at its end is missing, or one more is there."
    from codex_nb.experiments.run_diff import read_contents
    from codex_nb.experiments.segments import Segment, compare_training

    forged = copy(honest, tmp_path / "forged")

    def better(rows):
        rows[:] = [r for r in rows if (r["step"], r["split"]) != (step, "train")]
        for r in rows:
            if (r["step"], r["split"]) == (step, "validation"):
                r["values"]["loss"] /= 9
                r["exact"]["loss"] = r["values"]["loss"].hex()

    edit_lines(forged / "metrics.ndjson", better)
    segment = Segment("training", range(step - 2, step))
    holds, detail = compare_training(read_contents(forged), segment, honest)
    assert holds is False and detail == f"step {step}: missing from the record of A"
    first = Segment("training", range(0, 2))
    edit_lines(forged / "metrics.ndjson", lambda rows: rows[0]["exact"].update(x="ab" * 8))
    holds, detail = compare_training(read_contents(forged), first, honest)
    assert holds is False and "before the first step" in detail


def test_parts_of_an_audit_are_merged_by_the_command(honest, tmp_path, runs):
    from codex_nb.experiments.segments import audit_run

    reports = []
    for i in (1, 2):
        audit = audit_run(honest, 2, 5, (i, 2), folder=tmp_path / f"part-{i}", run_segment=here)
        reports += ["--merge", tmp_path / f"part-{i}" / "audit.json"]
        assert not audit.ok and len(audit.findings) in (1, 2)
    merged = codex("replay", honest, *reports, home=runs)
    assert merged.returncode == 0 and "audited: all drawn segments hold" in merged.stdout
    half = codex("replay", honest, *reports[:2], home=runs)
    assert half.returncode == 1 and "drawn, not executed yet" in half.stdout
    # a report of another run, of another draw, and what is no report
    other = codex("replay", runs / "runs" / "other", *reports, home=runs)
    assert other.returncode == 1 and "a report is of another run" in other.stderr
    report = read(reports[1])
    for change in (dict(number=6), dict(drawn=report["drawn"][:1]), dict(findings=None)):
        (tmp_path / "changed.json").write_text(json.dumps(report | change))
        words = ["--merge", tmp_path / "changed.json", *reports[2:]]
        wrong = codex("replay", honest, *words, home=runs)
        assert wrong.returncode == 1 and "Traceback" not in wrong.stderr, wrong.stderr
        assert wrong.stderr.count("\n") == 1
    for words in (["--part", "1/2"], ["--segments", "1", "--part", "3/2", "--number", "1"]):
        refused = codex("replay", honest, *words, home=runs)
        assert refused.returncode in (1, 2) and "part" in refused.stderr


def test_the_command_executes_segments_in_their_own_process(honest, runs):
    words = ("--segments", "1", "--number", "3")
    done = codex("replay", honest, *words, "--folder", runs / "audit", "--json", home=runs)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and len(report["findings"]) == 2
    assert report["escape_probability"]["training"]["6"] == 0.5
    assert [p.name for p in (runs / "audit").iterdir()] == ["audit.json"]


@pytest.mark.parametrize("done", [0, 1])
def test_full_disk_leaves_the_findings_that_there_are(done, honest, tmp_path):
    from codex_nb.core.artifacts import DiskError
    from codex_nb.experiments.segments import audit_run

    seen = []

    def fill(run, segment, folder, parameters):
        folder.mkdir()
        (folder / "half").touch()
        seen.append(segment)
        if len(seen) > done:
            raise DiskError(28, "cannot write half: no space left on device")
        return True, ""

    folder = tmp_path / "audit"
    with pytest.raises(DiskError):
        audit_run(honest, 3, 1, folder=folder, run_segment=fill)
    assert files_below(tmp_path) == ["audit/audit.json"] * done
    assert folder.exists() == bool(done)


def test_scoring_that_was_interrupted_has_the_same_records(honest, tmp_path, monkeypatch):
    "Documents that share batches are scored together again: on some processors it shows."
    from codex_nb.core.artifacts import open_artifact
    from codex_nb.data.corpus import open_corpus
    from codex_nb.eval import scoring
    from codex_nb.eval.scoring import load_records, score_shard
    from codex_nb.run.judging import open_trained

    model, tokenizer = open_trained(open_artifact(checkpoint_at(honest, 24)))
    documents = list(open_corpus(config().corpus).split("train"))[:70]
    score_shard(tmp_path / "a", "key", model, tokenizer, documents, detail=True)
    records = load_records(tmp_path / "a", "key")
    (tmp_path / "b").mkdir()
    (name,) = [p.name for p in (tmp_path / "a").iterdir()]
    lines = (tmp_path / "a" / name).read_bytes().splitlines(keepends=True)
    (tmp_path / "b" / name).write_bytes(b"".join(lines[:31]) + b"00000000 [3")
    together = []

    def score(model, tokenizer, documents, **options):
        together.append([d.id for d in documents])
        return original(model, tokenizer, documents, **options)

    original = scoring.score
    monkeypatch.setattr(scoring, "score", score)
    score_shard(tmp_path / "b", "key", model, tokenizer, documents, detail=True)
    ids = [d.id for d in documents]
    assert together == [ids[:64], ids[64:]]
    assert load_records(tmp_path / "b", "key") == records


@pytest.mark.parametrize("holds", [0, 1, "yes", []])
def test_a_finding_that_is_neither_true_nor_false_is_refused(holds, tmp_path):
    "To `==` a 0 is False, but what is refuted must not count as shown by another report."
    from codex_nb.experiments.segments import read_report
    from codex_nb.run.run_record import RunError

    segment = {"of": "training", "start": 0, "stop": 2, "step": 1}
    finding = {"segment": segment, "holds": holds, "detail": ""}
    report = {"subject": "ab", "number": 1, "sealed": "", "drawn": [segment], "findings": [finding]}
    path = tmp_path / "audit.json"
    path.write_text(json.dumps(report))
    with pytest.raises(RunError, match="is no report of an audit"):
        read_report(path)
    finding["holds"] = False
    path.write_text(json.dumps(report))
    assert read_report(path) == report
