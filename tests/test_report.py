"""A report shows what a run holds and nothing else: no tag from data, no page of a damaged run."""

import json
import random
import re
import shutil
from html.parser import HTMLParser

import pytest
from described import HOSTILE, find
from forger import MANIFEST, copy, edit, edit_lines, reseal
from helpers import NBS, codex, counts

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


def test_the_result_with_its_interval_comes_first(plain):
    run = find(plain, "trained")
    m = json.loads((run / "evaluations" / "validation" / "summary.json").read_text())["metrics"]
    m = m["bits_per_byte"]
    text = Page(report(run)).text.partition(f"Run {run.name}")[2].partition("Figures")[0]
    text = text.removeprefix(f"Run {run.name}")
    result = f"{m['value']:.4g} bits per byte, 95 % interval {m['low']:.4g} to {m['high']:.4g}, on "
    assert text.startswith(result)
    assert "bits per byte, 95 %" not in report(find(plain, "failed"))


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


CLAIMS = re.compile(
    r"(?i)\b(level|steady|stead|stable|constant|flat|stay|fall|fell|drop|ris(e|ing)|rose|grow|"
    r"increas|decreas|improv|converg|better|worse|smooth)"
)


def test_a_speed_that_collapsed_is_not_called_level(plain, tmp_path):
    run = copy(find(plain, "interrupted"), tmp_path / "run")
    lines = (run / "metrics.ndjson").read_text().splitlines()[:-1]
    (run / "metrics.ndjson").write_text("\n".join(lines) + "\n")

    def collapse(rows):
        for r in rows:
            if r["split"] == "train":
                r["values"]["tokens_per_second"] = 12_000 if r["step"] < 5 else 240

    edit_lines(run / "metrics.ndjson", collapse)
    text = report(run)
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    labels = [attrs["aria-label"] for tag, attrs in Page(text).tags if tag == "svg"]
    assert len(captions) == len(labels) == 5
    speed = "speed: 12,000 at step 1, 240 at step 6 (-98%); lowest 240 at step 5, highest 12,000"
    assert sum(speed in c for c in captions) == sum(speed in a for a in labels) == 1
    assert not [c for c in captions + labels if CLAIMS.search(c)]


def test_texts_about_the_figures_of_a_run_describe_the_axes():
    "They are written before the run, so they cannot know what it will show."
    notebooks = [*NBS.glob("*.ipynb"), NBS / "tutorials" / "1_your_text.ipynb"]
    found = 0
    for path in notebooks:
        for cell in json.loads(path.read_text())["cells"]:
            for text in re.findall(r"^#\| fig-(?:alt|cap): (.*)", "".join(cell["source"]), re.M):
                found += 1
                assert not CLAIMS.search(text), f"{path.name}: {text}"
    assert found > 20


def test_pauses_and_what_was_noted_are_on_the_page(plain, tmp_path):
    run = copy(find(plain, "interrupted"), tmp_path / "run")
    lines = (run / "metrics.ndjson").read_text().splitlines()[:-1]
    (run / "metrics.ndjson").write_text("\n".join(lines) + "\n")
    (run / "health.ndjson").unlink(missing_ok=True)
    assert "None: no interruption" in report(run)

    def pause(rows):
        late = 0
        for i, r in enumerate(rows):
            late = late or 7200 * (r["step"] > 3)
            r["time"] = 1e9 + i + late

    edit_lines(run / "metrics.ndjson", pause)
    note = {"step": 5, "rule": "speed", "text": "<b>slow"}
    (run / "health.ndjson").write_text(json.dumps(note) + "\n")
    text = Page(report(run)).text
    assert "between step 3 and step 4, nothing was recorded for 2:00:01" in text
    assert "step 5: <b>slow" in text
    assert "2 notes on how it went" in text.partition("Figures")[0]


def test_the_executed_code_is_folded_into_the_page(plain, tmp_path):
    run = copy(find(plain, "interrupted"), tmp_path / "run")
    assert "the run was started from a program" in report(run)
    cells = [{"cell_type": "code", "source": ["steps = 3\n", "'<script>'"]}]
    (run / "train.ipynb").write_text(json.dumps({"cells": cells}))
    folded = report(run).partition("<summary>1 cells of train.ipynb</summary>")[2]
    assert folded.startswith("<pre>steps = 3\n&#x27;&lt;script&gt;&#x27;</pre></details>")


def test_a_pdf_is_printed_by_the_browser_or_refused(plain, tmp_path, monkeypatch):
    from codex_nb.cli.main import main
    from codex_nb.deploy.report import page_as_pdf
    from codex_nb.run.run_record import RunError

    browser = tmp_path / "bin" / "chromium"
    browser.parent.mkdir()
    browser.write_text(
        "#!/bin/sh\n"
        "for a; do case $a in --print-to-pdf=*) out=${a#*=};;"
        " file://*) in=${a#file://};; esac; done\n"
        "(printf '%%PDF-1.4 '; /bin/cat $in) > $out\n"
    )
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", str(browser.parent))
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as end:
        main(["report", str(find(plain, "trained")), "--pdf", "--out", "run.pdf"])
    assert not end.value.code
    assert set(tmp_path.iterdir()) - before == {tmp_path / "run.pdf"}
    assert (tmp_path / "run.pdf").read_bytes().startswith(b"%PDF-1.4 <!doctype html>")
    browser.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(RunError, match="ended with 3 and wrote no PDF; write it with --html"):
        page_as_pdf("page", tmp_path)
    browser.unlink()
    with pytest.raises(RunError, match="no Chromium or Chrome here .* --html, open it in a"):
        page_as_pdf("page", tmp_path)


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
