"""What strange data may hold: each case is refused by words and place, or read as it must be."""

import gzip
import json
import os
import random
import subprocess
import sys

import pytest
from backports import zstd
from helpers import PROGRAMS, command, counts
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_nb.data.corpus import CorpusConfig, open_corpus
from codex_nb.data.documents import BadLine, ReadError, check_json, parse_line
from codex_nb.data.readers import Rejects, read_path

FINE = b'{"text": "fine"}'


def msg(*turns):
    "A line with a conversation."
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": messages}).encode()


# Four fields end in a backslash: counting quotes cannot tell that there are four.
TWICE = rb'{"id": "a\\", "group": "b\\", "text": "c\\", "text": "d\\"}'

# (what, the line, the reason; None where the line is good)
LINES = [
    ("not UTF-8", b'{"text": "caf\xe9"}', "byte 0xe9 is not UTF-8 at column 14"),
    ("not UTF-8 in a name", b'{"\xff": "a"}', "byte 0xff is not UTF-8 at column 3"),
    ("overlong UTF-8", b'{"text": "\xc0\x80"}', "byte 0xc0 is not UTF-8 at column 11"),
    ("surrogate in UTF-8", b'{"text": "\xed\xa0\x80"}', "byte 0xed is not UTF-8 at column 11"),
    ("truncated UTF-8", b'{"text": "\xe2\x82"}', "byte 0xe2 is not UTF-8 at column 11"),
    ("UTF-16", FINE.decode().encode("utf-16"), "is not UTF-8 at column 1"),
    ("byte order mark", b"\xef\xbb\xbf" + FINE, "a byte order mark"),
    (
        "raw NUL in a string",
        b'{"text": "a\x00b"}',
        "a control character (0x00) inside a string at column 12",
    ),
    ("NUL between", b'{"text": "a"\x00}', "expected ',' or '}'"),
    ("escaped NUL", b'{"text": "a\\u0000b"}', None),
    (
        "raw tab in a string",
        b'{"text": "a\tb"}',
        "a control character (0x09) inside a string at column 12",
    ),
    ("DEL in a string", b'{"text": "a\x7fb"}', None),
    ("form feed as space", b'{"text": "a"}\x0c', "after the value at column 14"),
    (
        "lone high surrogate",
        b'{"text": "\\ud800"}',
        "an unpaired surrogate in the string at column 10",
    ),
    ("lone low surrogate", b'{"text": "a\\udc00"}', "an unpaired surrogate"),
    ("surrogates swapped", b'{"text": "\\udc00\\ud800"}', "an unpaired surrogate"),
    (
        "lone surrogate in meta",
        b'{"text": "a", "meta": {"k": "\\udfff"}}',
        "an unpaired surrogate in the string at column 29",
    ),
    ("a surrogate pair", b'{"text": "\\ud83d\\ude00"}', None),
    ("escaped backslash before u", b'{"text": "\\\\ud800"}', None),
    ("two objects", FINE + FINE, "a second value on the line at column 17"),
    ("two objects, spaced", FINE + b" " + FINE, "a second value on the line at column 18"),
    ("words after", FINE + b" end", "'e' after the value at column 18"),
    ("an array", b'[{"text": "a"}]', "a record must be an object, is an array"),
    ("a string", b'"a"', "a record must be an object, is a string"),
    ("a number", b"42", "a record must be an object, is a number"),
    ("null", b"null", "a record must be an object, is null"),
    ("true", b"true", "a record must be an object, is a boolean"),
    ("NaN", b'{"text": "a", "meta": {"x": NaN}}', "'NaN' is not a JSON value at column 29"),
    ("Infinity", b'{"text": "a", "meta": {"x": Infinity}}', "'Infinity' is not a JSON value"),
    ("-Infinity", b'{"text": "a", "meta": {"x": -Infinity}}', "is not a JSON value at column 29"),
    ("undefined", b'{"text": undefined}', "'undefined' is not a JSON value"),
    (
        "1e400",
        b'{"text": "a", "meta": {"x": 1e400}}',
        "a number too large for a double at column 29",
    ),
    ("1e-400", b'{"text": "a", "meta": {"x": 1e-400}}', None),
    (
        "an integer of 30 digits",
        b'{"text": "a", "meta": {"x": ' + b"9" * 30 + b"}}",
        "an integer that does not fit in 64 bits at column 29",
    ),
    (
        "an integer of 5000 digits",
        b'{"text": "a", "meta": {"x": ' + b"9" * 5000 + b"}}",
        "an integer that does not fit in 64 bits",
    ),
    ("2**64-1", b'{"text": "a", "meta": {"x": 18446744073709551615}}', None),
    (
        "2**64",
        b'{"text": "a", "meta": {"x": 18446744073709551616}}',
        "an integer that does not fit in 64 bits",
    ),
    ("leading zero", b'{"text": "a", "meta": {"x": 01}}', "expected ',' or '}'"),
    ("plus sign", b'{"text": "a", "meta": {"x": +1}}', "'+' is not a JSON value"),
    ("no digit after the point", b'{"text": "a", "meta": {"x": 1.}}', "expected ',' or '}'"),
    ("single quotes", b"{'text': 'a'}", 'expected a name in double quotes, found "\'" at column 2'),
    ("bare name", b'{text: "a"}', "expected a name in double quotes, found 't'"),
    (
        "comma too many",
        b'{"text": "a",}',
        "expected a name in double quotes, found '}' at column 14",
    ),
    ("comma missing", b'{"text": "a" "id": "b"}', "expected ',' or '}', found '\"' at column 14"),
    ("colon missing", b'{"text" "a"}', "expected ':', found '\"'"),
    ("unknown escape", b'{"text": "a\\x41"}', "an escape that JSON does not define at column 12"),
    ("short escape", b'{"text": "a\\u12"}', "an escape that JSON does not define"),
    ("a comment", b'{"text": "a"} // yes', "'/' after the value"),
    ("cut off in a string", b'{"text": "a', "an unterminated string that starts at column 10"),
    ("cut off in an object", b'{"text": "a"', "the line ends inside a value"),
    ("cut off after a colon", b'{"text":', "the line ends inside a value"),
    ("wrong bracket", b'{"text": "a"]', "expected ',' or '}', found ']'"),
    (
        "nested 10,000 deep",
        b'{"text": "a", "meta": {"x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}}",
        "nested deeper than 64",
    ),
    (
        "nested 10,000 deep and not closed",
        b'{"text": "a", "meta": {"x": ' + b"[" * 10_000,
        "the line ends inside a value",
    ),
    ("a blank line", b"", "an empty line"),
    ("a line of spaces", b" \t ", "an empty line"),
    (
        "a repeated name",
        b'{"text": "a", "text": "b"}',
        "'text' is given twice; remove one; the second",
    ),
    ("a repeated name of another type", b'{"text": 1, "text": "b"}', "'text' is given twice"),
    ("a repeated name in another spelling", b'{"text": "a", "te\\u0078t": "b"}', "is given twice"),
    ("a repeated name, and backslashes", TWICE, "'text' is given twice; remove one; the second"),
    ("a repeated name in meta", b'{"text": "a", "meta": {"k": 1, "k": 2}}', "'k' is given twice"),
    (
        "a repeated role",
        msg(("user", "a"), ("assistant", "b")).replace(b'{"role"', b'{"role": "x", "role"', 1),
        "'role' is given twice",
    ),
    ("missing field", b"{}", "no fields: no known format; known are: `text`; `messages` of"),
    ("null", b'{"text": null}', "`text` must be a string, is null"),
    ("a number for a text", b'{"text": 7}', "`text` must be a string, is a number"),
    ("an array for a text", b'{"text": ["a"]}', "`text` must be a string, is an array"),
    ("empty text", b'{"text": ""}', "`text` is empty"),
    ("misspelt", b'{"txt": "a"}', "the fields 'txt' are of no known format; did you mean text?"),
    ("an extra field", b'{"text": "a", "label": 1}', None),
    ("misspelt group", b'{"text": "a", "grup": "b"}', "unknown field 'grup'; did you mean group?"),
    ("id as number", b'{"text": "a", "id": 7}', None),
    ("id as array", b'{"text": "a", "id": []}', "`id` must be a string, is an array"),
    ("group as array", b'{"text": "a", "group": []}', "`group` must be a string, is an array"),
    ("meta as string", b'{"text": "a", "meta": "x"}', None),
    ("text and messages", b'{"text": "a", "messages": []}', "could be read as text or messages"),
    ("prompt alone", b'{"prompt": "a"}', "the fields 'prompt' are of no known format"),
    ("empty completion", b'{"prompt": "a", "completion": ""}', "`completion` is empty"),
    ("empty prompt", b'{"prompt": "", "completion": "a"}', None),
    ("no messages", b'{"messages": []}', "`messages` is empty"),
    ("messages as object", b'{"messages": {}}', "`messages` must be an array, is an object"),
    (
        "a message that is a string",
        b'{"messages": ["a"]}',
        "message 1 must be an object, is a string",
    ),
    (
        "a message without content",
        b'{"messages": [{"role": "user"}]}',
        "message 1 must have `role` and `content`, has role",
    ),
    (
        "a message with more, and no answer",
        b'{"messages": [{"role": "user", "content": "a", "name": "b"}]}',
        "no message of the assistant",
    ),
    (
        "content null",
        b'{"messages": [{"role": "user", "content": null}]}',
        "message 1: `content` must be a string, is null",
    ),
    ("content empty", msg(("user", "a"), ("assistant", "")), "message 2: `content` is empty"),
    ("unknown role", msg(("narrator", "a")), "message 1: unknown role 'narrator'"),
    ("assistant first", msg(("assistant", "a")), "message 1: assistant cannot come first"),
    ("two users", msg(("user", "a"), ("user", "b")), "message 2: user cannot follow user"),
    (
        "system late",
        msg(("user", "a"), ("assistant", "b"), ("system", "c")),
        "message 3: system cannot follow assistant",
    ),
    ("system alone", msg(("system", "a")), "no message of the assistant"),
    ("user alone", msg(("user", "a")), "no message of the assistant"),
    ("system and user", msg(("system", "a"), ("user", "b")), "no message of the assistant"),
    ("a good conversation", msg(("system", "s"), ("user", "a"), ("assistant", "b")), None),
    ("CRLF", FINE + b"\r", None),
    (
        "a line of 17 MB",
        b'{"text": "' + b"x" * (17 << 20) + b'"}',
        "the line is longer than 16,777,216 bytes",
    ),
]


@pytest.mark.parametrize("what,line,reason", LINES, ids=[name for name, *_ in LINES])
def test_bad_line_is_refused_with_its_place_and_reason(tmp_path, what, line, reason):
    (tmp_path / "a.jsonl").write_bytes(FINE + b"\n" + line + b"\n" + FINE + b"\n")
    if reason is None:
        assert len(list(read_path(tmp_path / "a.jsonl"))) == 3
        return
    with pytest.raises(ReadError) as e:
        list(read_path(tmp_path / "a.jsonl"))
    assert str(e.value).startswith(f"{tmp_path / 'a.jsonl'}:2: ") and reason in str(e.value)
    rejects = Rejects("quarantine", tmp_path / "rejects.ndjson")
    assert [d.id for d in read_path(tmp_path / "a.jsonl", rejects=rejects)] == [
        "a.jsonl:1",
        "a.jsonl:3",
    ]
    assert [
        (r["file"], r["line"])
        for r in map(json.loads, (tmp_path / "rejects.ndjson").read_text().splitlines())
    ] == [("a.jsonl", 2)]


def test_tables_of_cases_are_long_and_without_repetition():
    assert len(LINES) + len(FILES) >= 60
    assert len({name + str(line) for name, line, _ in LINES}) == len(LINES)


def many(n=4000):
    return b"".join(
        json.dumps({"text": f"text {i} {random.Random(i).random()}"}).encode() + b"\n"
        for i in range(n)
    )


def parquet(p):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", "b"]}), p)


def saved(p, state):
    p.mkdir()
    (p / "dataset_info.json").write_text("{}")
    (p / "state.json").write_text(state)


# (what, file name, how it is made, the reason; None where it is good)
FILES = [
    ("empty file", "a.jsonl", lambda p: p.write_bytes(b""), "the file is empty"),
    ("empty text file", "a.txt", lambda p: p.write_bytes(b""), "the file is empty"),
    ("no final newline", "a.jsonl", lambda p: p.write_bytes(FINE), None),
    ("only newlines", "a.jsonl", lambda p: p.write_bytes(b"\n\n"), ":1: an empty line"),
    (
        "a type that changes late",
        "a.jsonl",
        lambda p: p.write_bytes(many() + b'{"text": 5}\n'),
        ":4001: `text` must be a string",
    ),
    (
        "another field late",
        "a.jsonl",
        lambda p: p.write_bytes(many() + b'{"texte": "a", "lang": "en"}\n'),
        ":4001: the fields 'texte', 'lang' are of no known format; did you mean text?",
    ),
    (
        "a 100 MB line",
        "a.jsonl",
        lambda p: p.write_bytes(FINE + b'\n{"text": "' + b"x" * (100 << 20) + b'"}\n' + FINE),
        ":2: the line is longer than",
    ),
    (
        "truncated gzip",
        "a.jsonl.gz",
        lambda p: p.write_bytes(gzip.compress(many())[:-100]),
        "the compressed data is damaged or cut off",
    ),
    (
        "truncated zstd",
        "a.jsonl.zst",
        lambda p: p.write_bytes(zstd.compress(many())[:-100]),
        "the compressed data is damaged or cut off",
    ),
    (
        "damaged gzip",
        "a.jsonl.gz",
        lambda p: p.write_bytes(
            (lambda b: b[:2000] + bytes([b[2000] ^ 255]) + b[2001:])(gzip.compress(many()))
        ),
        "damaged or cut off",
    ),
    ("not gzip", "a.jsonl.gz", lambda p: p.write_bytes(FINE), "damaged or cut off"),
    ("not zstd", "a.jsonl.zst", lambda p: p.write_bytes(FINE), "damaged or cut off"),
    ("a gzip bomb", "a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(bytes(200 << 20))), ":"),
    (
        "a text bomb",
        "a.txt.gz",
        lambda p: p.write_bytes(gzip.compress(b"a\n" * (60 << 20))),
        "expands to more than",
    ),
    (
        "gzip without its suffix",
        "a.jsonl",
        lambda p: p.write_bytes(gzip.compress(FINE)),
        "this looks like gzip data, which should be named .gz",
    ),
    ("Parquet named JSON lines", "a.jsonl", parquet, "this looks like a Parquet file"),
    (
        "JSON lines named Parquet",
        "a.parquet",
        lambda p: p.write_bytes(many(5)),
        "not a complete Parquet file",
    ),
    (
        "truncated Parquet",
        "a.parquet",
        lambda p: (parquet(p), p.write_bytes(p.read_bytes()[:-20])),
        "not a complete Parquet file",
    ),
    ("Parquet", "a.parquet", parquet, None),
    ("binary named text", "a.txt", lambda p: p.write_bytes(b"ab\n\x00\x01"), ":2: a NUL byte"),
    (
        "Latin-1 named text",
        "a.txt",
        lambda p: p.write_bytes("ein\nCafé".encode("latin-1")),
        ":2: byte 0xe9 is not UTF-8",
    ),
    (
        "CSV without its column",
        "a.csv",
        lambda p: p.write_text("words,id\na,b\n"),
        "the columns 'words', 'id' are of no known format",
    ),
    (
        "CSV with a short row",
        "a.csv",
        lambda p: p.write_text("text,id\na,b\nc\n"),
        ":3: 1 cells in a row of 2 columns",
    ),
    ("CSV with an open quote", "a.csv", lambda p: p.write_text('text\n"a\n'), "not CSV"),
    (
        "CSV with columns of one name",
        "a.csv",
        lambda p: p.write_text("text,text\na,b\n"),
        "two columns have one name",
    ),
    ("CSV, empty cell", "a.csv", lambda p: p.write_text("text,id\n,b\n"), ":2: `text` is empty"),
    ("CSV", "a.csv", lambda p: p.write_text('\ufefftext,id\r\n"a ""b"", c",1\r\n'), None),
    (
        "a dangling link",
        "a.txt",
        lambda p: p.symlink_to(p.with_name("nowhere")),
        "there is no such file or folder",
    ),
    (
        "a saved dataset, its list broken",
        "saved",
        lambda p: saved(p, "{"),
        "not a complete folder saved by datasets",
    ),
    (
        "a saved dataset without a list",
        "saved",
        lambda p: saved(p, "{}"),
        "not a complete folder saved by datasets",
    ),
    (
        "a saved dataset that points elsewhere",
        "saved",
        lambda p: saved(p, '{"_data_files": [{"filename": "../../other.arrow"}]}'),
        "names files outside the folder",
    ),
    (
        "a saved dataset, its file missing",
        "saved",
        lambda p: saved(p, '{"_data_files": [{"filename": "data.arrow"}]}'),
        "not a complete Arrow file",
    ),
    ("a pipe", "a.jsonl", lambda p: os.mkfifo(p), "not a regular file"),
]


@pytest.mark.parametrize("what,name,make,reason", FILES, ids=[f[0] for f in FILES])
def test_bad_file_is_refused_with_its_name_and_reason(tmp_path, what, name, make, reason):
    make(tmp_path / name)
    if reason is None:
        assert list(read_path(tmp_path / name))
        return
    with pytest.raises(ReadError) as e:
        list(read_path(tmp_path / name))
    assert str(tmp_path / name) in str(e.value) and reason in str(e.value)


def test_file_without_permission_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(FINE)
    (tmp_path / "a.jsonl").chmod(0)
    for p in (tmp_path, *tmp_path.parents):
        if p.stat().st_uid == os.getuid() and str(p).startswith("/tmp"):
            p.chmod(p.stat().st_mode | 0o055)
    program = PROGRAMS / "read_without_permission.py"
    done = subprocess.run(
        [sys.executable, program, tmp_path / "a.jsonl"], capture_output=True, text=True
    )
    assert "ReadError" in done.stdout and "Permission denied" in done.stdout, done


def test_stop_writes_nothing_and_quarantine_writes_the_good(tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    (tmp_path / "a.jsonl").write_bytes(many(300) + b"{bad\n" + many(600)[len(many(300)) :])
    cfg = dict(data=str(tmp_path / "a.jsonl"))
    with pytest.raises(ReadError, match="a.jsonl:301: "):
        open_corpus(CorpusConfig(**cfg))
    assert not [p for p in (tmp_path / "home" / "store" / "corpus").iterdir() if p.name[0] != "."]
    c = open_corpus(CorpusConfig(**cfg, on_error="quarantine"))
    assert len(c) == 600 and c.meta["rejects"] == 1
    assert json.loads((c.path / "rejects.ndjson").read_text()) == {
        "file": "a.jsonl",
        "line": 301,
        "reason": "expected a name in double quotes, found 'b' at column 2",
    }
    (tmp_path / "b.jsonl").write_bytes(many(600))
    assert (
        open_corpus(CorpusConfig(data=str(tmp_path / "b.jsonl"))).digest != c.digest
    )  # ids name the file
    assert [
        d.text for d in open_corpus(CorpusConfig(data=str(tmp_path / "b.jsonl"))).split("test")
    ] == [d.text for d in c.split("test")]


# what a JSON text, also a spoiled one, is called must agree with the standard library made strict
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda c: st.lists(c) | st.dictionaries(st.text(), c),
    max_leaves=12,
)


def strictly(s):
    def refuse(c):
        raise ValueError(c)

    return json.loads(s, parse_constant=refuse)


@settings(max_examples=counts(600, 20_000), deadline=None)
@given(
    json_values,
    st.booleans(),
    st.lists(
        st.tuples(
            st.integers(0, 200),
            st.sampled_from(
                list('{}[]",:\\0123456789.eE+- \t\n\x00/aNtu')
                + [
                    "",
                    "\\u",
                    "NaN",
                    "tru",
                    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
                ]
            ),
        ),
        max_size=3,
    ),
)
def test_grammar_agrees_with_the_standard_library(value, ascii, spoil):
    s = json.dumps(value, ensure_ascii=ascii)
    for i, c in spoil:
        s = s[: i % (len(s) + 1)] + c + s[i % (len(s) + 1) + (1 if i % 2 else 0) :]
    try:
        strictly(s)
        ours = True
    except ValueError:
        ours = False
    try:
        check_json(s)
        accepted = True
    except BadLine:
        accepted = False
    assert ours == accepted, s


@settings(max_examples=counts(600, 20_000), deadline=None)
@given(
    st.text(max_size=40),
    st.dictionaries(st.text(max_size=5), json_values, max_size=3),
    st.lists(
        st.tuples(
            st.integers(0, 300),
            st.sampled_from(list('{}[]",:\\0123456789.eE+-') + ["", "\\ud800", "9" * 25, "1e999"]),
        ),
        max_size=2,
    ),
)
def test_fast_parser_accepts_what_the_slow_one_does(text, meta, spoil):
    from codex_nb.data.documents import _read_slowly, document_of

    s = json.dumps({"text": text, "meta": meta})
    for i, c in spoil:
        s = s[: i % (len(s) + 1)] + c + s[i % (len(s) + 1) :]

    def outcome(f):
        try:
            return f(s.encode())
        except BadLine as e:
            return e.reason

    assert outcome(parse_line) == outcome(lambda line: _read_slowly(line, document_of))


SHREDS = [
    FINE,
    FINE,
    FINE,
    FINE + FINE,
    FINE + b" ",
    b" " + FINE,
    FINE + b"\r",
    b"\r",
    b"",
    b" ",
    b"{",
    b"}",
    b'{"text": "a", "meta":',
    b"{}}",
    b'{"text": "a", "meta": {}',
    b"{}",
    b"{}" + FINE,
    b'{"text": "x}',
    b'{y"}',
    b'{"id":',
    b'"one", "text": "a"}',
    b'{"text": ""}',
    b'{"text": "a", "meta": {"k": [1]}}',
    b'{"text": "a", "prompt": ""}',
    b'{"prompt": "", "completion": "c"}',
    msg(("user", "a"), ("assistant", "b")),
    b'{"text": "' + b"long" * 400 + b'"}',
    b'{"text": "\xe9"}',
    b'{"text": 1, "text": "a"}',
    b'{"text": "a", "text": "b"}',
    b'{"id": "i", "text": "a", "id": "j"}',
    TWICE,
    b'{"text": "a", "meta": {"k": 1e400}}',
    b'{"text": "a", "meta": {"k": 99999999999999999999999}}',
    b'{"text": "a", "meta": {"k": "\\udfff"}}',
    b'{"text": "a", "meta": ' + b'{"k":' * 70 + b"1" + b"}" * 71,
    b'{"text": "a", "meta": {}\n}\n' + FINE * 2,
    b'{"text": "a", "meta":\n{}}\n' + FINE * 2,
    b'{"text": "a",\n"id": "b"}\n' + FINE * 2,
    b"\n" + FINE * 2,
    FINE * 2 + b"\n",
]


@settings(max_examples=counts(1000, 20_000), deadline=None)
@given(
    st.lists(st.sampled_from(SHREDS), min_size=1, max_size=8),
    st.booleans(),
    st.sampled_from([1, 30, 200, 1 << 18]),
)
def test_many_lines_at_once_are_read_as_each_alone(tmp_path_factory, shreds, last, portion):
    import codex_nb.data.readers as readers
    from codex_nb.data.record_formats import RecordReader

    path = tmp_path_factory.getbasetemp() / "shreds.jsonl"
    path.write_bytes(b"\n".join(shreds) + b"\n" * last)
    lines, want = path.read_bytes().split(b"\n"), []
    while lines and not lines[-1].strip() and (len(lines) > 1 or not lines[0]):
        lines.pop()  # empty lines at the end say nothing
    if path.stat().st_size and not lines:
        lines = [b""]  # nothing but empty lines
    for n, line in enumerate(lines, 1):
        try:
            d = parse_line(line, RecordReader())
            want.append((d.id or f"shreds.jsonl:{n}", d.full_text))
        except BadLine as e:
            want.append((n, e.reason))
    if not lines:
        return
    with pytest.MonkeyPatch.context() as m:
        m.setattr(readers, "_CHUNK_BYTES", portion)
        rejects = Rejects("quarantine")
        got = [(d.id, d.full_text) for d in read_path(path, rejects=rejects)]
    assert got == [w for w in want if isinstance(w[0], str)] and [
        (r.line, r.reason) for r in rejects.first
    ] == [w for w in want if isinstance(w[0], int)]


def test_a_terminal_and_arguments_with_other_characters(tmp_path):
    path = tmp_path / "é.jsonl"
    path.write_text("".join(f'{{"text": "Line {i}"}}\n' for i in range(200)))
    words = ["codex-nb", "data", "check", path, "--no-rows"]
    done = command(*words, home=tmp_path, fresh=True, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "\\xe9.jsonl" in done.stdout, done.stderr
    word = os.fsdecode(b"caf\xe9.jsonl")
    done = command("codex-nb", "data", "check", word, home=tmp_path, fresh=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "'caf\\\\xe9.jsonl': this argument is not UTF-8" in done.stderr
