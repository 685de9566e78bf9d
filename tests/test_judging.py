"""Judging: the same figure however it is computed, evaluations that resume, fair comparisons."""

import json
import math
import shutil
import signal
import zlib

import numpy as np
import pytest
from helpers import (
    PROVE,
    checkpoint_files,
    codex,
    counts,
    flags,
    read_lines,
    shared_folder,
    start,
    wait_until,
)

from codex_nb.core.sandbox import sandbox_problem
from codex_nb.experiments.verify import contradictions, verify_run


def train(home, name, **given):
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.settings import RunConfig

    settings = dict(steps=40, eval_every=100, width=32, seq_len=64, save_every=100)
    settings |= dict(resamples=200, dtype="fp32") | given
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODEX_NB_HOME", str(home))
        train_and_judge(RunConfig.from_preset("smoke", **settings), home / "runs" / name)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    "Two settings, each trained with two seeds."

    def make(home):
        train(home, "a-0")
        train(home, "a-1", seed=1)
        train(home, "b-0", steps=10)
        train(home, "b-1", steps=10, seed=1)

    return shared_folder(tmp_path_factory, "four-runs", make)


@pytest.fixture
def home(trained, tmp_path):
    "A workspace with the trained runs, to write to."
    shutil.copytree(trained, tmp_path / "home")
    return tmp_path / "home"


def evaluate(home, name, **given):
    settings = dict(checkpoint="a-0", split="train", max_documents=60, resamples=200)
    settings |= dict(max_new_tokens=4) | given
    settings = {name: value for name, value in settings.items() if value is not None}
    folder = home / "runs" / name
    return codex("run", "evaluate", "--quiet", "--folder", folder, *flags(settings), home=home)


def summary(home, name, part="train"):
    return json.loads((home / "runs" / name / "evaluations" / part / "summary.json").read_text())


def records(home, name, part="train"):
    return read_lines(home / "runs" / name / "evaluations" / part / "records.ndjson")


def test_batch_size_processes_and_dtype_do_not_change_the_figure(home):
    "Batch 1, 3, 16; 1 and 2 processes: 1e-6. bf16: 2e-3."
    some = [(16, 1, "fp32"), (3, 2, "fp32")]
    all_of_them = [(b, n, d) for b in (1, 3, 16) for n in (1, 2) for d in ("fp32", "bf16")]
    made = {}
    for batch, nproc, dtype in counts(some, all_of_them):
        name = f"e-{batch}-{nproc}-{dtype}"
        done = evaluate(home, name, eval_batch=batch, nproc=nproc, dtype=dtype, ngram=0)
        assert done.returncode == 0, done.stderr
        made[batch, nproc, dtype] = np.array([r["nll"] for r in records(home, name)])
    first = made[16, 1, "fp32"]
    for (batch, nproc, dtype), nll in made.items():
        off = (abs(nll - first) / first).max()
        print(f"batch {batch} processes {nproc} {dtype}: {off:.1e}")
        assert len(nll) == 60 and off < (1e-6 if dtype == "fp32" else 2e-3)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL] if PROVE else [signal.SIGTERM])
def test_stopped_evaluation_resumes_without_scoring_again(home, how):
    name = f"stopped-{how.name}"
    folder = home / "runs" / name
    n = counts(100, 240)
    settings = dict(checkpoint="a-0", split="train", max_documents=n, eval_batch=1, stride=4)
    settings |= dict(resamples=200, max_new_tokens=4, ngram=0)
    words = ["run", "evaluate", "--quiet", "--folder", folder, *flags(settings)]
    p = start("codex-nb", *words, home=home, fresh=PROVE)
    part = folder / "scoring" / "part-0-of-1.ndjson"

    def written():
        return part.exists() and part.read_bytes().count(b"\n") > 30

    wait_until(lambda: written() or p.poll() is not None)
    p.send_signal(how)
    _, err = p.communicate(timeout=60)
    assert p.returncode == (-9 if how == signal.SIGKILL else 143), err
    before = part.read_bytes()
    assert 30 < before.count(b"\n") <= n
    # a record that scoring would not make
    lines = before.splitlines(keepends=True)
    i, marked = json.loads(lines[1].partition(b" ")[2])
    marked["nll"] += 1000
    text = json.dumps([i, marked]).encode()
    lines[1] = b"%08x %b\n" % (zlib.crc32(text), text)
    part.write_bytes(b"".join(lines))
    done = codex("resume", name, "--quiet", home=home)
    assert done.returncode == 0, done.stderr
    assert len(records(home, name)) == n and not (folder / "scoring").exists()
    assert codex("verify", name, home=home).returncode == 0
    assert records(home, name)[i]["nll"] == marked["nll"]  # not made again


def test_planted_copies_of_training_text_are_found(home, tmp_path, monkeypatch):
    from codex_nb.data.corpus import CorpusConfig, open_corpus

    monkeypatch.setenv("CODEX_NB_HOME", str(home))
    rng = np.random.default_rng(0)
    train_texts = [d.text for d in open_corpus(CorpusConfig(data="sample")).split("train")]
    vocabulary = [f"w{i}" for i in range(5000)]
    documents = []
    n = counts(60, 399)
    for i in range(n):  # every third is planted
        planted = i % 3 == 0
        copy = " ".join(train_texts[i].split()[4:24]).upper()
        before, after = (" ".join(rng.choice(vocabulary, k)) for k in (40, 30))
        text = f"{before} {copy} {after}" if planted else f"{before} {after}"
        documents.append({"id": f"{i:03}", "text": text, "meta": {"planted": str(planted)}})
    data = tmp_path / "eval.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents))
    given = dict(data=str(data), max_documents=1000, slices=["planted"], split="all")
    done = evaluate(home, "planted", **given)
    assert done.returncode == 0, done.stderr
    s, rows = summary(home, "planted", "all"), records(home, "planted", "all")
    assert len(rows) == n
    planted = {r["id"] for r in rows if r["meta"]["planted"] == "True"}
    assert {r["id"] for r in rows if r["overlap"]["found"]} == planted and len(planted) == n / 3
    found = s["contamination"]
    assert found["contaminated"] == len(planted)
    assert found["clean"]["documents"] == len(rows) - len(planted)
    assert s["slices"]["planted"]["False"]["metrics"] == found["clean"]["metrics"]
    print(f"found {len(planted)} of {len(planted)}")


def test_compare_pairs_seeds_and_refuses_damaged_records(home):
    done = codex("compare", "b-0", "b-1", "a-0", "a-1", "--json", home=home)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (c,) = found["comparisons"]
    assert c["shown"] and c["seeds"] == [2, 2] and "2 of 2 seeds" in c["verdict"]
    assert c["bits_per_byte"]["high"] < 0
    assert {r["setting"] for r in found["settings"]} == {"seed", "steps", "checkpoint"}
    same = json.loads(codex("compare", "a-0", "a-0", "--json", home=home).stdout)
    (c,) = same["comparisons"]
    assert not c["shown"] and c["verdict"].startswith("no difference shown") and c["p"] == 1
    evaluation = home / "runs" / "a-0" / "evaluations" / "validation"
    with open(evaluation / "records.ndjson", "r+b") as f:
        f.seek(200)
        f.write(b"9")
    done = codex("compare", "b-0", "a-0", home=home)
    assert done.returncode == 1 and "the content has changed" in done.stderr


BAD = {
    "no such checkpoint": (dict(checkpoint="nowhere"), "nowhere: no such run in"),
    "no such data": (dict(data="/nowhere/at/all"), "there is no such file or folder"),
    "no such slice": (dict(slices=["season"]), "slices: no document has 'season'"),
    "no such task": (dict(task="riddles"), "no built-in task of that name"),
    "too many examples": (dict(task="questions", shots=90), "use fewer shots"),
    "no such metric": (
        dict(task="questions", task_metrics=["bleuu"]),
        "there is no metric 'bleuu'; did you mean bleu?",
    ),
    "stride": (dict(stride=100), "stride must be in 1..64, got 100"),
    "batch": (dict(eval_batch=0), "eval_batch: given 0"),
}


@pytest.mark.parametrize("name", BAD if PROVE else list(BAD)[::4])
def test_bad_input_is_one_clear_error(home, name):
    given, message = BAD[name]
    small = dict(max_documents=4) | (dict(max_questions=5) if "task" in given else {})
    run = f"bad-{name.replace(' ', '-')}"
    done = evaluate(home, run, **(small | given))
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    folder = home / "runs" / run
    assert not list(folder.glob("evaluations/*/summary.json")) or "task" in given


def bring_benchmarks(home, monkeypatch):
    "Two imported tasks in the workspace, from files in their authors' form."
    from codex_nb.eval.benchmarks import import_task

    monkeypatch.setenv("CODEX_NB_HOME", str(home))
    rows = [
        dict(question=f"is {n} even", passage=f"{n} is a number.", answer=n % 2 == 0)
        for n in range(12)
    ]
    (home / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"One, two, and then {n} more." for n in range(8)]
    (home / "lambada_test.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (boolq,) = import_task("boolq", home)
    import_task("lambada_openai", home)
    pairs = [dict(prompt=t, chosen=f" It is {n}.", rejected=" No.") for n, t in enumerate(texts)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    import_task("preferences", home / "pairs.jsonl")
    return boolq.digest


def test_task_scores_are_the_means_of_its_records(home, monkeypatch):
    digest = bring_benchmarks(home, monkeypatch)
    given = dict(task="questions,boolq", max_questions=24, task_metrics=["exact_match", "word_f1"])
    done = evaluate(home, "asked", **given)
    assert done.returncode == 0, done.stderr
    s, rows = summary(home, "asked", "task-questions"), records(home, "asked", "task-questions")
    assert len(rows) == 24 and s["questions_in_task"] == 360
    for metric, v in s["metrics"].items():
        if metric != "f1_macro":
            scores = [r["scores"][metric] for r in rows if metric in r["scores"]]
            assert math.isclose(v["value"], np.mean(scores))
    s, rows = summary(home, "asked", "task-boolq"), records(home, "asked", "task-boolq")
    assert len(rows) == 12 and s["chance"] == 0.5
    assert s["centred"]["value"] == 2 * s["metrics"]["acc"]["value"] - 1
    parents = json.loads((home / "runs" / "asked" / "parents.json").read_text())
    assert parents["task_boolq"] == digest
    core = json.loads((home / "runs" / "asked" / "core.json").read_text())
    assert core["tasks"] == {"boolq": s["centred"]["value"]}
    assert verify_run(home / "runs" / "asked")["problems"] == []


def ask_tasks(home, name, checkpoint, task, **given):
    from codex_nb.run.judging import find_checkpoint, judge_tasks, open_trained
    from codex_nb.run.recipe import finish
    from codex_nb.run.settings import JudgeConfig
    from codex_nb.run.training_inputs import start_run

    found = find_checkpoint(checkpoint)
    given |= dict(task=task, dtype="fp32", checkpoint=checkpoint)
    cfg = JudgeConfig.from_preset("smoke", **given)
    run = start_run("evaluate", cfg, home / "runs" / name, checkpoint=found)
    judge_tasks(run, *open_trained(found), found)
    finish(run)
    return run.folder


def test_imported_tasks_are_sealed_compared_and_verified(home, monkeypatch):
    bring_benchmarks(home, monkeypatch)
    for name in ("a-0", "b-0"):
        folder = ask_tasks(home, f"asked-{name}", name, "boolq,lambada_openai,preferences")
        assert verify_run(folder)["problems"] == []
    done = codex("compare", "asked-a-0", "asked-b-0", "--task", "all", "--json", home=home)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["comparisons"]
    counted = [(c["task"], c["metric"], c["questions"]) for c in found]
    assert counted == [
        ("boolq", "acc", 12),
        ("lambada_openai", "acc", 8),
        ("preferences", "accuracy", 8),
    ]
    for name in "ab":
        rows = records(home, f"asked-{name}-0", "task-preferences")
        whole = [r["nll"][0] < r["nll"][1] for r in rows]
        assert [r["scores"]["accuracy"] for r in rows] == whole
        metrics = summary(home, f"asked-{name}-0", "task-preferences")["metrics"]
        assert math.isclose(metrics["accuracy"]["value"], np.mean(whole))
        assert metrics["accuracy_per_token"]["normalised_by"] == "tokens"
    values = [summary(home, f"asked-{n}-0", "task-boolq")["metrics"]["acc"]["value"] for n in "ab"]
    assert math.isclose(found[0]["difference"]["value"], values[1] - values[0], abs_tol=1e-12)
    # a core score that does not follow from the answers, or answers that no task in it has
    core = json.loads((folder / "core.json").read_text())
    (folder / "core.json").write_text(json.dumps(core | {"value": core["value"] + 0.1}))
    assert any("core.json: value is" in problem for problem in contradictions(folder))


def test_programs_are_refused_by_the_command_before_a_model_is_opened(home, monkeypatch):
    bring_programs(home, monkeypatch)
    done = evaluate(home, "refused", task="humaneval")
    assert done.returncode == 1 and "-p run_code sandbox" in done.stderr
    assert "Traceback" not in done.stderr and not (home / "runs" / "refused").exists()


def bring_programs(home, monkeypatch):
    from test_sandbox import HUMANEVAL

    from codex_nb.eval.benchmarks import import_task

    monkeypatch.setenv("CODEX_NB_HOME", str(home))
    rows = [HUMANEVAL | {"task_id": f"HumanEval/{n}"} for n in range(3)]
    path = home / "HumanEval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_task("humaneval", path)
    return HUMANEVAL["canonical_solution"]


@pytest.mark.skipif(sandbox_problem() is not None, reason=f"no sandbox: {sandbox_problem()}")
def test_programs_that_were_run_are_sealed_like_other_answers(home, monkeypatch):
    solution = bring_programs(home, monkeypatch)
    texts = [solution, "    return x\n", solution]
    monkeypatch.setattr("codex_nb.eval.tasks._write_texts", lambda *args: texts)
    folder = ask_tasks(home, "coded", "a-0", "humaneval", run_code="sandbox")
    s, rows = summary(home, "coded", "task-humaneval"), records(home, "coded", "task-humaneval")
    assert [r["scores"] for r in rows] == [{"pass@1": 1.0}, {"pass@1": 0.0}, {"pass@1": 1.0}]
    assert [r["prediction"] for r in rows] == texts
    assert rows[1]["meta"]["verdict"] == "AssertionError: assert candidate(shift(x)) == x"
    assert math.isclose(s["metrics"]["pass@1"]["value"], 2 / 3)
    assert s["sandbox"]["seconds"] == 5
    assert verify_run(folder)["problems"] == []


def test_evaluate_judges_the_newest_training_be_it_a_fine_tuning(home):
    "Without a checkpoint named, a fine-tuning that ended last is judged, no older training."
    folder = home / "runs" / "tuned"
    settings = dict(base="a-0", steps=2, eval_every=100, save_every=100, batch_size=4)
    settings |= dict(eval_documents=2, max_documents=4, max_new_tokens=4, resamples=100)
    words = ["run", "finetune", "--quiet", "--folder", folder, *flags(settings)]
    done = codex(*words, home=home)
    assert done.returncode == 0, done.stderr
    done = evaluate(home, "newest", checkpoint=None, split="validation", max_documents=4)
    assert done.returncode == 0, done.stderr
    parents = json.loads((home / "runs" / "newest" / "parents.json").read_text())
    (checkpoint,) = (folder / "checkpoints").glob("step-*/manifest.json")
    assert parents["checkpoint"] == json.loads(checkpoint.read_text())["digest"]
    assert checkpoint_files(folder, 2)
