"""What a forger can do: edit anything in a run folder, and compute every hash again.

The hashes are computed here from their documented formats, not by the package, so that a change
of a format does not pass unnoticed.
"""

import csv
import hashlib
import io
import json
import shutil
from functools import partial
from pathlib import Path

MANIFEST = "manifest.json"
HASHES = ("files", "attachments", "digest", "check")  # what `reseal` computes of a manifest


def digest(value):
    "SHA-256 of canonical JSON."
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read(path):
    return json.loads(path.read_bytes())


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(path, value):
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def edit(path, change):
    "Change what a JSON file holds, in place."
    value = read(path)
    change(value)
    write(path, value)


def edit_lines(path, change):
    "Change the list of records of a file of JSON lines, in place."
    rows = rows_of(path)
    change(rows)
    write_rows(path, rows)


def copy(run, to):
    "A copy of a run to forge; an earlier one there is removed."
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(run, to))


def evaluation(run):
    return run / "evaluations" / "validation"


def checkpoints(run):
    return sorted((run / "checkpoints").iterdir())


def _files(folder):
    out = {}
    for p in sorted(folder.rglob("*")):
        name = p.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if p.is_file() and name != MANIFEST and not hidden:
            data = p.read_bytes()
            out[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    return out


def _reseal_folder(folder, replaced, **given):
    "Compute a manifest's hashes again; parents follow the digests that were replaced."
    body = read(folder / MANIFEST) | given
    body.pop("check", None)
    old = body.get("digest")
    is_run = "run" in body.get("meta", {})
    body["attachments" if is_run else "files"] = _files(folder)
    body["parents"] = {k: replaced.get(v, v) for k, v in body["parents"].items()}
    body["digest"] = digest({k: body[k] for k in ("kind", "config", "parents", "files")})
    replaced[old] = body["digest"]
    write(folder / MANIFEST, body | {"check": digest(body)})


def _states_of(run, keep):
    "The chain of states, with the digests that kept checkpoints have now."
    path = run / "states.ndjson"
    states = rows_of(path) if path.exists() else []
    for r in states if "states" not in keep else ():
        manifest = run / "checkpoints" / f"step-{r['step']:08}" / MANIFEST
        if manifest.exists():
            r["digest"] = read(manifest)["digest"]
    if states:
        write_rows(path, states)
    return states


def reseal(run, keep=()):
    "Compute every hash of a run again, from the parts up; `keep` names fields of its manifest."
    replaced = {}
    for kind in ("checkpoints", "evaluations", "exports"):
        for p in sorted((run / kind).glob(f"*/{MANIFEST}")):
            _reseal_folder(p.parent, replaced)
    states = _states_of(run, keep)
    body, record = read(run / MANIFEST), read(run / "config.json")
    metrics = rows_of(run / "metrics.ndjson")
    exact = [[r["step"], r["split"], r["exact"]] for r in metrics if r["exact"]]
    parts = {
        p.parent.relative_to(run).as_posix(): read(p)["digest"]
        for p in sorted(run.glob(f"*/*/{MANIFEST}"))
        if not p.parent.name.startswith(".")
    }
    config = {"kind": record["kind"], "config": record["identity"], "exact": digest(exact)}
    if states:
        config["states"] = digest([[r["step"], r["digest"]] for r in states])
        last = f"checkpoints/step-{states[-1]['step']:08}"
        parts = {k: d for k, d in parts.items() if k == last or k[:12] != "checkpoints/"}
    figures = {f"{r['split']}.{k}": v for r in metrics for k, v in r["values"].items()}
    steps = max((r["step"] for r in metrics), default=0)
    given = {
        "config": config,
        "parents": read(run / "parents.json") | parts,
        "meta": body["meta"] | {"figures": figures, "steps": steps},
    }
    _reseal_folder(run, {}, **{k: v for k, v in given.items() if k not in keep})


def derive(run):
    "Compute what is computed from other files again: tables, summaries and their figures."
    from codex_nb.eval.evaluate import flat_record, summarize
    from codex_nb.eval.scoring import Record
    from codex_nb.tracking.metrics_log import metrics_csv

    metrics_csv(run / "metrics.ndjson", run / "metrics.csv")
    measured = [r for r in rows_of(run / "metrics.ndjson") if r["split"].startswith("validation")]
    for p in checkpoints(run):
        before = [r for r in measured if r["step"] <= int(p.name[len("step-") :])]
        shown = {f"{r['split']}.{k}": v for r in before for k, v in r["values"].items()}
        edit(p / MANIFEST, lambda m, shown=shown: m["meta"].update(metrics=shown))
    cfg, folder = read(run / "config.json")["config"], evaluation(run)
    rows = rows_of(folder / "records.ndjson")
    text, flat = io.StringIO(newline=""), [flat_record(r) for r in rows]
    table = csv.DictWriter(text, list(dict.fromkeys(k for r in flat for k in r)))
    table.writeheader()
    table.writerows(flat)
    (folder / "records.csv").write_bytes(text.getvalue().encode())
    records = [Record(**r) for r in rows]
    summary = summarize(records, ["-"], cfg["evaluate"]["resamples"], cfg["seed"])
    old = read(folder / "summary.json")
    kept = old.keys() - summary.keys() | {"compressors"}
    write(folder / "summary.json", summary | {k: old[k] for k in kept})
    figures = {k: v["value"] for k, v in summary["metrics"].items()}
    edit(folder / MANIFEST, lambda m: m.update(meta=figures))


FORGERIES = {}  # name -> forge and seal again


def forgery(f=None, *, keep=()):
    "Register a forgery under its name in words; the run is sealed again after it."
    if f is None:
        return partial(forgery, keep=keep)

    def forge(run):
        f(run)
        reseal(run, keep)

    FORGERIES[f.__name__.replace("_", " ")] = forge
    return f


def in_summary(change):
    return lambda run: edit(evaluation(run) / "summary.json", change)


def _register(name, change, keep=()):
    change.__name__ = name.replace(" ", "_")
    forgery(change, keep=keep)


_register(
    "interval",
    in_summary(lambda s: s["metrics"]["bits_per_byte"].update(low=0.1, high=0.2)),
)
_register("compressors", in_summary(lambda s: s.update(compressors={"gzip -9": 9.9, "xz -9": 9.9})))
_register("notes", in_summary(lambda s: s.update(notes=[])))
_register("slices", in_summary(lambda s: s.update(slices={"source": {"books": s["metrics"]}})))
_register("calibration", in_summary(lambda s: s["calibration"].update(error=0.001)))
_register("documents in split", in_summary(lambda s: s.update(documents_in_split=12)))
_register(
    "contamination",
    in_summary(lambda s: s.update(contamination={"ngram": 13, "contaminated": 0, "too_short": 0})),
)


@forgery
def figure_of_the_summary(run):
    edit(evaluation(run) / "summary.json", lambda s: s["metrics"]["loss"].update(value=0.1))
    edit(evaluation(run) / MANIFEST, lambda m: m["meta"].update(loss=0.1))


@forgery
def figure_of_the_evaluation_manifest(run):
    edit(evaluation(run) / MANIFEST, lambda m: m["meta"].update(bits_per_byte=0.123))


def _smooth(rows):
    for r in rows:
        r["values"] = {k: v / 9 for k, v in r["values"].items()}


@forgery
def values_of_the_log(run):
    edit_lines(run / "metrics.ndjson", _smooth)
    derive(run)


@forgery
def table_of_the_log(run):
    path = run / "metrics.csv"
    path.write_text(path.read_text().replace(",train,", ",train,0"))


@forgery(keep=("meta",))
def figures_of_the_manifest(run):
    edit(run / MANIFEST, lambda m: m["meta"]["figures"].update({"validation.loss": 0.1}))


@forgery(keep=("meta",))
def steps_of_the_manifest(run):
    edit(run / MANIFEST, lambda m: m["meta"].update(steps=8000))


def _invent_losses(run, exact):
    "With `exact(values)` in place of the exact values of a step, which would contradict them."

    def change(rows):
        for r in rows:
            if r["split"] == "train":
                r["exact"] = exact(r["exact"])
                r["values"]["loss"] = 1 / r["step"]

    edit_lines(run / "metrics.ndjson", change)
    derive(run)


@forgery
def exact_values_under_other_names(run):
    _invent_losses(run, lambda values: {f"old_{k}": v for k, v in values.items()})


@forgery
def only_batch_fingerprints(run):
    _invent_losses(run, lambda values: {"fed": values["fed"]})


def _invent_curve(rows):
    for r in rows:
        for name in ("loss", "bits_per_byte"):
            if name in r["values"]:
                r["values"][name] = value = r["values"][name] / 2
                r["exact"][name] = value.hex()


@forgery
def curve_with_its_exact_values(run):
    edit_lines(run / "metrics.ndjson", _invent_curve)
    derive(run)


def _after_the_end(rows):
    for step in range(9, 200):
        rows.append(rows[-2] | {"step": step, "split": "validation"})
    rows.append(rows[-1] | {"step": 200, "values": {"loss": 4.0, "bits_per_byte": 2.0}})
    exact = {k: float(v).hex() for k, v in rows[-1]["values"].items()}
    rows[-1]["exact"] = exact


@forgery
def curve_after_the_last_step(run):
    edit_lines(run / "metrics.ndjson", _after_the_end)
    derive(run)


def _figure_among_saves(rows):
    rows[-1]["values"]["bits_per_byte"] = 0.123


@forgery
def figure_among_the_times_of_saves(run):
    edit_lines(run / "metrics.ndjson", _figure_among_saves)
    derive(run)


def _drop_last_step(rows):
    rows[:] = [r for r in rows if (r["step"], r["split"]) != (8, "train")]


@forgery
def last_step_left_out(run):
    edit_lines(run / "metrics.ndjson", _drop_last_step)
    derive(run)


def change_weights(checkpoint, factor):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights = {k: v * factor for k, v in weights.items()}
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


@forgery
def weights_without_manifest(run):
    (checkpoints(run)[0] / MANIFEST).unlink()
    change_weights(checkpoints(run)[0], 1.5)


@forgery
def weights(run):
    change_weights(checkpoints(run)[-1], 1.5)


@forgery
def another_checkpoint_more(run):
    more = copy(checkpoints(run)[-1], run / "checkpoints" / "step-00000009")
    edit(more / "state.json", lambda s: s["progress"].update(step=9))


def _other_state(rows):
    rows[0]["digest"] = "ab" * 32


@forgery(keep=("states",))
def state_of_a_kept_checkpoint(run):
    edit_lines(run / "states.ndjson", _other_state)


@forgery(keep=("states",))
def state_of_a_checkpoint_that_was_not_kept(run):
    shutil.rmtree(checkpoints(run)[0])
    edit_lines(run / "states.ndjson", _other_state)


@forgery
def last_state_left_out(run):
    edit_lines(run / "states.ndjson", lambda rows: rows.pop())


@forgery
def last_checkpoint_under_another_name(run):
    last = checkpoints(run)[-1].rename(run / "checkpoints" / "step-+0000008")
    edit(last / "state.json", lambda s: s["progress"].update(step="+0000008"))
    change_weights(last, 1.5)


@forgery
def last_checkpoint_left_out(run):
    shutil.rmtree(checkpoints(run)[-1])
    shutil.rmtree(evaluation(run))


def _after_training(rows):
    rows.append(rows[-1] | {"step": 9, "split": "test"})


@forgery
def record_after_training(run):
    edit_lines(run / "metrics.ndjson", _after_training)
    derive(run)


def _between_steps(rows):
    rows.insert(5, rows[4] | {"step": 5, "split": "test"})


@forgery
def record_between_steps(run):
    edit_lines(run / "metrics.ndjson", _between_steps)
    derive(run)


@forgery
def sample_after_training(run):
    edit_lines(run / "samples.ndjson", lambda rows: rows.append(rows[0] | {"step": 9}))


@forgery
def answers_to_an_invented_task(run):
    task = copy(evaluation(run), run / "evaluations" / "task-arc")
    edit(task / MANIFEST, lambda m: m["parents"].update(questions="ab" * 32))


@forgery
def hidden_evaluation(run):
    "Which must not be taken for a part of the run."
    hidden = copy(evaluation(run), run / "evaluations" / ".task-arc")
    edit(hidden / "summary.json", lambda s: s["metrics"]["bits_per_byte"].update(value=0.123))
    (run / "results.md").write_text("0.123 bits per byte\n")


@forgery
def another_log_beside(run):
    (run / "metrics.final.md").write_text("0.123 bits per byte\n")


@forgery
def figures_of_a_checkpoint(run):
    edit(checkpoints(run)[0] / MANIFEST, lambda m: m["meta"].update(metrics={"validation.loss": 1}))


@forgery
def another_machine_with_a_figure(run):
    edit(run / "environment.json", lambda e: e.update(cpu="another"))
    edit(evaluation(run) / "summary.json", lambda s: s["metrics"]["loss"].update(value=0.1))


def _easier(rows):
    for r in rows:
        r["nll"] /= 9


@forgery
def another_machine_with_everything(run):
    edit(run / "environment.json", lambda e: e.update(cpu="another"))
    edit_lines(evaluation(run) / "records.ndjson", _easier)
    change_weights(checkpoints(run)[-1], 1.5)
    derive(run)


@forgery
def another_machine_without_hard_documents(run):
    edit(run / "environment.json", lambda e: e.update(cpu="another"))
    path = evaluation(run) / "records.ndjson"
    edit_lines(path, lambda rows: rows.sort(key=lambda r: r["nll"] / r["bytes"]))
    edit_lines(path, lambda rows: rows.__delitem__(slice(6, None)))
    derive(run)


@forgery
def another_machine_with_a_curve(run):
    edit(run / "environment.json", lambda e: e.update(cpu="another"))
    edit_lines(run / "metrics.ndjson", _invent_curve)
    derive(run)


@forgery
def another_seed_of_the_weights(run):
    path = run / "metrics.ndjson"
    edit_lines(path, lambda rows: rows[0]["exact"].update({"model.norm.weight": "ab" * 8}))


def _rename_corpus(run, digest):
    edit(run / "parents.json", lambda p: p.update(corpus=digest))
    for p in run.glob(f"*/*/{MANIFEST}"):
        edit(p, lambda m: m["parents"].update(corpus=digest) if "corpus" in m["parents"] else None)


@forgery
def corpus(run):
    _rename_corpus(run, "ab" * 32)


@forgery
def another_machine_with_a_corpus(run):
    edit(run / "environment.json", lambda e: e.update(cpu="another"))
    _rename_corpus(run, "ab" * 32)


@forgery
def corpus_of_the_run_alone(run):
    edit(run / "parents.json", lambda p: p.update(corpus="ab" * 32))


@forgery(keep=("parents",))
def corpus_of_the_manifest_alone(run):
    edit(run / MANIFEST, lambda m: m["parents"].update(corpus="ab" * 32))


@forgery
def samples(run):
    edit_lines(run / "samples.ndjson", lambda rows: rows[-1].update(text="A fine tale."))


@forgery
def record_twice(run):
    edit_lines(evaluation(run) / "records.ndjson", lambda rows: rows.append(rows[0]))
    derive(run)


@forgery
def records(run):
    edit_lines(evaluation(run) / "records.ndjson", lambda rows: rows[0].update(correct=90))


@forgery
def records_with_all_that_follows(run):
    edit_lines(evaluation(run) / "records.ndjson", _easier)
    derive(run)


@forgery
def table_of_the_records(run):
    path = evaluation(run) / "records.csv"
    path.write_bytes(path.read_bytes().replace(b"tale-070", b"tale-071"))


@forgery
def evaluation_of_another_checkpoint(run):
    first = read(checkpoints(run)[0] / MANIFEST)["digest"]
    edit(evaluation(run) / MANIFEST, lambda m: m["parents"].update(checkpoint=first))


@forgery
def evaluation_of_a_foreign_checkpoint(run):
    edit(evaluation(run) / MANIFEST, lambda m: m["parents"].update(checkpoint="cd" * 32))


@forgery
def stride(run):
    edit(evaluation(run) / MANIFEST, lambda m: m["config"].update(stride=7))


@forgery
def split(run):
    (run / "evaluations" / "validation").rename(run / "evaluations" / "test")


@forgery
def phantom_evaluation(run):
    phantom = copy(evaluation(run), run / "evaluations" / "a")
    (phantom / MANIFEST).unlink()
    edit(phantom / "summary.json", lambda s: s["metrics"]["bits_per_byte"].update(value=0.123))


@forgery
def identity_unlike_the_settings(run):
    def change(record):
        record["identity"]["optim"]["lr"] = 0.5
        record["digest"] = digest(record["identity"])

    edit(run / "config.json", change)


@forgery
def digest_of_the_settings(run):
    edit(run / "config.json", lambda record: record.update(digest="ab" * 32))


@forgery
def settings_with_their_identity(run):
    def change(record):
        for part in ("config", "identity"):
            record[part]["optim"]["lr"] = 0.5
        record["digest"] = digest(record["identity"])

    edit(run / "config.json", change)


@forgery
def export(run):
    last = read(checkpoints(run)[-1] / MANIFEST)["digest"]
    merged = copy(checkpoints(run)[-1], run / "exports" / "merged")
    edit(merged / MANIFEST, lambda m: m.update(kind="model", parents={"checkpoint": last}))
    change_weights(merged, 1.5)


@forgery
def export_of_another_checkpoint(run):
    export(run)
    edit(run / "exports" / "merged" / MANIFEST, lambda m: m.update(parents={}))


@forgery
def export_without_manifest(run):
    export(run)
    (run / "exports" / "merged" / MANIFEST).unlink()


@forgery
def part_of_no_kind(run):
    copy(checkpoints(run)[-1], run / "figures" / "best")


def _link(folder):
    "Move a folder out of the run, and leave a link to it."
    elsewhere = folder.parent.with_name(f"elsewhere-{folder.name}")
    shutil.rmtree(elsewhere, ignore_errors=True)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


@forgery
def linked_folder_of_evaluations(run):
    in_summary(lambda s: s.update(compressors={"gzip -9": 9.9, "xz -9": 9.9}))(run)
    reseal(run)
    _link(run / "evaluations")


@forgery
def linked_checkpoints(run):
    _link(run / "checkpoints")


@forgery
def figure_in_a_run_of_an_unknown_kind(run):
    edit(run / "config.json", lambda record: record.update(kind="training"))
    edit(run / MANIFEST, lambda m: m["meta"].update(run="training"))
    in_summary(lambda s: s["metrics"]["bits_per_byte"].update(value=0.123))(run)


@forgery
def checkpoint_in_a_run_that_trains_nothing(run):
    edit(run / "config.json", lambda record: record.update(kind="sweep"))
    edit(run / MANIFEST, lambda m: m["meta"].update(run="sweep"))


@forgery
def base_that_is_its_own(run):
    export_of_another_checkpoint(run)
    reseal(run)
    own = read(run / "exports" / "merged" / MANIFEST)["digest"]
    edit(run / "parents.json", lambda p: p.update(base=own))


@forgery
def base_that_no_checkpoint_has(run):
    edit(run / "parents.json", lambda p: p.update(base="ab" * 32))


@forgery
def remark_in_the_log(run):
    edit_lines(run / "metrics.ndjson", lambda rows: rows[3].update(note="0.123 bits per byte"))


@forgery
def some_batch_fingerprints(run):
    edit_lines(run / "metrics.ndjson", lambda rows: rows[3]["exact"].pop("fed"))


@forgery
def split_with_a_look_alike_name(run):
    shown = {"split": "v\u0430lidation", "step": 8, "exact": {}}
    shown |= {"values": {"bits_per_byte": 0.123}}
    edit_lines(run / "metrics.ndjson", lambda rows: rows.append(rows[-2] | shown))
    derive(run)


@forgery
def file_more(run):
    (run / "results.md").write_text("0.123 bits per byte\n")


@forgery(keep=("meta",))
def failed_run(run):
    edit(run / MANIFEST, lambda m: m["meta"].update(status="failed"))


@forgery
def everything(run):
    _rename_corpus(run, "ab" * 32)
    edit(run / "environment.json", lambda e: e.update(cpu="another"))
    edit_lines(run / "metrics.ndjson", _invent_curve)
    edit_lines(run / "samples.ndjson", lambda rows: rows[-1].update(text="A fine tale."))
    edit_lines(evaluation(run) / "records.ndjson", _easier)
    for p in checkpoints(run):
        change_weights(p, 1.5)
    derive(run)
    edit(evaluation(run) / "summary.json", lambda s: s["compressors"].update({"xz -9": 9.9}))


# What no level proves of a run: each is forged here, and nothing must claim that it was checked.
UNPROVABLE = {}


def unprovable(f):
    def forge(run):
        f(run)
        reseal(run, keep=("meta",))

    UNPROVABLE[f.__name__.replace("_", " ")] = forge
    return f


@unprovable
def code_version(run):
    edit(run / "environment.json", lambda e: e["code"].update(version="9.9", git="ab" * 20))


@unprovable
def code_files(run):
    edit(run / "environment.json", lambda e: e["code"]["files"].update({"train/engine.py": "ab"}))


@unprovable
def packages(run):
    edit(run / "environment.json", lambda e: e["packages"].update(numpy="99.0"))


@unprovable
def producer(run):
    edit(run / MANIFEST, lambda m: m["producer"].update(version="9.9"))


@unprovable
def times(run):
    edit_lines(run / "metrics.ndjson", lambda rows: [r.update(time=r["time"] / 2) for r in rows])
    derive(run)


def _faster(rows):
    for r in rows:
        if "tokens_per_second" in r["values"]:
            r["values"]["tokens_per_second"] *= 9


@unprovable
def speeds(run):
    edit_lines(run / "metrics.ndjson", _faster)
    derive(run)
    figures = {
        f"{r['split']}.{k}": v
        for r in rows_of(run / "metrics.ndjson")
        for k, v in r["values"].items()
    }
    edit(run / MANIFEST, lambda m: m["meta"].update(figures=figures))


@unprovable
def load(run):
    edit_lines(run / "system.ndjson", lambda rows: rows[0]["values"].update(cpu_percent=1.0))


@unprovable
def plots(run):
    (run / "figures").mkdir()
    (run / "figures" / "metrics.png").write_bytes(b"a steep curve")


@unprovable
def what_the_notebook_printed(run):
    output = {"output_type": "stream", "name": "stdout", "text": "0.123 bits per byte"}
    cell = {"cell_type": "code", "source": "", "outputs": [output], "metadata": {}}
    write(run / "train.ipynb", {"cells": [cell]})


@unprovable
def settings_that_cannot_change_the_result(run):
    edit(run / "config.json", lambda record: record["config"]["tracking"].update(log_every=99))
    edit(run / "config.json", lambda record: record["sources"].update(lr="given"))
