"""Give every command and every reader damaged input, in this process; print what is no clean end.

Words: the folder made by `make_material`, a folder to work in, `commands` or `readers`, the first
case, one past the last, and the seconds that a case may take. Prints one JSON object.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import traceback
import warnings
import zipfile
from pathlib import Path

PACKAGE = "codex_nb"


# --- what is damaged, and how


def make_material(folder, runs, model):
    "Valid inputs of each kind, from folders with runs and a model that are in order."
    import msgspec
    import pyarrow as pa
    import pyarrow.parquet as pq
    import sentencepiece
    from backports import zstd

    from codex_nb.run.run_record import RunRecord
    from codex_nb.run.settings import KINDS

    home = folder / "home"
    shutil.copytree(runs, home, symlinks=True)
    trained = next((home / "runs").glob("*trained"))
    trained.rename(home / "runs" / "trained")
    for end in ("tuned", "judged", "asked"):
        next((home / "runs").glob(f"*{end}")).rename(home / "runs" / end)
    for end in ("failed", "interrupted"):
        next((home / "stopped").glob(f"*{end}")).rename(home / "runs" / end)
    (home / "stopped").rmdir()
    sweep = home / "runs" / "swept"
    sweep.mkdir()
    cfg = KINDS["sweep"].check("empty", of="train", grid={"lr": [0.1, 0.2]}, metric="loss")
    RunRecord.of("sweep", cfg, sweep).save(sweep)
    shutil.copytree(home / "runs" / "trained", home / "runs" / "swept-trial-0")
    shutil.copytree(model, folder / "model")
    data = folder / "data"
    data.mkdir()
    rows = [{"text": f"Text {i} of bees and locks. " * 5, "group": f"g{i}"} for i in range(40)]
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    (data / "rows.jsonl").write_bytes(lines)
    (data / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    (data / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    (data / "rows.jsonl.zst").write_bytes(zstd.compress(lines))
    (data / "rows.csv").write_text(
        "text,id\n" + "".join(f"{r['text']},{r['group']}\n" for r in rows)
    )
    (data / "words.txt").write_text("\n".join(r["text"] for r in rows))
    table = pa.table({k: [r[k] for r in rows] for k in rows[0]})
    pq.write_table(table, data / "rows.parquet")
    saved = data / "saved"
    saved.mkdir()
    with pa.ipc.new_stream(str(saved / "data-0.arrow"), table.schema) as f:
        f.write_table(table)
    (saved / "dataset_info.json").write_text("{}")
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    questions = [
        {"prompt": "Two and two?", "answers": ["four"]},
        {"prompt": "The sky is", "choices": ["blue", "green"], "answer": 0},
        {"messages": talk[:1], "answers": ["Yes"]},
    ]
    (data / "questions.jsonl").write_bytes(
        b"".join(msgspec.json.encode(q) + b"\n" for q in questions)
    )
    (data / "policy.yaml").write_text(
        'schema: 1\nrules:\n- kind: codename\n  pattern: "Project [A-Z]\\\\w+"\n  action: redact\n'
        "  matches: [Project Bee]\n  passes: [project]\n- kind: email\n  action: drop\n"
    )
    (data / "settings.yaml").write_text("steps: 3\nlr: 0.1\n")
    (data / "report.json").write_text(
        json.dumps(
            {
                "subject": "0" * 64,
                "number": 1,
                "sealed": "",
                "drawn": [{"of": "training", "start": 0, "stop": 3, "step": 1}],
                "findings": [
                    {
                        "segment": {"of": "training", "start": 0, "stop": 3, "step": 1},
                        "holds": True,
                        "detail": "",
                    }
                ],
            }
        )
    )
    (data / "evidence.json").write_text('{"results": {}, "machine": "", "created": ""}')
    package = Path(sys.modules[PACKAGE].__file__).parent
    shutil.copyfile(package / "notebooks" / "train.ipynb", data / "train.ipynb")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([r["text"] for r in rows]),
        model_prefix=str(data / "pieces"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (data / "pieces.vocab").unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", data / "key"], check=True)
    (data / "signers").write_text(f"me {(data / 'key.pub').read_text()}")


HUGE = ("9" * 5000, "1e999", "-1", "18446744073709551616", "NaN", "0", "1e400", "-Infinity", "1.5")
OTHER = (None, True, -1, 0, 1.5, 10**30, "", "x", "\ud800", [], {}, [[]], {"a": None}, ["x"] * 3)


def leaves(value, path=()):
    "The path of every value inside nested JSON."
    if not isinstance(value, (dict, list)):
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        yield from leaves(item, (*path, key))


def change_json(rng, data):
    "Another value, or none, somewhere in a JSON file, or in one of its lines."
    lines = [data] if data.count(b"\n}") or data.count(b"\n") < 2 else data.splitlines()
    i = rng.randrange(len(lines))
    try:
        value = json.loads(lines[i])
        *path, last = rng.choice([*leaves(value)])
    except (ValueError, IndexError, RecursionError):
        return flip(rng, data)
    inside = value
    for key in path:
        inside = inside[key]
    if rng.random() < 0.3:
        del inside[last]
    else:
        inside[last] = rng.choice(OTHER)
    lines[i] = json.dumps(value).encode()
    return b"\n".join(lines) + b"\n"


def flip(rng, data):
    out = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 3, 30))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def number(rng, data):
    "A number that is too large, not whole or none."
    found = [*re.finditer(rb"-?\d+(?:\.\d+)?", data[:200_000])]
    if not found:
        return flip(rng, data)
    m = rng.choice(found)
    return data[: m.start()] + rng.choice(HUGE).encode() + data[m.end() :]


def archive(rng, data):
    "The file packed, under the name it had."
    packed = io.BytesIO()
    if rng.random() < 0.5:
        with zipfile.ZipFile(packed, "w") as z:
            z.writestr("inside", data)
    else:
        with tarfile.open(fileobj=packed, mode="w") as t:
            info = tarfile.TarInfo("inside")
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return packed.getvalue()


BYTES = {
    "flipped": flip,
    "another value": change_json,
    "another value again": change_json,
    "another number": number,
    "cut": lambda rng, data: data[: rng.randrange(len(data) + 1)],
    "empty": lambda rng, data: b"",
    "Latin-1": lambda rng, data: data.replace(b"e", b"\xe9"),
    "one byte more": lambda rng, data: (
        lambda i: data[:i] + bytes([rng.randrange(256)]) + data[i:]
    )(rng.randrange(len(data) + 1)),
    "zeros": lambda rng, data: bytes(len(data)),
    "noise": lambda rng, data: rng.randbytes(min(len(data), 5000)),
    "UTF-16": lambda rng, data: data.decode("latin-1").encode("utf-16"),
    "twice": lambda rng, data: data + data,
    "lists": lambda rng, data: b"[" * 100_000,
    "objects": lambda rng, data: b'{"a":' * 100_000,
    "closed lists": lambda rng, data: b"[" * 50_000 + b"]" * 50_000,
    "a list": lambda rng, data: b"[]",
    "null": lambda rng, data: b"null",
    "a number": lambda rng, data: b"9" * 6000,
    "a word": lambda rng, data: b"- word: [\n",
    "gzip": lambda rng, data: gzip.compress(data),
    "xz": lambda rng, data: lzma.compress(data),
    "bzip2": lambda rng, data: bz2.compress(data),
    "packed": archive,
}


def damage(rng, path):
    "Damage a file in place; say how."
    place = rng.random()
    if place < 0.88:
        name = rng.choice([*BYTES])
        data = BYTES[name](rng, path.read_bytes())
        path.unlink()  # it may be linked from elsewhere
        path.write_bytes(data)
        return name
    path.unlink()
    if place < 0.91:
        path.mkdir()
        return "a folder"
    if place < 0.93:
        path.symlink_to(path.name)
        return "a link to itself"
    if place < 0.95:
        path.symlink_to("/nowhere")
        return "a dead link"
    return "missing"


def damaged(rng, source, to, reseal=True):
    "A copy of a file or folder with one file damaged; what was done."
    if source.is_file():
        shutil.copyfile(source, to)
        return f"{to.name}: {damage(rng, to)}"
    shutil.copytree(source, to, symlinks=True, copy_function=os.link)
    files = [p for p in sorted(to.rglob("*")) if p.is_file() and not p.is_symlink()]
    # manifests are many, and refuse what was changed: others shall be met as often
    few = [
        p for p in files if p.suffix in (".json", ".ndjson", ".jinja") and p.name != "manifest.json"
    ]
    path = rng.choice(few if few and rng.random() < 0.6 else files)
    how = f"{path.relative_to(to)}: {damage(rng, path)}"
    if reseal and rng.random() < 0.4 and (to / "manifest.json").is_file():
        from forger import reseal as seal_again

        with contextlib.suppress(Exception):  # as far as it can be read
            seal_again(to)
            how += ", sealed again"
    return how


# --- the words of a command line

STRINGS = [
    *("", " ", "-", "x", "é", "\udcff", "a\nb", "-1", "1e400", "NaN", "null", "[]", "{}", "true"),
    *("[" * 3000, '{"a":', "9" * 5000, "a" * 300, "a" * 5000, "/", "/dev/null", "..", "~nobody/x"),
    *("%s{}", "a=b", "x:y:z", "a,b", "*", "(", "\\", "/proc/1/mem", "hf://x", "0x10", "'", '"x'),
]
NUMBERS = ["0", "-1", "1", "2", "7", "1e3", "nan", "inf", "x", "", "9" * 400, "1.5", "0.1", "-0"]
RUN_KINDS = ("trained", "trained", "tuned", "judged", "asked", "failed", "interrupted", "swept")
# Options that only cost time, here
PASSED_OVER = {"thorough", "help", "install_completion", "show_completion", "host"}


class Words:
    "Draws a command line for every command there is."

    def __init__(self, rng, material, work):
        self.rng, self.material, self.work, self.notes, self.n = rng, material, work, [], 0

    def copy(self, source, suffix=""):
        self.n += 1
        to = self.work / f"{self.n}-{source.name}"
        if self.rng.random() < 0.1:
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, to)
        else:
            self.notes.append(damaged(self.rng, source, to))
        return str(to)

    def run(self):
        return self.copy(self.material / "home" / "runs" / self.rng.choice(RUN_KINDS))

    def model(self):
        if self.rng.random() < 0.5:
            return self.run()
        return self.copy(self.material / "model")

    def file(self):
        return self.copy(self.rng.choice(sorted((self.material / "data").iterdir())))

    def tokenizer(self):
        pieces = self.material / "data" / "pieces.model"
        return self.copy(self.rng.choice((pieces, self.material / "model")))

    def text(self):
        return self.rng.choice(STRINGS)

    def setting(self, names):
        r = self.rng
        name = r.choice(names) if r.random() < 0.95 else self.text()
        value = r.choice((self.text, self.text, self.number, self.file, self.model))()
        return f"{name}={value}"

    def number(self):
        return self.rng.choice(NUMBERS)

    def likely(self, command, name):
        "What a parameter of this name takes, damaged."
        named = {
            "run": self.model if command in ("generate", "chat", "serve") else self.run,
            "runs": self.run,
            "evaluation": self.run,
            "replayed": self.run,
            "folder": self.model if command == "models import" else self.text,
            "name": self.tokenizer if command.startswith("tokenizer") else self.model,
            "tokenizer": self.tokenizer,
            "model": self.model,
            "text": self.text,
            "prompt": self.text,
            "kind": lambda: self.rng.choice(("bpe", "sp-unigram", "sp-bpe", "bytes", "chars", "x")),
            "notebook": lambda: self.rng.choice(("train", "finetune", "evaluate", "sweep", "x")),
            "to": lambda: self.rng.choice(("csv", "x", "mlflow", "tensorboard", "", "csv,csv")),
        }
        files = dict(
            key="key", signers="signers", policy="policy.yaml", merge="report.json",
            evidence="evidence.json",
        )  # fmt: skip
        if name in files and self.rng.random() < 0.8:
            return self.copy(self.material / "data" / files[name])
        return named.get(name, self.file)()

    def value(self, command, param, names):
        if param.name == "parameter":
            return self.setting(names)
        if param.bare_type in (int, float):
            return self.number() if self.rng.random() < 0.7 else self.text()
        if self.rng.random() < 0.15:
            return self.text()
        if self.rng.random() < 0.1:
            return self.rng.choice(RUN_KINDS) if self.rng.random() < 0.5 else self.file()
        return self.likely(command, param.name)

    def draw(self, path, command, names):
        "One command line."
        words, r = [*path], self.rng
        for p in command.params:
            if p.name in PASSED_OVER:
                continue
            if p.param_type_name == "argument":
                times = r.choice((1, 1, 1, 2)) if p.nargs == -1 else p.required or r.random() < 0.8
                words += [self.value(" ".join(path), p, names) for _ in range(times)]
                continue
            wanted = p.required or p.name in ("parameter", "policy") or r.random() < 0.2
            if wanted and p.is_flag:
                words.append(r.choice([*p.opts, *p.secondary_opts]))
            elif wanted:
                for _ in range(r.choice((1, 1, 1, 2))):
                    words += [p.opts[-1], self.value(" ".join(path), p, names)]
        if r.random() < 0.05:
            words.insert(r.randrange(len(words) + 1), self.text())
        return words


def commands(group=None, path=()):
    "Every command of the command line: its words, and what click knows of it."
    import typer

    if group is None:
        from codex_nb.cli.main import app

        group = typer.main.get_command(app)
    if not hasattr(group, "commands"):
        yield path, group
        return
    if getattr(group, "invoke_without_command", False):
        yield path, group
    for name, command in sorted(group.commands.items()):
        yield from commands(command, (*path, name))


def settings():
    "The name of every setting."
    from codex_nb.core.config import flat_names
    from codex_nb.run.settings import KINDS

    names = {name for cls in KINDS.values() for name in flat_names(cls)}
    return [
        *sorted(names),
        "preset",
        "data",
        "base",
        "tokenizer_path",
        "task",
        "checkpoint",
        "policy",
    ]


# --- the readers: what a notebook, a worker and a program call


def read_data(path):
    from codex_nb.data.readers import Rejects, read_path

    for on_error in ("quarantine", "stop"):
        for _ in read_path(path, rejects=Rejects(on_error)):
            continue


def read_small(path):
    "What is read as a whole, whatever its name says it is."
    from codex_nb.core.config import load_config
    from codex_nb.core.policy import load_policy
    from codex_nb.deploy.audit import read_evidence
    from codex_nb.eval.tasks import read_questions
    from codex_nb.experiments.segments import read_report
    from codex_nb.experiments.settings_file import read_settings
    from codex_nb.run.settings import RunConfig

    reads = [read_questions, load_policy, read_report, read_evidence]
    yield from (lambda read=read: read(path) for read in reads)
    yield lambda: load_config(RunConfig, path)
    yield lambda: read_settings(path, RunConfig)


def train_on(path):
    "As the notebooks train and finetune."
    from codex_nb.run.preflight import preflight
    from codex_nb.run.settings import FinetuneConfig, RunConfig

    shape = dict(width=16, layers=1, heads=1, seq_len=32, vocab_size=300, steps=2)
    yield lambda: preflight(RunConfig.from_preset("smoke", data=str(path), **shape), timed=False)
    given = dict(shape, data="sample", tokenizer_path=str(path))
    del given["vocab_size"]
    yield lambda: preflight(RunConfig.from_preset("smoke", **given), timed=False)
    given = dict(base=str(path), data="chat", seq_len=32)
    yield lambda: preflight(FinetuneConfig.from_preset("smoke", **given), timed=False)


def use_model(path):
    from codex_nb.data.documents import Message
    from codex_nb.data.tokenizer import Tokenizer, chat_ids
    from codex_nb.eval.eval_config import GenerateConfig
    from codex_nb.eval.generate import generate
    from codex_nb.model.model_registry import check_adapter, load_model

    yield lambda: generate(
        load_model(path), Tokenizer(path, ""), "a", GenerateConfig(max_new_tokens=2)
    )
    yield lambda: chat_ids(Tokenizer(path, ""), [Message("user", "a")])
    yield lambda: check_adapter(path)


def read_run(path):
    from codex_nb.core.artifacts import problems
    from codex_nb.deploy.card import model_card
    from codex_nb.deploy.report import report_page
    from codex_nb.experiments.attest import known_level
    from codex_nb.experiments.launch import recorded_parameters
    from codex_nb.experiments.replay import order_level, training_plan
    from codex_nb.experiments.run_diff import read_contents
    from codex_nb.experiments.segments import segments
    from codex_nb.experiments.verify import verify_run
    from codex_nb.run.judging import find_checkpoint, open_trained
    from codex_nb.run.run_folder import find_run, list_runs
    from codex_nb.run.run_record import RunRecord, load_states
    from codex_nb.tracking.metrics_log import plot_metrics, read_metrics, read_samples
    from codex_nb.tracking.sinks import read_rows
    from codex_nb.tracking.system_monitor import plot_system, read_system
    from codex_nb.train.checkpoint import latest_checkpoint, read_state

    def state():
        found, _ = latest_checkpoint(path / "checkpoints")
        return found and read_state(found.path)

    reads = [problems, known_level, recorded_parameters, order_level, read_contents, segments]
    reads += [verify_run, find_run, load_states, RunRecord.load]
    yield from (lambda read=read: read(path) for read in reads)
    yield lambda: list_runs(path.parent)
    yield lambda: open_trained(find_checkpoint(str(path)))
    yield state
    yield lambda: training_plan(read_contents(path))
    yield lambda: [*read_rows(path)]
    yield lambda: report_page(path)
    yield lambda: model_card(path)
    of_files = {
        "metrics.ndjson": (read_metrics, plot_metrics),
        "samples.ndjson": (read_samples,),
        "system.ndjson": (read_system, plot_system),
    }
    for name, functions in of_files.items():
        for file in path.rglob(name):
            yield from (lambda f=f, file=file: f(file) for f in functions)


READERS = [
    (read_data, "data"),
    (read_small, "data"),
    (train_on, "data"),
    (train_on, "model"),
    (use_model, "model"),
    (read_run, "run"),
    (use_model, "checkpoint"),
]


def is_clear(error):
    "Whether an error was raised by this package in words of its own."
    import linecache

    from codex_nb.core.untrusted import is_own_error

    if is_own_error(error) or (isinstance(error, OSError) and error.filename and error.errno):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    ours = f"{os.sep}{PACKAGE}{os.sep}" in frames[-1].filename
    line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0)
    return isinstance(error, ValueError) and ours and line.strip().startswith("raise ")


def try_reader(rng, material, work):
    "One case: what was called, what was damaged, and the errors that are not clear."
    read, kind = rng.choice(READERS)
    drawn = Words(rng, material, work)
    if kind == "data":
        path = drawn.file()
    elif kind == "checkpoint":
        run = work / "home" / "runs" / rng.choice(("trained", "tuned"))
        path = drawn.copy(sorted((run / "checkpoints").iterdir())[-1])
    else:
        path = drawn.model() if kind == "model" else drawn.run()
    path, unclear = Path(path), []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for call in read(path) if read is not read_data else [lambda: read_data(path)]:
            try:
                call()
            except BaseException as e:
                if isinstance(e, (TooLong, KeyboardInterrupt)):
                    raise
                if not is_clear(e):
                    unclear.append("".join(traceback.format_exception(e)))
    return [read.__name__, str(path)], drawn.notes, (int(bool(unclear)), "", "".join(unclear))


# --- one case


class Out(io.TextIOWrapper):
    def __init__(self, content=b""):
        super().__init__(io.BytesIO(content), "utf-8", errors="strict", write_through=True)

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode("utf-8", "replace")


class TooLong(BaseException):
    pass


def on_alarm(*_):
    raise TooLong


def call(words, given=b""):
    "Run a command in this process: exit code, standard output, standard error."
    from codex_nb.cli.main import main

    streams = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = Out(given), Out(), Out()
    out, err = sys.stdout, sys.stderr
    try:
        main(words)
        code = 0
    except SystemExit as e:
        code = e.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except TooLong:
        raise
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
    return code, out.text(), err.text()


def complaint(code, out, err):
    "What is wrong with how a command ended; empty if nothing."
    if "Traceback (most recent call last)" in out + err:
        return "traceback"
    if not code:
        return ""
    text = (err or out).strip()
    if not text:
        return "no message"
    if err.startswith("Usage:"):
        return ""
    if err and "codex-nb: " not in err:
        return "not ours"
    message = err[err.index("codex-nb: ") + 10 :].strip() if err else out
    several = " settings cannot be used:\n" in message  # a line for each
    if err and len(message.splitlines()) > 3 and not several:
        return f"{len(message.splitlines())} lines"
    if len(message) > (4000 if err else 100_000):
        return f"{len(message)} characters"
    if re.fullmatch(r"\w*(Error|Exception|Panic)\w*:?", message) or "[Errno" in message:
        return "the raw error"
    if err and len(message.split()) < 4:
        return "no sentence"
    return ""


def never(*words, **more):
    from codex_nb.core.config import ConfigError

    raise ConfigError("wheels: nothing is fetched here; give --wheels")


def end_at_once(app, engine, *more):
    engine.close()
    return 0


def forbid_work():
    "No kernel is started here, no wheel is built, and nothing is served: all cost seconds."
    import papermill
    from papermill.iorw import load_notebook_node

    import codex_nb.deploy.bundle as bundle
    import codex_nb.deploy.server as server

    papermill.execute_notebook = lambda path, *more, **given: load_notebook_node(path)
    bundle._pip_wheel = never
    server.run_server = end_at_once


def try_command(rng, material, work):
    "One case: words, what was damaged, and how it ended."
    drawn = Words(rng, material, work)
    path, command = rng.choice(COMMANDS)
    words = drawn.draw(path, command, SETTINGS)
    if rng.random() < 0.15:
        source = material / "home"
        shutil.rmtree(work / "home")
        drawn.notes.append("home: " + damaged(rng, source, work / "home", reseal=False))
    given = rng.choice((b"hi\n\n", b"", b"\xff\xfe\n", b"3 4 x", b"a" * 3000 + b"\n"))
    return words, drawn.notes, call(words, given)


COMMANDS, SETTINGS = [], []


def main(material, work, kind, first, last, seconds):
    COMMANDS[:], SETTINGS[:] = [*commands()], settings()
    forbid_work()
    warnings.simplefilter("ignore")
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, on_alarm)
    attempt = {"commands": try_command, "readers": try_reader}[kind]
    here, count, found = os.getcwd(), 0, []
    for number in range(first, last):
        rng, case = random.Random(number), work / str(number)
        shutil.rmtree(case, ignore_errors=True)
        (case / "here").mkdir(parents=True)
        shutil.copytree(material / "home", case / "home", copy_function=os.link)
        os.environ["CODEX_NB_HOME"] = str(case / "home")
        os.chdir(case / "here")
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of work, on a machine that may be busy
        signal.alarm(20 * seconds)
        words, notes = [], []
        try:
            words, notes, ended = attempt(rng, material, case)
            wrong = complaint(*ended)
        except TooLong:
            wrong, ended = "too long", (None, "", "".join(traceback.format_exc()))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            os.chdir(here)
        count += 1
        if wrong:
            shown = [w if len(w) < 200 else w[:200] + "..." for w in words]
            found.append(
                dict(case=number, wrong=wrong, words=shown, notes=notes, code=ended[0],
                     out=ended[1][-1500:], err=ended[2][-6000:])
            )  # fmt: skip
        shutil.rmtree(case, ignore_errors=True)
    return {"tried": count, "found": found}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    material, work = map(Path, sys.argv[1:3])
    first, last, seconds = map(int, sys.argv[4:])
    print(json.dumps(main(material, work, sys.argv[3], first, last, seconds)))
