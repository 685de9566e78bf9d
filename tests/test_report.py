"""A report shows what a run holds and nothing else: no tag from data, no page of a damaged run."""

import json
import random
import re
import shutil
from html.parser import HTMLParser

import pytest
from described import HOSTILE, find
from forger import MANIFEST, copy, edit, edit_lines, reseal
from helpers import codex, counts

ENDS = ("trained", "tuned", "judged", "asked", "failed", "interrupted")


@pytest.fixture
def plain(described_runs, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(described_runs / "plain"))
    return described_runs / "plain"


class Page(HTMLParser):
    "Start tags with their attributes, and the text outside of the style."

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._style = [], "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag):
        self._style = self._style and tag != "style"

    def handle_data(self, data):
        if not self._style:
            self.text += data

    def names(self):
        "Tags with the names of their attributes, but for the class of long words."
        return [(tag, [a for a in attrs if a != "class"]) for tag, attrs in self.tags]


def report(folder, level=None):
    from codex_nb.deploy.report import report_page

    return report_page(folder, level)


def digest_of(folder):
    return json.loads((folder / MANIFEST).read_text())["digest"]


@pytest.mark.parametrize("end", ENDS)
def test_a_page_loads_nothing_and_runs_nothing(end, plain):
    text = report(find(plain, end))
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "img"})
    loading = {"src", "href", "srcset", "data", "action", "style", "xlink:href"}
    for tag, attrs in page.tags:
        assert not loading & attrs.keys() and not any(a.startswith("on") for a in attrs), tag
    (policy,) = [a["content"] for _, a in page.tags if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    assert "url(" not in text and "@import" not in text and "://" not in text
    assert text.count("<style>") == 1


def test_a_finished_run_is_shown_with_its_digests_and_what_is_not_proven(plain):
    from codex_nb.experiments.replay import UNPROVEN

    run = find(plain, "trained")
    text = Page(report(run)).text
    for folder in (run, run / "evaluations" / "validation", *(run / "checkpoints").iterdir()):
        assert digest_of(folder) in text
    for digest in json.loads((run / "parents.json").read_text()).values():
        assert digest in text
    assert "Proven: L0" in text and f"{UNPROVEN}." in text
    assert "codex-nb replay 'plain trained'" in text
    summary = json.loads((run / "evaluations" / "validation" / "summary.json").read_text())
    m = summary["metrics"]["bits_per_byte"]
    assert f"{m['value']:.4g}{m['low']:.4g} to {m['high']:.4g}{summary['documents']}L0" in text
    assert "width32given" in text and "batch_size" not in text


def test_hardest_documents_are_those_of_the_records(plain):
    run = find(plain, "trained")
    lines = (run / "evaluations" / "validation" / "records.csv").read_text().splitlines()
    assert len(lines) > 5
    text = Page(report(run)).text
    table = text.partition("hardest documents")[2].partition("Curves")[0]
    values = [float(x) for x in re.findall(r"\d\.\d+", table)]
    assert values == sorted(values, reverse=True) and len(values) == 5


def test_curves_are_drawn_from_the_log(plain, tmp_path):
    run = copy(find(plain, "interrupted"), tmp_path / "run")

    def heights(text):
        svg = text.partition("<svg")[2].partition("</svg>")[0]
        return [float(y) for y in re.findall(r'class="dot c0" cx="[\d.]+" cy="([\d.]+)"', svg)]

    before = heights(report(run))
    lines = (run / "metrics.ndjson").read_text().splitlines()[:-1]
    losses = [r["values"]["loss"] for r in map(json.loads, lines) if r["split"] == "train"]
    assert len(before) == len(losses) == 6
    # the higher the loss, the smaller is y
    assert sorted(before, reverse=True) == [y for _, y in sorted(zip(losses, before))]
    (run / "metrics.ndjson").write_text("\n".join(lines) + "\n")

    def level(rows):
        for r in rows:
            if r["split"] == "train":
                r["values"]["loss"] = 3.0

    edit_lines(run / "metrics.ndjson", level)
    assert len(set(heights(report(run)))) == 1


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("trained", "This run is finished, and holds at L0."),
        ("failed", "This run is failed: RuntimeError: plain"),
        ("interrupted", "This run was interrupted and never sealed"),
    ],
)
def test_the_state_is_on_top(end, says, plain):
    assert Page(report(find(plain, end))).text.partition("What is proven")[0].count(says) == 1


def test_a_running_run_says_so(plain, tmp_path):
    from codex_nb.core.store import Lock

    run = copy(find(plain, "interrupted"), tmp_path / "run")
    lock = Lock(run / ".lock").acquire()
    try:
        assert "This run is still running" in report(run)
    finally:
        lock.release()


def test_a_run_that_does_not_hold_says_so_and_proves_nothing(plain, tmp_path):
    run = copy(find(plain, "trained"), tmp_path / "run")
    edit(run / MANIFEST, lambda m: m["meta"].update(steps=7))
    reseal(run, keep=("meta",))
    text = Page(report(run, level="L3")).text
    assert "does not hold at L0" in text and "steps is 7" in text
    assert "L3 by" not in text and "not proven" in text.partition("Figures")[2]
    table = text.partition("Figures")[2].partition("hardest")[0]
    assert "L3" not in table


def plant(run, text):
    "Put a text into every field of a run that is not sealed."
    edit_lines(run / "samples.ndjson", lambda rows: [r.update(text=text) for r in rows])
    folder = run / "evaluations" / "validation"

    def records(rows):
        for r in rows:
            r |= {"id": text, "group": text, "meta": {"topic": text}}

    edit_lines(folder / "records.ndjson", records)

    def summary(s):
        s["notes"] = [text]
        s["not_searched"], s["split"] = text, text
        s.pop("contamination", None)
        s["slices"] = {text: {text: next(iter(s["slices"]["topic"].values()))}}
        s["metrics"] = {f"{text}{name}": m for name, m in s["metrics"].items()}
        s["compressors"] = {text: 1.0}

    edit(folder / "summary.json", summary)

    def settings(c):
        c["preset"], c["kind"], c["digest"] = text, text, text
        c["config"]["model"]["arch"] = text
        c["sources"] |= {"arch": text, text: text, "preset": text}

    edit(run / "config.json", settings)
    edit(run / "parents.json", lambda p: p.update({text.replace("/", ""): text}))

    def environment(e):
        e |= dict.fromkeys(("cpu", "system", "python", "lock", "determinism", "threads"), text)
        e["code"], e["torch"] = dict.fromkeys(("version", "git", "code"), text), {"version": text}
        e["gpus"], e["packages"] = [{"name": text}], {text: text}

    edit(run / "environment.json", environment)


def test_no_tag_comes_from_data(plain, tmp_path):
    pages = []
    for text in (HOSTILE, "harmless"):
        name = text.replace("/", "")
        run = copy(find(plain, "interrupted"), tmp_path / name)
        lines = (run / "metrics.ndjson").read_text().splitlines()[:-1]
        (run / "metrics.ndjson").write_text("\n".join(lines) + "\n")
        plant(run, text)
        pages.append(Page(report(run)))
    hostile, harmless = pages
    assert hostile.names() == harmless.names()
    shown = " ".join(HOSTILE.replace("\u202e", " ").split())
    assert hostile.text.count(shown) > 20  # it is there, as text
    assert harmless.text.count("harmless") > 20


def test_runs_that_were_trained_on_hostile_text_have_the_same_tags(described_runs, monkeypatch):
    for end in ENDS:
        names = []
        for home in ("hostile", "plain"):
            monkeypatch.setenv("CODEX_NB_HOME", str(described_runs / home))
            names.append(Page(report(find(described_runs / home, end))).names())
        # texts of another length give other curves, so drawings are left out
        hostile, plain = [[x for x in n if x[0] not in ("circle", "path", "text")] for n in names]
        assert hostile == plain, end


DAMAGES = {
    "no record": lambda run: (run / "config.json").unlink(),
    "half a record": lambda run: cut(run / "config.json"),
    "half a manifest": lambda run: cut(run / MANIFEST),
    "a manifest that was changed": lambda run: edit(run / MANIFEST, lambda m: m.update(kind="x")),
    "half a log": lambda run: cut(run / "metrics.ndjson"),
    "half a summary": lambda run: cut(run / "evaluations" / "validation" / "summary.json"),
    "no summary": lambda run: (run / "evaluations" / "validation" / "summary.json").unlink(),
    "half an environment": lambda run: cut(run / "environment.json"),
    "a list of parents": lambda run: (run / "parents.json").write_text("[]"),
    "a log of lists": lambda run: (run / "metrics.ndjson").write_text("[]\n"),
    "half a manifest of a checkpoint": lambda run: cut(next(run.glob(f"checkpoints/*/{MANIFEST}"))),
}


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_run_gives_one_error_and_no_page(what, plain, tmp_path):
    from codex_nb.core.artifacts import ArtifactError

    run = copy(find(plain, "trained"), tmp_path / "run")
    DAMAGES[what](run)
    with pytest.raises(ArtifactError) as e:
        report(run)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


VALUES = [None, True, -1, 10**400, 1e308, "", "<b>", [], [[]], {}, {"a": {"b": []}}]


def test_whatever_a_file_holds_gives_a_page_or_one_error(plain, tmp_path):
    from codex_nb.core.artifacts import ArtifactError

    rng, source = random.Random(0), find(plain, "interrupted")
    files = [p.relative_to(source) for p in sorted(source.rglob("*")) if p.suffix == ".json"]
    files += [p.relative_to(source) for p in sorted(source.rglob("*.ndjson"))]
    run = copy(source, tmp_path / "run")
    lines = (run / "metrics.ndjson").read_text().splitlines()[:-1]
    (run / "metrics.ndjson").write_text("\n".join(lines) + "\n")
    pages = 0
    for _ in range(counts(80, 4000)):
        path = run / rng.choice(files)
        before = path.read_bytes()
        change = edit_lines if path.suffix == ".ndjson" else edit
        change(path, lambda value: mutate(value, rng))
        try:
            report(run)
            pages += 1
        except ArtifactError as e:
            assert "\n" not in str(e)
        path.write_bytes(before)
    assert pages


def mutate(value, rng):
    "Replace a value somewhere inside, or remove it."
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        inner = value[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            value = inner
        elif rng.random() < 0.3:
            del value[key]
            return
        else:
            value[key] = rng.choice(VALUES)
            return


def test_the_command_writes_a_page_and_replaces_an_older_one(plain, tmp_path):
    run = str(find(plain, "trained"))
    page = tmp_path / "plain trained.html"
    page.write_text("older")
    done = codex("report", run, home=plain, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, str(page)), done.stderr
    assert page.read_text().startswith("<!doctype html>")
    printed = codex("report", run, "--out", "-", home=plain, cwd=tmp_path)
    assert printed.stdout == page.read_text()


def test_bad_input_is_one_line_and_writes_nothing(plain, tmp_path):
    run = copy(find(plain, "trained"), tmp_path / "run")
    (run / "environment.json").write_text("{")
    inside = copy(find(plain, "trained"), tmp_path / "inside")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for words, cwd, why in (
        ([run], tmp_path, "cannot be read"),
        (["nothing"], tmp_path, "no such run"),
        (["."], inside, "is inside the run"),
        ([inside, "--out", "no/where.html"], tmp_path, "there is no folder"),
    ):
        done = codex("report", *words, home=plain, cwd=cwd)
        assert done.returncode == 1 and not done.stdout
        assert why in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    shutil.rmtree(run)
