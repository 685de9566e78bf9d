"""Whatever is forged in a run and sealed again is found, or is said to be not proven."""

import csv
import io
import json
import random
import re
import shutil

import pytest
from forger import (
    FORGERIES,
    HASHES,
    MANIFEST,
    UNPROVABLE,
    change_weights,
    checkpoints,
    copy,
    derive,
    edit,
    edit_lines,
    read,
    reseal,
    rows_of,
    write,
    write_rows,
)
from helpers import NBS, counts, trained_runs

SMALL = dict(steps=8, eval_every=4, save_every=4, max_documents=12, resamples=100)
SMALL |= dict(width=32, layers=1, seq_len=32, max_new_tokens=8)


@pytest.fixture(scope="session")
def two_executions(tmp_path_factory):
    "A workspace with a run, `claimed`, and an honest execution of its settings, `twin`."
    return trained_runs(tmp_path_factory, "two-executions", dict(claimed=SMALL, twin=SMALL))


@pytest.fixture
def twin(two_executions, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(two_executions))
    return two_executions / "runs" / "twin"


@pytest.fixture
def run(twin, tmp_path):
    "A copy of the run to forge."
    return copy(twin.parent / "claimed", tmp_path / "claimed")


def identical_level(run, twin):
    "L3, with the twin as the replay."
    from codex_nb.experiments.replay import _identical_level
    from codex_nb.experiments.run_diff import diff_runs, read_contents

    return _identical_level(read_contents(run), twin, diff_runs(run, twin))


def caught(run, twin):
    "The levels that do not hold, and what each says."
    from codex_nb.experiments.replay import result_level, sealed_level

    levels = [sealed_level(run), identical_level(run, twin), result_level(run, twin)]
    return {level.name: level.detail for level in levels if level.holds is False}


# The levels that do not hold. L4 says nothing of weights, samples and most of the log, and none of
# the levels below it is excused on the same machine.
CAUGHT = {
    "interval": "L0 L3 L4",
    "compressors": "L3 L4",
    "notes": "L0 L3",
    "slices": "L0 L3 L4",
    "calibration": "L0 L3 L4",
    "documents in split": "L3 L4",
    "contamination": "L0 L3 L4",
    "figure of the summary": "L0 L3 L4",
    "figure of the evaluation manifest": "L0 L3",
    "values of the log": "L0 L3 L4",
    "table of the log": "L0",
    "figures of the manifest": "L0",
    "steps of the manifest": "L0",
    "exact values under other names": "L0 L3 L4",
    "only batch fingerprints": "L0 L3 L4",
    "curve with its exact values": "L3 L4",
    "curve after the last step": "L0 L3",
    "figure among the times of saves": "L0",
    "last step left out": "L0 L3",
    "weights without manifest": "L0 L3",
    "weights": "L3",
    "another checkpoint more": "L0 L3",
    "state of a kept checkpoint": "L0 L3",
    "state of a checkpoint that was not kept": "L3",
    "last state left out": "L0 L3",
    "last checkpoint under another name": "L0 L3",
    "last checkpoint left out": "L0",
    "record after training": "L0 L3",
    "record between steps": "L0 L3",
    "sample after training": "L0 L3",
    "answers to an invented task": "L0 L3",
    "hidden evaluation": "L3",
    "another log beside": "L3",
    "figures of a checkpoint": "L0 L3",
    "another machine with a figure": "L0 L3 L4",
    "another machine with everything": "L3 L4",
    "another machine without hard documents": "L3 L4",
    "another machine with a curve": "L3 L4",
    "another machine with a corpus": "L3 L4",
    "another seed of the weights": "L3 L4",
    "corpus": "L3 L4",
    "corpus of the run alone": "L0 L3 L4",
    "corpus of the manifest alone": "L0",
    "samples": "L3",
    "record twice": "L0 L3 L4",
    "records": "L0 L3",
    "records with all that follows": "L3 L4",
    "table of the records": "L0 L3",
    "evaluation of another checkpoint": "L0 L3",
    "evaluation of a foreign checkpoint": "L0 L3",
    "stride": "L0 L3",
    "split": "L0 L3",
    "phantom evaluation": "L0 L3",
    "identity unlike the settings": "L0 L3",
    "digest of the settings": "L0",
    "settings with their identity": "L3",
    "export": "L3",
    "export of another checkpoint": "L0 L3",
    "export without manifest": "L0 L3",
    "part of no kind": "L0",
    "linked folder of evaluations": "L0 L4",
    "linked checkpoints": "L0",
    "figure in a run of an unknown kind": "L0 L3 L4",
    "checkpoint in a run that trains nothing": "L0 L3",
    "base that is its own": "L0 L3 L4",
    "base that no checkpoint has": "L0 L3 L4",
    "remark in the log": "L3",
    "some batch fingerprints": "L3",
    "split with a look alike name": "L3",
    "file more": "L3",
    "failed run": "L3",
    "everything": "L3 L4",
}


def test_the_page_shows_what_is_caught():
    "Executed in `make prove`, it must say here what the tests below find."
    cells = json.loads((NBS / "reference" / "threat_model.ipynb").read_text())["cells"]
    outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
    (table,) = ["".join(o["data"]["text/plain"]) for o in outputs if "data" in o]
    rows = [re.match(r"(.+?) {2,}((?:L\d ?)+)", line) for line in table.splitlines()]
    assert {m[1]: m[2].strip() for m in rows if m} == CAUGHT


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_caught_at_its_levels(name, run, twin):
    FORGERIES[name](run)
    found = caught(run, twin)
    assert " ".join(found) == CAUGHT[name], found


def test_a_run_that_is_only_sealed_again_passes(run, twin):
    before = read(run / MANIFEST)["digest"]
    reseal(run)
    assert not caught(run, twin)
    assert read(run / MANIFEST)["digest"] == before
    derive(run)
    reseal(run)
    assert not caught(run, twin) and read(run / MANIFEST)["digest"] == before


def test_the_worst_forgery_proves_nothing(run, twin):
    from codex_nb.experiments.replay import Level, Replay, result_level, sealed_level
    from codex_nb.experiments.run_diff import diff_runs

    def proven():
        levels = [sealed_level(run), Level("L2", True, "as if the steps were right")]
        levels += [identical_level(run, twin), result_level(run, twin)]
        replay = Replay(str(run), str(twin), tuple(levels), diff_runs(run, twin), ())
        return replay.proven, replay.ok

    assert proven()[0] == "L4"
    FORGERIES["everything"](run)
    assert proven() == ("L2", False)


@pytest.mark.parametrize("name", UNPROVABLE)
def test_what_cannot_be_proven_is_said_to_be_unproven(name, run, twin):
    from codex_nb.experiments.replay import UNPROVEN

    UNPROVABLE[name](run)
    assert not caught(run, twin)
    said = {
        "code version": "code and packages",
        "code files": "code and packages",
        "packages": "code and packages",
        "producer": "code and packages",
        "what the notebook printed": "what the notebook printed",
        "settings that cannot change the result": "settings that cannot change the result",
    }
    assert said.get(name, name) in UNPROVEN
    assert identical_level(run, twin).detail.endswith(f"Not proven: {UNPROVEN}")


def test_what_l4_leaves_open_is_said(run, twin):
    from codex_nb.experiments.replay import result_level

    FORGERIES["weights"](run)
    level = result_level(run, twin)
    assert level.holds and "Not proven: weights, samples, the log after step 5" in level.detail


def test_other_code_and_packages_are_listed(run, twin):
    from codex_nb.experiments.run_diff import diff_runs

    for name in ("code version", "code files", "packages"):
        UNPROVABLE[name](run)
    diff = diff_runs(run, twin)
    assert {"version", "git", "files.train/engine.py"} <= diff.causes.code.keys()
    assert diff.causes.environment["packages.numpy"][0] == "99.0"
    assert any(line.startswith("code: version: 9.9 in A") for line in diff.lines())


def other(value, rng):
    "Another value, mostly of the same type."
    if rng.random() < 0.1:
        return rng.choice([x for x in (None, 7, "x", [], {}, True) if x != value])
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return rng.choice([value + 1, -value - 1, value * 1.0001 + 1e-9, 0.123])
    if isinstance(value, str):
        i = rng.randrange(len(value) + 1)
        return value[:i] + rng.choice("abc019 ") + value[i + 1 :]
    return type(value)()


def places(value, found):
    "Every container and key below a JSON value."
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], found)
    return found


def mutate_json(value, rng, skipped=()):
    "Change or delete one field; say which."
    found = [(c, k) for c, k in places(value, []) if not (c is value and k in skipped)]
    container, key = rng.choice(found)
    old = repr(container[key])[:60]
    if rng.random() < 0.1:
        del container[key]
        return f"{key} deleted, was {old}"
    container[key] = other(container[key], rng)
    return f"{key}: {old} -> {container[key]!r:.60}"


def mutate_rows(path, rng):
    rows = rows_of(path)
    i, j = rng.randrange(len(rows)), rng.randrange(len(rows))
    how = rng.choice(["field"] * 7 + ["deleted", "twice", "swapped"])
    what = f"line {i + 1} {how} {j + 1}"
    if how == "field":
        what = f"line {i + 1}: {mutate_json(rows[i], rng)}"
    elif how == "deleted":
        del rows[i]
    elif how == "twice":
        rows.insert(j, rows[i])
    else:
        rows[i], rows[j] = rows[j], rows[i]
    write_rows(path, rows)
    return what


def mutate_table(path, rng):
    rows = list(csv.reader(io.StringIO(path.read_text("utf-8"), newline="")))
    row = rng.choice(rows)
    i = rng.randrange(len(row))
    old, row[i] = row[i], other(row[i], rng)
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    path.write_bytes(text.getvalue().encode())
    return f"{old} -> {row[i]}"


def mutate_bytes(path, rng):
    data = bytearray(path.read_bytes())
    # half of them among the names and shapes at the beginning
    i = rng.randrange(rng.choice([200, len(data)]))
    data[i] ^= rng.randrange(1, 256)
    path.write_bytes(data)
    return f"byte {i}"


def mutate(run, rng):
    "Change something anywhere in a run, and seal it again; say what."
    names = [p.relative_to(run).as_posix() for p in sorted(run.rglob("*")) if p.is_file()]
    name = rng.choice([n for n in names if not n.startswith(".")])
    path, kept = run / name, ()
    if path.name == MANIFEST:
        what = []
        edit(path, lambda m: what.append(mutate_json(m, rng, HASHES)))
        what, kept = what[0], ("config", "parents", "meta")
    elif path.suffix == ".json":
        value = read(path)
        what = mutate_json(value, rng)
        write(path, value)
    else:
        how = {".ndjson": mutate_rows, ".csv": mutate_table}
        what = how.get(path.suffix, mutate_bytes)(path, rng)
    sealed = "sealed"
    try:
        if path.suffix == ".ndjson" and rng.random() < 0.5:
            derive(run)
            sealed = "derived and sealed"
        reseal(run, kept if path == run / MANIFEST else ())
    except Exception as e:  # what the forger cannot read, nobody can
        sealed = f"left unsealed: {e!r}"
    return f"{name}: {what}; {sealed}"


def claims(run):
    "All that L3 claims to have proven of a run: file -> content, without what is of one execution."
    from codex_nb.core.config import identity
    from codex_nb.experiments.run_diff import ONE_EXECUTION
    from codex_nb.run.settings import RunConfig

    out = {}
    for p in sorted(run.rglob("*")):
        name = p.relative_to(run).as_posix()
        if p.is_dir() or name.startswith(".") or name == "metrics.csv":
            continue  # L0: the table of the log
        if name == "metrics.ndjson":
            out[name] = [proven_record(r) for r in rows_of(p) if r["split"] != "save"]
        elif ONE_EXECUTION.fullmatch(name):
            continue
        elif p.name == MANIFEST:
            out[name] = proven_manifest(p)
        elif name == "config.json":
            record = read(p)
            settings = identity(RunConfig.from_dict(record["config"]))
            out[name] = [settings, record["identity"], record["digest"], record["kind"]]
        else:
            out[name] = read(p) if p.suffix == ".json" else p.read_bytes()
    return out


def proven_record(record):
    from codex_nb.experiments.run_diff import TIMINGS

    values = {k: v for k, v in record["values"].items() if k not in TIMINGS}
    return {k: v for k, v in record.items() if k not in ("time", "schema")} | {"values": values}


def proven_manifest(path):
    m = {k: v for k, v in read(path).items() if k not in (*HASHES, "created", "producer", "schema")}
    if "figures" in m["meta"]:
        timed = ("save.", "train.tokens_per_second")
        figures = m["meta"].pop("figures").items()
        m["figures"] = {k: v for k, v in figures if not k.startswith(timed)}
    return m


@pytest.mark.parametrize("part", range(counts(1, 20)))
def test_a_mutation_is_caught_or_changes_nothing_that_is_claimed(part, twin, tmp_path):
    from codex_nb.experiments.verify import verify_run

    original = twin.parent / "claimed"
    proven = json.dumps(claims(original), sort_keys=True, default=repr)
    for seed in range(part * 500, part * 500 + counts(50, 500)):
        run = copy(original, tmp_path / "claimed")
        what = f"seed {seed}: {mutate(run, random.Random(seed))}"
        try:
            if not verify_run(run)["ok"] or not identical_level(run, twin).holds:
                continue
            kept = json.dumps(claims(run), sort_keys=True, default=repr)
        except Exception as e:
            raise AssertionError(f"{what} was met by {e!r}") from e
        assert kept == proven, f"{what} was not noticed"


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no text": lambda data: b"\xff\xfe\x00" + data,
    "a list": lambda data: b"[]",
    "a number": lambda data: b"5",
    "null": lambda data: b"null",
    "no keys": lambda data: b"{}",
    "deep": lambda data: b"[" * 200_000,
}


def test_damaged_files_give_one_clear_error(run, twin, tmp_path):
    "In `diff`, the order check, a replay's levels and an audit: no traceback."
    from codex_nb.core.artifacts import ArtifactError
    from codex_nb.core.config import ConfigError
    from codex_nb.experiments.replay import order_level, result_level
    from codex_nb.experiments.run_diff import diff_runs
    from codex_nb.experiments.segments import segments

    texts = [p.relative_to(run) for p in run.rglob("*") if p.suffix in (".json", ".ndjson", ".csv")]
    cases = [(name, how) for name in sorted(texts) for how in DAMAGES]
    random.Random(0).shuffle(cases)
    refused = 0
    for name, how in cases[: counts(40, None)]:
        damaged = copy(run, tmp_path / "damaged")
        (damaged / name).write_bytes(DAMAGES[how]((run / name).read_bytes()))
        for look in (
            lambda run: diff_runs(twin, run),
            lambda run: diff_runs(run, twin),
            lambda run: result_level(run, twin),
            order_level,
            segments,
        ):
            try:
                look(damaged)
            except (ArtifactError, ConfigError) as e:
                refused += 1
                assert "\n" not in str(e) and str(e).strip(), (name, how)
    assert refused > counts(40, 200)


def test_a_checkpoint_that_only_one_has_kept_is_compared_by_its_digest(run, twin, tmp_path):
    "As when another run started from it, so that retention left it there."
    fewer = copy(twin, tmp_path / "twin")
    shutil.rmtree(checkpoints(fewer)[0])
    level = identical_level(run, fewer)
    assert level.holds and level.detail.startswith("checkpoints/step-00000004, checkpoints/step-")
    FORGERIES["figures of a checkpoint"](run)  # outside the digest
    assert "step-00000004: its figures" in caught(run, fewer)["L0"]
    other = copy(twin, tmp_path / "other")
    change_weights(checkpoints(other)[0], 1.5)
    reseal(other)
    assert identical_level(other, fewer).detail.startswith("checkpoints/step-00000004/")


def test_batches_are_proven_of_steps_that_have_a_fingerprint(run, twin, tmp_path):
    from codex_nb.experiments.replay import order_level

    assert order_level(run).holds
    FORGERIES["some batch fingerprints"](run)
    level = order_level(run)
    assert level.holds is None and level.detail.startswith("step 3 has no batch fingerprint")
    edit_lines(run / "metrics.ndjson", lambda rows: rows[2]["exact"].update(fed="0" * 32))
    assert order_level(run).detail.startswith("step 2 had another batch")
    other = copy(twin, tmp_path / "other")
    FORGERIES["corpus"](other)
    level = order_level(other)
    assert level.holds is False and "made from another corpus than the run" in level.detail


def test_that_it_ran_elsewhere_is_the_word_of_the_run(run, twin):
    from codex_nb.experiments.replay import Replay, _excuse, result_level, sealed_level
    from codex_nb.experiments.run_diff import diff_runs

    FORGERIES["another machine with everything"](run)
    diff = diff_runs(run, twin)
    level = _excuse(identical_level(run, twin), diff.causes.machine)
    assert level.holds is None and "says that it ran elsewhere (cpu 'another', here" in level.detail
    levels = sealed_level(run), level, result_level(run, twin)
    replay = Replay(str(run), str(twin), levels, diff, ())
    assert (replay.proven, replay.ok) == ("L0", False)
    assert _excuse(identical_level(run, twin), {}).holds is False


@pytest.mark.parametrize("figures", [[1], {"a": "x"}, {"a": [1]}, {"a": 10**400}, {"a": None}, 5])
def test_figures_that_are_none_damage_one_line_of_the_list(figures, run, twin):
    from codex_nb.run.run_folder import list_runs

    edit(run / MANIFEST, lambda m: m["meta"].update(figures=figures))
    reseal(run, keep=("meta",))
    (listed,) = list_runs(run.parent)
    assert (listed["status"], listed["during_training"]) == ("damaged", {})


def test_a_run_that_starts_from_itself_ends_the_search(run, twin, monkeypatch, tmp_path):
    "L0 refuses it; without L0 nothing may go round for ever."
    from codex_nb.experiments import verify
    from codex_nb.experiments.attest import NOT_PROVEN, known_level
    from codex_nb.experiments.replay import replay
    from codex_nb.run.run_record import RunError

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    copy(run, tmp_path / "runs" / "claimed")
    run = tmp_path / "runs" / "claimed"
    FORGERIES["base that is its own"](run)
    monkeypatch.setattr(verify, "verify_run", lambda folder: {"ok": True})
    assert known_level(run) == NOT_PROVEN
    with pytest.raises(RunError, match="is among the runs that it starts from"):
        replay(run, lineage=True)


def test_a_report_compares_the_settings_with_the_preset(run, twin):
    from codex_nb.deploy.report import report_page

    def claim(record):
        record["sources"] = dict.fromkeys(record["sources"], "preset smoke") | {"preset": "smoke"}

    edit(run / "config.json", claim)
    reseal(run)
    page = report_page(run)
    assert "every setting is that of the preset" not in page
    for name in ("steps", "width", "resamples"):
        assert f"<td>{name}</td><td>{SMALL[name]}</td><td>preset smoke</td>" in page
    edit(run / "config.json", lambda record: record["sources"].update(preset="gpt9"))
    reseal(run)
    assert "<td>seed</td>" in report_page(run)


@pytest.mark.parametrize("found", [dict(gpus=[{"name": {"a": 1}}]), dict(packages=[1, 2])])
def test_an_environment_that_cannot_be_shown_is_named_by_l0(found, run, twin):
    edit(run / "environment.json", lambda e: e.update(found))
    reseal(run)
    assert "environment.json: " in caught(run, twin)["L0"]
