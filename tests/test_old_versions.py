"""Runs made by the version before: this one verifies, resumes, judges, compares and replays them.

tests/fixtures/version-0.1.tar.xz is a workspace of version 0.1.0, without its pictures: `old-train`
and `old-finetune` have finished, `old-evaluate` judged the former, `old-interrupted` was stopped
after step 303 of 1200, and `old-whole` is the same run that nobody stopped. Byte tokenizer, sample
corpus, fp32, one thread.
"""

import json
import shutil
import tarfile

import pytest
from helpers import PROVE, TESTS, checkpoint_files, codex, run_record, train_losses, train_steps

FINISHED = ("old-train", "old-finetune", "old-evaluate", "old-whole")


@pytest.fixture
def home(tmp_path):
    "A copy of the old workspace."
    with tarfile.open(TESTS / "fixtures" / "version-0.1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def same_machine(home):
    "Whether this processor computes to the last bit what the one before has."
    from codex_nb.core.repro import numeric_identity

    checkpoint = home / "runs" / "old-interrupted" / "checkpoints" / "step-00000303"
    exact = json.loads((checkpoint / "state.json").read_text())["exact"]
    here = numeric_identity()
    return all(here[key] == exact[key] for key in ("cpu", "instructions", "torch") if key in here)


@pytest.mark.parametrize("name", FINISHED)
def test_old_runs_hold_their_seal(home, name):
    done = codex("verify", name, home=home)
    assert done.returncode == 0 and "L0 holds: finished" in done.stdout, done.stdout + done.stderr
    assert "absent" not in done.stdout  # corpus, tokenizer and tokens are found by their digests


@pytest.mark.parametrize("name", ["old-train", "old-finetune", "old-whole"])
def test_old_runs_were_fed_what_their_settings_give(home, name):
    assert "L1 holds: " in codex("verify", name, home=home).stdout


def test_damage_to_an_old_run_is_found(home):
    path = home / "runs" / "old-train" / "metrics.ndjson"
    path.write_text(path.read_text().replace('"step": 7', '"step": 8', 1))
    done = codex("verify", "old-train", home=home)
    assert done.returncode == 1 and "L0 does not hold" in done.stdout
    assert "metrics.ndjson" in done.stdout


def test_old_runs_are_listed(home):
    done = codex("runs", home=home)
    assert done.returncode == 0, done.stderr
    for name in (*FINISHED, "old-interrupted"):
        (line,) = (li for li in done.stdout.splitlines() if name in li.split())
        assert ("finished" if name in FINISHED else "interrupted") in line


@pytest.mark.skipif(not PROVE, reason="900 steps; an old run is replayed below")
def test_resume_of_an_old_run_ends_as_the_run_that_nobody_stopped(home, same_machine):
    folder, whole = home / "runs" / "old-interrupted", home / "runs" / "old-whole"
    allow = [] if same_machine else ["--allow", "cpu,instructions,torch"]
    done = codex("resume", "old-interrupted", "--quiet", *allow, home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert train_steps(folder) == list(range(1, 1201))
    ours, theirs = train_losses(folder), train_losses(whole)
    assert all(ours[s] == theirs[s] for s in range(1, 304))
    if same_machine:
        weights = "model.safetensors"
        assert checkpoint_files(folder, 1200)[weights] == checkpoint_files(whole, 1200)[weights]
        assert ours == theirs
    else:
        print("another processor or torch: compared within a tolerance")
        assert max(abs(ours[s] - theirs[s]) / theirs[s] for s in theirs) < 0.02
    verified = codex("verify", "old-interrupted", home=home)
    assert "L0 holds: finished" in verified.stdout and "L1 holds" in verified.stdout


def test_an_old_checkpoint_is_evaluated_to_the_old_figure(home):
    done = codex(
        *("run", "evaluate", "--quiet", "--folder", home / "runs" / "new-evaluate"),
        *("-p", "checkpoint", "old-train", "-p", "max_documents", "8", "-p", "resamples", "500"),
        *("-p", "max_new_tokens", "4", "-p", "split", "test"),
        home=home,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (old,) = (home / "runs" / "old-evaluate" / "evaluations").glob("*/summary.json")
    (new,) = (home / "runs" / "new-evaluate" / "evaluations").glob("*/summary.json")
    old, new = (json.loads(p.read_text())["metrics"]["bits_per_byte"] for p in (old, new))
    assert new["value"] == pytest.approx(old["value"], rel=1e-5)
    assert "L0 holds" in codex("verify", "new-evaluate", home=home).stdout


def test_old_runs_are_compared(home):
    done = codex("compare", "old-train", "old-whole", "--json", home=home)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (comparison,) = found["comparisons"]
    assert comparison["bits_per_byte"]["high"] < 0  # 1200 steps are better than 20
    assert "steps" in {row["setting"] for row in found["settings"]}


def test_an_old_run_is_diffed_with_one_of_this_version(home):
    settings = run_record(home / "runs" / "old-train")["config"]
    assert settings["rows"]  # as it was written then
    done = codex("diff", "old-train", "old-whole", home=home)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_an_old_fine_tuning_generates_text(home):
    done = codex(
        *("generate", "old-finetune", "--prompt", "Who", "-p", "max_new_tokens=4"), home=home
    )
    assert done.returncode == 0, done.stderr


def test_replay_of_an_old_run_holds(home, same_machine):
    done = codex("replay", "old-whole", "--steps", "20", "--json", home=home)
    found = json.loads(done.stdout)
    held = {level["name"]: level["holds"] for level in found["levels"]}
    assert held["L0"] and held["L1"], done.stdout
    if same_machine:
        assert done.returncode == 0 and found["proven"] == "L2", done.stdout
    assert found["diff"]["code"]  # this version's code is not the old one's, and that is said


def test_only_names_of_the_old_version_are_no_difference(home):
    from codex_nb.experiments.run_diff import compare_checkpoints, read_contents
    from codex_nb.train.checkpoint import read_state

    old, renamed = home / "runs" / "old-train", home / "runs" / "renamed"
    shutil.copytree(old, renamed)
    for path in renamed.glob("checkpoints/*/state.json"):
        assert "keep_apart" in path.read_text() and "stale" in path.read_text()
        path.write_text(json.dumps(read_state(path.parent)))
        assert "keep_apart" not in path.read_text() and "stale" not in path.read_text()
    same, differences = compare_checkpoints(read_contents(old), read_contents(renamed))
    assert same and not differences
    for path in renamed.glob("checkpoints/*/state.json"):
        state = read_state(path.parent)
        state["data"]["rows"]["isolate_documents"] = "changed"
        path.write_text(json.dumps(state))
    _, differences = compare_checkpoints(read_contents(old), read_contents(renamed))
    assert differences and all("isolate_documents" in str(d) for d in differences)
