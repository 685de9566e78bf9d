"""Whatever is given to a command or a reader: success, or one message with place and remedy."""

import ast
import json
import subprocess

import pytest
from helpers import BIN, LIB, PROVE, environment, program, shared_folder
from try_edges import call, commands, complaint, make_material

SEED = 20_000  # Where the cases of the gate begin; `make prove` tries thousands from 0 on


@pytest.fixture(scope="session")
def material(tmp_path_factory, described_runs, small_model):
    "Valid inputs of each kind, to damage copies of."

    def make(folder):
        make_material(folder, described_runs / "plain", small_model)

    return shared_folder(tmp_path_factory, "edges", make)


def tried(material, work, kind, number):
    "Try cases in one process; what is no clean end."
    first = 0 if PROVE else SEED
    words = [material, work, kind, first, first + number, 60]
    done = program("try_edges.py", *words, home=work)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tried"] == number
    return result["found"]


@pytest.mark.skipif(not PROVE, reason="a minute and more; in `make prove`")
@pytest.mark.parametrize("kind,number", [("commands", 4000), ("readers", 1200)])
def test_damaged_input_ends_in_success_or_one_message(material, tmp_path, kind, number):
    found = tried(material, tmp_path, kind, number)
    shown = [f"{f['case']} {f['wrong']}: {f['words']} {f['notes']}\n{f['err']}" for f in found]
    assert not found, "\n\n".join(shown[:5])


def test_every_command_is_tried():
    names = [" ".join(path) for path, _ in commands()]
    assert {"run", "data check", "models import", "store gc", "plugins", "chat"} <= {*names}
    assert len(names) > 30


@pytest.mark.parametrize(
    "code,out,err,wrong",
    [
        (0, "done", "", ""),
        (1, "", "codex-nb: a.jsonl:3: not a record; restore the file\n", ""),
        (2, "", "Usage: codex-nb run\n\nError: no such option\n", ""),
        (1, "wrong: a.txt: changed since\n", "", ""),
        (1, "", "", "no message"),
        (1, "", "codex-nb: \n", "no sentence"),
        (1, "", "codex-nb: CellExecutionError:\n", "the raw error"),
        (1, "", "codex-nb: [Errno 2] No such file or directory: 'a'\n", "the raw error"),
        (1, "", "codex-nb: Traceback (most recent call last):\n", "traceback"),
        (0, "", "Traceback (most recent call last):\n", "traceback"),
        (1, "", "IOStream.flush timed out\n", "not ours"),
    ],
)
def test_what_is_no_clean_end_is_seen(code, out, err, wrong):
    assert complaint(code, out, err) == wrong


def test_a_fault_of_ours_is_printed_with_a_report_that_can_be_sent(tmp_path):
    lines = (
        "import codex_nb.run.run_list as r, codex_nb.cli.main as m",
        "r.run_rows = lambda **_: {}['hf_' + 'a1B2' * 10]",
        "m.main(['runs', '--json', '--parameter', 'my_token=abcd'][:2])",
    )
    env = environment(tmp_path)
    done = subprocess.run(
        [BIN / "python", "-c", "\n".join(lines)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "KeyError: '[redacted huggingface-token]'" in done.stderr
    (report,) = (tmp_path / "faults").iterdir()
    assert done.stderr.splitlines()[-1].startswith(f"please send {report} to https://")
    text = report.read_text()
    assert text.startswith("command: codex-nb runs --json\n") and "Traceback" in text
    assert "a1B2" not in text


def test_too_few_open_files_are_said_with_what_allows_more(tmp_path):
    command = f"ulimit -n 64; exec {BIN / 'codex-nb'} run train -p steps=2"
    env = environment(tmp_path)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == (
        "codex-nb: open files: 64 are allowed, and a notebook with its kernel needs 256; "
        "allow more with: ulimit -n 1024\n"
    )
    assert not (tmp_path / "runs").exists()


def packed(how, data):
    import bz2
    import lzma
    import tarfile
    import zipfile
    from io import BytesIO

    out = BytesIO()
    if how == "zip":
        with zipfile.ZipFile(out, "w") as z:
            z.writestr("a.jsonl", data)
    elif how == "tar":
        with tarfile.open(fileobj=out, mode="w") as t:
            info = tarfile.TarInfo("a.jsonl")
            info.size = len(data)
            t.addfile(info, BytesIO(data))
    else:
        out.write({"xz": lzma, "bz2": bz2}[how].compress(data))
    return out.getvalue()


@pytest.mark.parametrize(
    "how,words",
    [
        ("xz", "this looks like xz data, which is not read; unpack it with xz -dk"),
        ("bz2", "this looks like bzip2 data, which is not read; unpack it with bzip2 -dk"),
        ("tar", "this looks like a tar archive, which is not read; unpack it with tar -xf"),
        ("zip", "this looks like a zip archive, which is not read; unpack it with unzip"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl.{}", "a.{}", "a.jsonl", "a.txt", "a.csv"])
def test_packed_data_are_named_for_what_they_are(tmp_path, how, words, name):
    from codex_nb.data.documents import ReadError
    from codex_nb.data.readers import read_path

    path = tmp_path / name.format(how)
    path.write_bytes(packed(how, b'{"text": "fine"}\n' * 100))
    with pytest.raises(ReadError) as e:
        list(read_path(path))
    assert str(e.value) == f"{path}: {words}"


def test_text_that_begins_like_a_format_is_text(tmp_path):
    from codex_nb.data.readers import read_path

    for n, start in enumerate(("PAR1 and PAR2", "BZh is a name", "%PDF-1.7 begins", "Rar! é")):
        path = tmp_path / f"{n}.txt"
        path.write_text(start)
        assert [d.text for d in read_path(path)] == [start]


# Advice to call Python, in words that the command line prints, and where it is meant for Python
FOR_PYTHON = {"eval/evaluate.py", "model/compute.py", "model/loss.py"}


def messages():
    "Module, line and words of every error that is raised, and of every failure printed."
    for path in sorted(LIB.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Call) and getattr(
                node.func, "id", getattr(node.func, "attr", "")
            )
            raised = isinstance(node, ast.Raise) and node.exc is not None
            if raised or named in ("fail", "print_error", "reject"):
                parts = [n for n in ast.walk(node) if isinstance(n, ast.Constant)]
                words = " ".join(p.value for p in parts if isinstance(p.value, str))
                yield path.relative_to(LIB).as_posix(), node.lineno, words


def test_no_message_advises_python_where_a_command_is_given():
    import re

    advice = re.compile(
        r"`\w+_\w+`|\bcall \w+|\w{3,}\(\)|\bcx\.|\w=(?:True|False|None)\b|\w='\w+'|or None\b"
    )
    found = [m for m in messages() if advice.search(m[2]) and m[0] not in FOR_PYTHON]
    assert not found, found


@pytest.mark.parametrize(
    "words,message",
    [
        (["store", "gc"], "store: nothing is selected; give --days, --max-bytes, or both"),
        (["generate", "x", "--prompt", ""], "--prompt: is empty; give some text, or leave it out"),
        (
            ["tokenizer", "train", "--data", "sample", "--kind", "sp-bpe", "--vocab-size", "270"],
            "vocab_size: 270 does not suit this text: its characters alone need",
        ),
        (["generate", "x", "--prompt", "-"], "standard input: byte 0xe9 at offset 3 is not UTF-8"),
        (["tokenizer", "encode", "x"], "standard input: byte 0xe9 at offset 3 is not UTF-8"),
    ],
)
def test_advice_names_what_the_command_line_has(tmp_path, monkeypatch, words, message):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    code, _, err = call(words, b"caf\xe9\n")
    assert code == 1 and err.startswith(f"codex-nb: {message}"), err
    assert "character_coverage" not in err


def test_a_vocabulary_that_is_too_large_is_said_without_options_that_do_not_exist():
    from codex_nb.data.tokenizer_training import _why_not_trained

    told = "] Vocabulary size too high (20000). Please set it to a value <= 1100."
    words = "it has too few different pieces; give at most 1,100, or more text"
    assert _why_not_trained(told) == words
    assert _why_not_trained("x] no reason.") == "no reason; give another size, or more text"
