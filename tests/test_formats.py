"""Conversations and texts as public data sets have them are read as they are meant."""

import gzip
import json

import msgspec
import pytest
from helpers import codex, counts

from codex_nb.core.config import ConfigError
from codex_nb.data.corpus import SPLITS, CorpusConfig, build_corpus, open_corpus
from codex_nb.data.documents import Document, ReadError
from codex_nb.data.readers import Rejects, read_file
from codex_nb.data.record_formats import RecordReader
from codex_nb.data.tokenizer import encode_document
from codex_nb.data.tokenizer_training import TokenizerConfig, train_tokenizer

ASK, SAY = "What is the river called?", "The long one"
USER, ASSISTANT = {"role": "user", "content": ASK}, {"role": "assistant", "content": SAY}
HUMAN, GPT = {"from": "human", "value": ASK}, {"from": "gpt", "value": SAY}
WRONG = ASSISTANT | {"content": "No."}
PARTS = {"role": "user", "content": [{"type": "text", "text": ASK}]}
TOLD = {"role": "system", "content": "Be brief."}
HH = "\n\nHuman: {}\n\nAssistant: {}"

# Records of which all have the same question and answer
TALKS = {
    "messages": {"messages": [USER, ASSISTANT]},
    "messages with parts": {
        "messages": [PARTS, {"role": "assistant", "content": [{"type": "text", "text": SAY}]}]
    },
    "messages with more about each": {
        "messages": [USER | {"toxic": False}, ASSISTANT | {"tool_calls": None, "refusal": None}]
    },
    "messages with weights": {"messages": [USER, ASSISTANT | {"weight": 1}]},
    "conversations of roles": {"conversations": [USER, ASSISTANT], "language": "English"},
    "conversation": {"conversation": [USER, ASSISTANT], "model": "x", "turn": 1},
    "sharegpt": {"conversations": [HUMAN, GPT], "id": "a_1"},
    "sharegpt, other names": {
        "conversations": [{"from": "user", "value": ASK}, {"from": "chatgpt", "value": SAY}]
    },
    "alpaca": {"instruction": ASK, "input": "", "output": SAY},
    "alpaca without input": {"instruction": ASK, "output": SAY},
    "dolly": {"instruction": ASK, "context": "", "response": SAY, "category": "open_qa"},
    "question and answer": {"question": ASK, "answer": SAY},
    "query and response": {"query": ASK, "response": SAY},
    "prompt and response": {"prompt": ASK, "response": SAY, "prompt_id": 3},
    "input and output": {"input": ASK, "output": SAY},
    "completion of messages": {"prompt": [USER], "completion": [ASSISTANT]},
    "preference with its prompt": {"chosen": [USER, ASSISTANT], "rejected": [USER, WRONG]},
    "preference of answers": {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WRONG]},
    "preference of texts": {"question": ASK, "chosen": SAY, "rejected": "No."},
    "preference, prompt twice": {
        "prompt": ASK, "chosen": [USER, ASSISTANT], "rejected": [USER, WRONG],
        "score_chosen": 8.0, "score_rejected": 1.5,
    },
    "hh-rlhf": {"chosen": HH.format(ASK, SAY), "rejected": HH.format(ASK, "No.")},
    "ranks": {"prompt": ASK, "answers": ["No.", SAY], "ranks": [2, 1]},
    "scores": {"prompt": ASK, "responses": [SAY, "No."], "scores": [0.9, 0.2]},
    "ranked objects": {
        "prompt": ASK, "answers": [{"answer": "No.", "rank": 7}, {"answer": SAY, "rank": 1}]
    },
    "rated objects": {
        "instruction": ASK,
        "completions": [
            {"response": "No.", "overall_score": 2.0}, {"response": SAY, "overall_score": 8.5}
        ],
    },
}  # fmt: skip
OTHERS = {
    "text": ({"text": "Night fell."}, dict(text="Night fell.")),
    "text with more": (
        {"text": "Night fell.", "source": "a", "id": 7},
        dict(text="Night fell.", id="7", meta={"source": "a"}),
    ),
    "completion": ({"prompt": "2+2=", "completion": "4"}, dict(prompt="2+2=", completion="4")),
    "wanted completion": (
        {"prompt": "2+2=", "completion": "4", "label": True},
        dict(prompt="2+2=", completion="4"),
    ),
    "preference of completions": (
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        dict(prompt="2+2=", completion="4"),
    ),
    "preference of texts alone": (
        {"chosen": "Night fell.", "rejected": "Fell night."},
        dict(text="Night fell."),
    ),
}


def turns(doc):
    return [(m.role, m.content) for m in doc.messages]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CODEX_NB_HOME", str(tmp_path_factory.mktemp("home")))
        corpus = build_corpus([f"text {i}" for i in range(99)])
        yield train_tokenizer(corpus, TokenizerConfig(tokenizer="bytes", vocab_size=300))


def learned(tokenizer, doc):
    encoded = encode_document(tokenizer, doc)
    return tokenizer.decode(encoded.ids if encoded.mask is None else encoded.ids[encoded.mask])


@pytest.mark.parametrize("name", TALKS)
def test_a_conversation_is_read_and_its_answer_is_learned(name, tokenizer):
    doc = RecordReader()(TALKS[name])
    assert turns(doc) == [("user", ASK), ("assistant", SAY)]
    assert learned(tokenizer, doc) == SAY


@pytest.mark.parametrize("name", OTHERS)
def test_texts_and_completions_are_read_as_they_stand(name, tokenizer):
    record, expected = OTHERS[name]
    doc = RecordReader()(record)
    assert doc == Document(**expected)
    assert learned(tokenizer, doc) == (expected.get("completion") or expected["text"])


@pytest.mark.parametrize("name", ["sharegpt", "alpaca", "question and answer", "messages"])
def test_a_system_message_beside_comes_first(name):
    doc = RecordReader()(TALKS[name] | {"system": TOLD["content"]})
    assert turns(doc) == [("system", "Be brief."), ("user", ASK), ("assistant", SAY)]


def as_csv(records):
    import csv
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, records[0])
    writer.writeheader()
    for record in records:
        writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()})
    return out.getvalue().encode()


def as_parquet(records):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), out)
    return out.getvalue()


def lines(records):
    return "".join(json.dumps(r) + "\n" for r in records).encode()


FILES = {
    "talks.jsonl": lines,
    "talks.ndjson": lines,
    "talks.json": lines,
    "talks.jl": lines,
    "talks": lines,
    "talks.jsonl.txt": lines,
    "mark.jsonl": lambda r: b"\xef\xbb\xbf" + lines(r),
    "mark.json": lambda r: b"\xef\xbb\xbf" + json.dumps(r).encode(),
    "array.json": lambda r: json.dumps(r).encode(),
    "indented.json": lambda r: json.dumps(r, indent=2).encode(),
    "objects.json": lambda r: "\n".join(json.dumps(x, indent=1) for x in r).encode(),
    "array.json.gz": lambda r: gzip.compress(json.dumps(r).encode()),
    "table.csv": as_csv,
    "table.parquet": as_parquet,
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", TALKS)
def test_a_format_is_read_from_any_kind_of_file(name, file, tmp_path):
    path = tmp_path / file
    path.write_bytes(FILES[file]([TALKS[name]] * 3))
    found = list(read_file(path))
    assert [turns(d) for d in found] == [[("user", ASK), ("assistant", SAY)]] * 3
    assert len({d.id for d in found}) == 3 or TALKS[name].get("id")


def test_files_of_other_json_are_texts(tmp_path):
    for text in ('{"name": "a", "version": "1.0"}', "[1, 2, 3]", '{"text', "{{ template }}", "[]"):
        path = tmp_path / "a.json"
        path.write_text(text)
        assert [d.text for d in read_file(path)] == [text]


def test_a_long_array_is_read_in_pieces(tmp_path):
    path = tmp_path / "long.json"
    records = [{"question": f"{i}?", "answer": "é" * (i % 700), "n": i} for i in range(1, 5000)]
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1))
    records = [r for r in records if r["answer"]]
    rejects = Rejects("quarantine")
    found = list(read_file(path, rejects=rejects))
    assert [d.meta["n"] for d in found] == [r["n"] for r in records]
    assert [d.messages[1].content for d in found] == [r["answer"] for r in records]
    assert rejects.count == 7 and rejects.first[0].line == 2 + 5 * 699


@pytest.mark.parametrize(
    "text, place",
    [
        ('[{"question": "a", "answer": "b"}', ":1: the array has no end"),
        ('[{"question": "a", "answer": "b"},\n {"question": ', ":2: no JSON"),
        ('[{"question": "a", "answer": "b"},\n {"question": "a"}]', ":2: the fields 'question'"),
        ('[{"question": "a", "answer": "b"},\n 7]', ":2: a record must be an object, is a number"),
        ('[{"question": "a", "answer": NaN}]', ":1: 'NaN' is not a JSON value"),
    ],
)
def test_damaged_arrays_are_refused_with_their_place(text, place, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ReadError, match=".*a.json") as e:
        list(read_file(path))
    assert place in str(e.value)


REFUSED = {
    "ambiguous": (
        TALKS["alpaca"] | {"text": "### Instruction: ..."},
        "could be read as text or instruction",
    ),
    "messages beside a preference": (
        TALKS["preference with its prompt"] | {"messages": [USER, ASSISTANT]},
        "could be read as messages or preference",
    ),
    "text and prompt": ({"text": "a", "prompt": "b"}, "has `text` and `prompt`"),
    "unwanted completion": (
        {"prompt": "a", "completion": "b", "label": False},
        "its label says that this completion is not wanted",
    ),
    "unranked answers": ({"prompt": ASK, "answers": [SAY, "No."]}, "neither ranks nor scores"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]},
        "message 1: a part of type 'image_url'",
    ),
    "no weight": ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "message 2: its weight is 0"),
    "nobody": ({"messages": [{"role": "narrator", "content": "a"}]}, "message 1: unknown role"),
    "silent": ({"messages": [USER, ASSISTANT | {"content": ""}]}, "message 2: `content` is empty"),
    "no answer": ({"messages": [USER]}, "no message of the assistant"),
    "unknown": ({"body": "a"}, "the fields 'body' are of no known format; known are: `text`"),
    "misspelt": ({"mesages": [USER]}, "did you mean messages?"),
    "misspelt group": ({"text": "a", "groups": "b"}, "unknown field 'groups'; did you mean group?"),
    "empty": ({}, "no fields: no known format"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_clear_or_not_to_be_learned_is_refused(name, tmp_path):
    record, reason = REFUSED[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([TALKS["messages"], record]))
    with pytest.raises(ReadError) as e:
        list(read_file(path))
    assert "a.jsonl:2: " in str(e.value) and reason in str(e.value)
    rejects = Rejects("quarantine")
    assert len(list(read_file(path, rejects=rejects))) == rejects.count == 1


def test_a_format_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    path = tmp_path / "both.json"
    both = [{"instruction": f"{ASK} {i}", "output": SAY, "text": f"text {i}"} for i in range(60)]
    path.write_text(json.dumps(both))
    with pytest.raises(ReadError, match="could be read as text or instruction"):
        open_corpus(CorpusConfig(data=str(path)))
    texts = open_corpus(CorpusConfig(data=str(path), record_format="text"))
    assert {d.text for d in texts} == {r["text"] for r in both} and not texts.notes
    talks = open_corpus(CorpusConfig(data=str(path), record_format="instruction"))
    assert {d.messages[1].content for d in talks} == {SAY}
    assert talks.notes[0].startswith("60 records are instructions, as of Alpaca, e.g. user: What")
    with pytest.raises(ConfigError, match="record_format"):
        CorpusConfig.from_dict({"data": str(path), "record_format": "alpacca"})


@pytest.mark.parametrize("n", [3, 4, 5, 8, 20, 21, 40, 200])
def test_a_small_set_has_all_its_splits_whatever_its_order(n, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    documents = [f"text {i}" for i in range(n)]
    for salt in map(str, range(8)):
        cfg = CorpusConfig(salt=salt)
        corpus = build_corpus(documents, cfg)
        sizes = [corpus.counts[split]["documents"] for split in SPLITS]
        assert min(sizes) >= 1 and sum(sizes) == n and sizes[0] >= n - max(2, 0.25 * n)
        assert bool(corpus.notes) == (corpus.meta["split_by"] == "rank")
        again = build_corpus(documents[::-1], cfg)
        for split in SPLITS:
            assert {d.text for d in again.split(split)} == {d.text for d in corpus.split(split)}


def test_groups_and_copies_of_a_small_set_stay_on_one_side(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    documents = [Document(str(i), f"text {i // 2}", group=f"g{i // 4}") for i in range(16)]
    corpus = build_corpus(documents)
    assert corpus.meta["split_by"] == "rank" and corpus.meta["duplicates"] == 8
    groups = [{d.group for d in corpus.split(split)} for split in SPLITS]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 4
    with pytest.raises(ReadError, match="split is empty"):
        build_corpus([Document(str(i), f"text {i}", group=f"g{i % 2}") for i in range(16)])


def test_convert_writes_what_was_read(tmp_path):
    given, made = tmp_path / "alpaca.json", tmp_path / "talks.jsonl"
    given.write_text(json.dumps([TALKS["alpaca"], OTHERS["completion"][0]]))
    home = tmp_path / "home"
    done = codex("data", "convert", given, made, "--to", "messages", home=home)
    assert done.returncode == 0, done.stderr
    assert "2 documents in" in done.stdout and "1 records are instructions" in done.stdout
    read = [[m["content"] for m in json.loads(x)["messages"]] for x in made.open()]
    assert read == [[ASK, SAY], ["2+2=", "4"]]
    again = codex("data", "convert", given, made, home=home)
    assert again.returncode == 1 and "talks.jsonl: exists" in again.stderr
    given.write_text(json.dumps([TALKS["alpaca"], OTHERS["text"][0]]))
    for words, place in ((["--to", "messages"], 2), (["--record-format", "text"], 1)):
        done = codex("data", "convert", given, tmp_path / "b.jsonl", *words, home=home)
        assert done.returncode == 1 and f"alpaca.json:{place}: " in done.stderr
    assert {p.name for p in tmp_path.iterdir()} <= {"alpaca.json", "talks.jsonl", "home"}


def test_preflight_shows_what_is_learned(tmp_path):
    path = tmp_path / "talks.json"
    questions = [{"question": f"{i}?", "answer": f"{i}."} for i in range(30)]
    path.write_text(json.dumps([TALKS["sharegpt"], *questions]))
    words = "-p preset smoke -p seq_len 64 -p packing best-fit --show 2 -p data".split()
    done = codex("preflight", *words, path, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert "note: 30 records are questions with answers" in done.stdout
    assert done.stdout.count("⟦") == 2 and "<|end|>⟧" in done.stdout


@pytest.mark.parametrize("inside", [True, False])
def test_preflight_says_whether_the_end_of_a_turn_is_learned(inside, tmp_path, monkeypatch):
    from test_bases import make_base

    from codex_nb.run.preflight import preflight, preflight_lines
    from codex_nb.run.settings import FinetuneConfig

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    end = "{{ '<|im_end|>' }}"
    within, after = (end, "") if inside else ("", end)
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}" + within + "{% endgeneration %}" + after + "{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    make_base(tmp_path / "base", template, special, None, False)
    talks = [{"question": f"{i}?", "answer": f"{i}."} for i in range(40)]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    given = {"base": str(tmp_path / "base"), "data": str(tmp_path / "talks.json")}
    cfg = FinetuneConfig.from_preset("smoke", **given, seq_len=64, adapter="none").resolve_auto()
    report = preflight(cfg, timed=False)
    assert report["turn_ends_learned"] is inside
    said = "no token that ends a turn is learned, so the model will not know when to stop"
    assert any(said in line for line in preflight_lines(report)) is not inside


def test_a_fine_tuning_on_texts_or_completions_trains(tmp_path):
    home = tmp_path / "home"
    kinds = {
        "completions": [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(40)],
        "texts": [{"text": f"The number {i} is {'even' if i % 2 else 'odd'}."} for i in range(40)],
    }
    for name, records in list(kinds.items())[: counts(1, 2)]:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(records))
        words = "-p preset smoke -p steps 2 -p seq_len 64 -p data".split()
        done = codex("run", "finetune", *words, path, home=home)  # the first trains a base as well
        assert done.returncode == 0, done.stdout + done.stderr


def places(value, path=()):
    "All places inside a record."
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, v in inner:
        yield (*path, key)
        if isinstance(v, (dict, list)):
            yield from places(v, (*path, key))


def with_value(record, path, value):
    made = json.loads(json.dumps(record))
    at = made
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return made


ODD = [None, 5, -1.5, True, "", "x", "{", "[1]", '{"a": 1}', [], [5], [[]], [None], {}, {"a": []}]
TOOLS = {
    "messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
                 {"role": "tool", "content": "4", "tool_call_id": "1"}, ASSISTANT],
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "system": "Be brief.",
}  # fmt: skip
HISTORY = TALKS["alpaca"] | {"history": [["a", "b"]], "id": "1", "group": "g", "meta": {"a": 1}}


def test_a_record_with_a_wrong_type_anywhere_is_a_document_or_a_bad_line():
    from codex_nb.data.documents import BadLine, parse_line

    records = [*TALKS.values(), *(r for r, _ in OTHERS.values()), TOOLS, HISTORY]
    read = refused = 0
    for record in records:
        RecordReader()(record)
        for path in places(record):
            for odd in ODD:
                try:
                    doc = RecordReader()(with_value(record, path, odd))
                except BadLine:
                    refused += 1
                    continue
                read += 1
                assert parse_line(msgspec.json.encode(doc)) == doc
    assert read > 500 and refused > 500


def test_numbers_and_texts_that_a_store_cannot_hold_are_refused_wherever_they_hide():
    from codex_nb.data.documents import BadLine

    for hidden in ('{"a": 1e999}', '{"a": NaN}', '{"a": "\\ud800"}'):
        record = with_value(
            TOOLS, ("messages", 1, "tool_calls", 0, "function", "arguments"), hidden
        )
        with pytest.raises(BadLine, match="is not JSON"):
            RecordReader()(record)
    deep = "[" * 100_000
    assert RecordReader()({"text": "a", "meta": deep}).meta == {"meta": deep}


def test_long_windows_of_public_dumps_are_read(tmp_path):
    "As `zstd --long=31` writes a stream of unknown size."
    from backports import zstd

    from codex_nb.data.readers import read_path

    options = {zstd.CompressionParameter.window_log: 31}
    packed = zstd.ZstdCompressor(options=options)
    lines = b"".join(b'{"text": "line %d"}\n' % i for i in range(100))
    path = tmp_path / "dump.jsonl.zst"
    path.write_bytes(packed.compress(lines) + packed.flush())
    assert [d.text for d in read_path(path)] == [f"line {i}" for i in range(100)]
