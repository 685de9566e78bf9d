"""The model card cites what holds, and what data say never becomes syntax."""

import json
import re
import shutil

import pytest
import yaml
from described import HOSTILE, find
from forger import MANIFEST, copy, edit, reseal
from helpers import codex
from markdown_it import MarkdownIt


@pytest.fixture(params=["plain", "hostile"])
def home(request, described_runs, monkeypatch):
    folder = described_runs / request.param
    monkeypatch.setenv("CODEX_NB_HOME", str(folder))
    return folder


@pytest.fixture
def plain(described_runs, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(described_runs / "plain"))
    return described_runs / "plain"


def make_card(folder, *more, level="L0"):
    from codex_nb.deploy.card import model_card

    return model_card(folder, level, [(run, "L0") for run in more])


def front_matter(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def tokens(card):
    "The card as a reader of GitHub's Markdown sees it, raw HTML allowed."
    body = card.split("\n---\n", 1)[1]
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)


def tables(card):
    "Tables as rows of cells, of text."
    out = []
    for t in tokens(card):
        if t.type == "table_open":
            out.append([])
        elif t.type == "tr_open":
            out[-1].append([])
        elif t.type == "inline" and out and t.level >= 4:
            out[-1][-1].append("".join(c.content for c in t.children))
    return out


def digest_of(folder):
    return json.loads((folder / MANIFEST).read_text())["digest"]


def test_figures_are_those_of_the_summary_with_all_that_is_known_of_them(home):
    run = find(home, "trained")
    card = make_card(run)
    evaluation = run / "evaluations" / "validation"
    summary = json.loads((evaluation / "summary.json").read_text())
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    (result,) = front_matter(card)["model-index"][0]["results"]
    found = {m["type"]: m for m in result["metrics"]}
    assert found.keys() == summary["metrics"].keys()
    for name, m in summary["metrics"].items():
        assert found[name]["value"] == m["value"]
        assert found[name]["args"] == {
            "interval": [m["low"], m["high"]],
            "documents": summary["documents"],
            "evaluation": digest_of(evaluation),
            "checkpoint": digest_of(checkpoint),
            "proven": "L0",
        }
    for text in (digest_of(run), digest_of(evaluation), digest_of(checkpoint)):
        assert text in card
    (table,) = [t for t in tables(card) if t[0][0] == "metric"]
    shown = {row[0]: row[1:] for row in table}
    m = summary["metrics"]["bits_per_byte"]
    n = str(summary["documents"])
    interval = f"{m['low']:.4g} to {m['high']:.4g}"
    assert shown["bits per byte"] == [f"{m['value']:.4g}", interval, n, "L0"]
    assert shown["bits per byte of gzip -9"][-1] == "not proven"
    assert all(len(row) == 5 for row in table)


def test_what_only_a_person_knows_is_blank(plain):
    card = make_card(find(plain, "trained"))
    assert not front_matter(card).keys() & {"license", "language", "datasets"}
    assert "\n# license:" in card.split("\n---\n")[0]
    for title in ("Intended use", "Limitations", "Licence", "Contact"):
        assert f"\n## {title}\n\n**[More Information Needed]**" in card


def test_the_hub_reads_the_metadata(home):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub reads cards")
    for end in ("trained", "tuned"):
        card = make_card(find(home, end))
        data = hub.ModelCard(card).data
        values = front_matter(card)
        assert data.library_name == values["library_name"]
        assert data.base_model == values.get("base_model")
        assert data.tags[0] == "codex_nb"
        assert {r.metric_type for r in data.eval_results} >= {"loss", "bits_per_byte"}
        again = yaml.safe_load(data.to_yaml())
        assert again["model-index"] == values["model-index"]


def test_a_fine_tuned_run_names_its_base_and_its_adapter(plain):
    run = find(plain, "tuned")
    values, card = front_matter(make_card(run)), make_card(run)
    assert values["library_name"] == "peft" and "lora" in values["tags"]
    assert (values["base_model"], values["base_model_relation"]) == ("plain-trained", "adapter")
    base = sorted((find(plain, "trained") / "checkpoints").iterdir())[-1]
    assert digest_of(base) in card
    rows = dict(row for row in tables(card)[0] if len(row) == 2)
    assert rows["adapter"].startswith("lora, rank 16")
    assert rows["architecture"] == "LlamaForCausalLM"
    adapter, model = (rows[f"parameters{x}"].replace(",", "") for x in (" of the adapter", ""))
    assert 0 < int(adapter) < int(model)


def test_parameters_are_those_that_transformers_counts(plain):
    from transformers import AutoModelForCausalLM

    from codex_nb.deploy.card import count_parameters

    checkpoint = sorted((find(plain, "trained") / "checkpoints").iterdir())[-1]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert count_parameters(checkpoint) == sum(p.numel() for p in model.parameters())


def test_inputs_that_are_not_here_are_said_to_be_absent(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    run = copy(find(plain, "tuned"), tmp_path / "runs" / "alone")
    card = make_card(run)
    assert "that of the base, which is not here" in card
    assert "not known: the corpus is not in this workspace" in card


def test_data_are_summed_up_with_their_licences(plain):
    card = make_card(find(plain, "trained"))
    (rows,) = [dict(t[1:]) for t in tables(card) if ["split by", "hash"] in t]
    assert re.fullmatch(r"1\d\d documents, [\d,]+ bytes", rows["train"])
    licences = dict(re.findall(r"plain (\d) (\d+)", rows["licences, as the documents say"]))
    assert licences.keys() == {"0", "1", "2"}
    assert sum(map(int, licences.values())) == int(rows["train"].split()[0])


def test_later_evaluations_are_cited_when_they_are_of_this_model(home):
    runs = [find(home, end) for end in ("trained", "judged", "asked")]
    results = front_matter(make_card(*runs))["model-index"][0]["results"]
    cited = [r["metrics"][0]["args"]["evaluation"] for r in results]
    assert cited == [digest_of(f) for run in runs for f in (run / "evaluations").iterdir()]
    with pytest.raises(Exception, match="which is not in"):
        make_card(find(home, "tuned"), runs[1])


def test_what_data_say_is_text_and_breaks_nothing(described_runs, monkeypatch):
    def shape(name):
        home = described_runs / name
        monkeypatch.setenv("CODEX_NB_HOME", str(home))
        card = make_card(*(find(home, end) for end in ("trained", "judged", "asked")))
        tags = [t.type for t in tokens(card) if t.type != "inline"]
        assert not any(t.startswith("html") for t in tags)
        inline = [c.type for t in tokens(card) for c in t.children or ()]
        assert {*inline} <= {"text", "text_special", "code_inline", "strong_open", "strong_close"}
        return card, tags, [[len(row) for row in t] for t in tables(card)]

    hostile, plain = shape("hostile"), shape("plain")
    assert hostile[1:] == plain[1:]
    slices = [t for t in tables(hostile[0]) if t[0][0] == "slice"]
    shown = " ".join(HOSTILE.replace("\u202e", " ").split())
    assert slices[0][1][0] == f"topic: {shown}0"
    assert "<script" not in hostile[0] and "<img" not in hostile[0]


def test_a_note_from_a_forged_summary_is_text(plain, tmp_path):
    "A summary whose notes were invented contradicts its records, so the card is refused."
    run = copy(find(plain, "trained"), tmp_path / "forged")
    path = run / "evaluations" / "validation" / "summary.json"
    edit(path, lambda s: s["notes"].append(HOSTILE))
    reseal(run)
    with pytest.raises(Exception, match="does not hold at L0") as e:
        make_card(run)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("interrupted", "the run is interrupted, so nothing in it is sealed"),
        ("failed", "the run is failed"),
        ("judged", "is a run of kind evaluate, which has no model of its own"),
    ],
)
def test_runs_without_a_result_are_refused(end, why, home):
    from codex_nb.run.run_record import RunError

    with pytest.raises(RunError) as e:
        make_card(find(home, end))
    assert why in str(e.value) and str(e.value).isprintable()


def test_a_run_that_was_changed_is_refused(plain, tmp_path):
    run = copy(find(plain, "trained"), tmp_path / "run")
    path = run / "checkpoints" / "step-00000006" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Exception, match="does not hold at L0: .*model.safetensors"):
        make_card(run)
    judged = copy(find(plain, "judged"), tmp_path / "judged")
    (judged / "samples.ndjson").write_text("")
    with pytest.raises(Exception, match="does not hold at L0"):
        make_card(find(plain, "trained"), judged)


def test_whatever_an_environment_holds_gives_a_card_or_one_error(plain, tmp_path):
    "What no level proves may hold anything, and all digests agree."
    from codex_nb.core.artifacts import ArtifactError

    run = copy(find(plain, "trained"), tmp_path / "run")
    refused = 0
    for cpu, gpus in ((HOSTILE, []), ({}, [{"name": HOSTILE}]), (1, {}), (None, [1]), ("", 5)):
        edit(run / "environment.json", lambda e: e.update(cpu=cpu, gpus=gpus))
        reseal(run)
        try:
            card = make_card(run)
            assert "<script" not in card and "\n- a:" not in card
        except ArtifactError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused == 2


def test_another_level_is_shown_and_explained(plain):
    card = make_card(find(plain, "trained"), level="L3 by an auditor")
    assert "- L3 by an auditor: the run was executed again" in card
    (table,) = [t for t in tables(card) if t[0][0] == "metric"]
    assert {row[-1] for row in table[1:]} == {"L3 by an auditor"}


def test_the_command_writes_a_file_and_keeps_what_a_person_wrote(plain, tmp_path):
    run = str(find(plain, "trained"))
    done = codex("card", run, home=plain, cwd=tmp_path)
    file = tmp_path / "plain trained.md"
    assert (done.returncode, done.stdout.strip()) == (0, str(file)), done.stderr
    printed = codex("card", run, "--out", "-", home=plain, cwd=tmp_path)
    assert printed.stdout == file.read_text()
    file.write_text("by a person")
    again = codex("card", run, home=plain, cwd=tmp_path)
    assert again.returncode == 1 and "--force" in again.stderr
    assert file.read_text() == "by a person"
    more = str(find(plain, "asked"))
    forced = codex("card", run, "--force", "--evaluation", more, home=plain, cwd=tmp_path)
    assert forced.returncode == 0 and "task-plain questions" in file.read_text()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["RUN", "--out", "RUN/README.md"], "is inside the run"),
        (["RUN", "--out", "no/where.md"], "there is no folder"),
        (["RUN", "--out", "."], "is a folder"),
        (["nothing"], "no such run"),
        (["RUN", "--evaluation", "nothing"], "no such run"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words, why, plain, tmp_path):
    run = copy(find(plain, "trained"), tmp_path / "run")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    words = [w.replace("RUN", str(run)) for w in words]
    done = codex("card", *words, home=plain, cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert why in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    shutil.rmtree(run)
