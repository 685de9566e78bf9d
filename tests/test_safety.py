"""Secrets planted in every place a run writes to are gone from disk and terminal.

And what comes from strangers is read, never executed.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import nbformat
import pytest
import torch
from helpers import ROOT, codex, flags, program
from safetensors.torch import save_file

from codex_nb.core.artifacts import ArtifactError
from codex_nb.core.config import ConfigError
from codex_nb.data.corpus import CorpusConfig, open_corpus
from codex_nb.data.documents import ReadError
from codex_nb.experiments.launch import check_parameters
from codex_nb.model.model_registry import find_model, import_model, load_model, verify_model
from codex_nb.run.settings import RunConfig
from codex_nb.tracking.metrics_log import MetricsWriter, write_sample
from codex_nb.tracking.sinks import RunInfo, Sinks
from codex_nb.train.checkpoint import CheckpointError

HORSE = "correct-horse-battery"
WORD = "Zk8Qv3Xn7Rt2Wb5Yd9Lc4Mf6Hg1Jp0Ts"


# a run as small as it can be
SMALL = dict(steps=3, width=32, seq_len=32, batch_size=2, eval_documents=1)
SMALL |= dict(max_documents=4, max_new_tokens=4, resamples=100)


def planted(i):
    """Kind -> a text that holds a secret, and the part that may not survive.

    They are put together here, so that this file holds none.
    """
    w = f"{i:02}{WORD}{WORD}"
    return {
        "github": ("gh" + "p_" + w[:36],) * 2,
        "aws id": ("AK" + "IA" + w[:16].upper(),) * 2,
        "google": ("AI" + "za" + w[:35],) * 2,
        "anthropic": ("sk-" + "ant-" + w[:40],) * 2,
        "openai": ("s" + "k-" + w[:40],) * 2,
        "hugging face": ("h" + "f_" + w[:34],) * 2,
        "slack": ("xo" + "xb-" + w[:30],) * 2,
        "stripe": ("sk" + "_live_" + w[:24],) * 2,
        "npm": ("np" + "m_" + w[:36],) * 2,
        "gitlab": ("gl" + "pat-" + w[:20],) * 2,
        "pypi": ("py" + "pi-" + w[:60],) * 2,
        "jwt": ("ey" + "J" + w[:20] + "." + w[:30] + "." + w[:30],) * 2,
        "bearer": ("Authorization: Bear" + f"er {w[:32]}", w[:32]),
        "url": ("postgres://me:" + w[:12] + "@db.example/x", w[:12]),
        "password": ("pass" + f"word = '{w[:14]}'", w[:14]),
        "private key": (
            "-----BEGIN " + "PRIVATE KEY-----\n" + w[:60] + "\n-----END " + "PRIVATE KEY-----",
            w[:60],
        ),
        "aws secret": ("aws_sec" + f"ret_access_key = {(w + w)[:40]}", (w + w)[:40]),
        "thrown by dice": ("CLIENT_SEC" + f"RET={w[:28]}", w[:28]),
        "environment": (f"it is {os.environ.get('PLANTED_PASSWORD', HORSE)}", HORSE),
        "named key": ("api_key" + f': "{w[:18]}"', w[:18]),
    }


KINDS = list(planted(0))


def left_over(text, i):
    return [k for k, (_, secret) in planted(i).items() if secret in text]


def everything(folder):
    return "\n".join(
        p.read_bytes().decode("utf-8", "replace")
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    )


def test_twenty_kinds_are_planted():
    assert (
        len(KINDS) == 20 and sum(len(left_over(text, 0)) for text, _ in planted(0).values()) >= 20
    )


def test_no_secret_of_a_notebook_is_left_in_its_run_or_on_the_terminal(tmp_path):
    "They are in its cells, outputs and metadata, and in the error that it ends with."
    nb = nbformat.read(ROOT / "nbs" / "train.ipynb", 4)
    said = "\n".join(t for t, _ in planted(1).values())
    source = f"secrets = {[t for t, _ in planted(2).values()]!r}"
    source += "\nfor s in secrets: print(s)\nsecrets[-1]"
    nb.cells.append(nbformat.v4.new_code_cell(source))
    nb.cells.append(nbformat.v4.new_markdown_cell(said))
    nb.cells.append(nbformat.v4.new_code_cell("raise RuntimeError('\\n'.join(secrets))"))
    nb.metadata["notes"] = [t for t, _ in planted(3).values()]
    nb.cells[-1].metadata["notes"] = {"nested": [t for t, _ in planted(3).values()]}
    nb.cells[-2].source += "\n" + "\n".join(t for t, _ in planted(4).values())
    # the run still goes on when the error comes
    nb.cells = [c for c in nb.cells if "finish(run)" not in c.source]
    (tmp_path / "mine").mkdir()
    nbformat.write(nb, tmp_path / "mine" / "train.ipynb")
    folder, words = tmp_path / "runs" / "r", ["run", tmp_path / "mine" / "train.ipynb"]
    words += [*flags(SMALL), "--folder", folder]
    done = codex(*words, home=tmp_path, PLANTED_PASSWORD=HORSE)
    assert done.returncode == 1, done.stderr
    assert json.loads((folder / "manifest.json").read_text())["meta"]["status"] == "failed"
    kept = everything(tmp_path / "runs")
    assert kept.count("[redacted ") > 100 and "RuntimeError" in kept  # they were there
    for i in (1, 2, 3, 4):
        assert not left_over(kept, i), i
    for i in (1, 2, 3, 4):  # what was echoed while it ran, and the error
        assert not left_over(done.stdout + done.stderr, i), i


def test_secrets_as_parameters_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_PASSWORD", HORSE)
    for kind, (text, secret) in planted(5).items():
        with pytest.raises(ConfigError) as e:
            check_parameters(RunConfig, {"data": text})
        assert "environment variable" in str(e.value) and secret not in str(e.value), kind
    text, secret = planted(6)["github"]
    done = codex("run", "train", "-p", "data", text, home=tmp_path)
    assert done.returncode == 1 and secret not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mlflow", "tensorboard", "wandb", "csv"])
def test_no_secret_reaches_a_sink(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_PASSWORD", HORSE)
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    w = MetricsWriter(folder / "metrics.ndjson")
    for i, (text, _) in enumerate(planted(7).values()):
        # MLflow has rules for the names of metrics
        w.write(i, {"loss": 1.0} | ({text: 2.0} if name != "mlflow" else {}))
        write_sample(folder / "samples.ndjson", i, text)
    w.close()
    sinks = Sinks(
        RunInfo(
            folder,
            {f"p{i}": t for i, (t, _) in enumerate(planted(7).values())},
            {f"t{i}": t for i, (t, _) in enumerate(planted(7).values())},
        ),
        [name],
    )
    broken = sinks.finish("FINISHED", [folder / "samples.ndjson"])
    assert not broken
    assert len(everything(tmp_path)) > 3000 and not left_over(everything(tmp_path), 7)


def command(monkeypatch, capsys, *words, stdin=""):  # in this process, which is quicker
    from codex_nb.cli.main import main

    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    with contextlib.suppress(SystemExit):
        main([*words])
    said = capsys.readouterr()
    return said.out + said.err


MARK = "executed"


class Evil:
    def __init__(self, where):
        self.where = str(where)

    def __reduce__(self):
        return Path.write_text, (Path(self.where), MARK)


def pickled(f, mark):
    (f / "model.safetensors").unlink()
    (f / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))


def disguised(f, mark):
    (f / "model.safetensors").write_bytes(pickle.dumps(Evil(mark)))


def torch_zip(f, mark):
    torch.save(Evil(mark), f / "model.safetensors")


def beside(f, mark):
    (f / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    (f / "training_args.bin").write_bytes(pickle.dumps(Evil(mark)))
    (f / "optimizer.pt").write_bytes(pickle.dumps(Evil(mark)))


def auto_map(f, mark):
    (f / "modeling_evil.py").write_text(
        f"from pathlib import Path\n"
        f"Path({str(mark)!r}).write_text({MARK!r})\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig): pass\n"
        "class M(LlamaForCausalLM): pass\n"
    )
    config = json.loads((f / "config.json").read_text())
    (f / "config.json").write_text(
        json.dumps(
            config
            | {
                "model_type": "evil",
                "auto_map": {
                    "AutoConfig": "modeling_evil.C",
                    "AutoModelForCausalLM": "modeling_evil.M",
                },
            }
        )
    )


def auto_map_known(f, mark):
    auto_map(f, mark)
    (f / "config.json").write_text(
        (f / "config.json").read_text().replace('"model_type": "evil"', '"model_type": "llama"')
    )


def auto_tokenizer(f, mark):
    (f / "tokenization_evil.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).write_text({MARK!r})\n"
    )
    (f / "tokenizer_config.json").write_text(
        json.dumps(
            json.loads((f / "tokenizer_config.json").read_text())
            | {
                "tokenizer_class": "Evil",
                "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
            }
        )
    )


def index_outside(f, mark):
    shutil.move(f / "model.safetensors", f.parent / "outside.safetensors")
    save_file({"x": torch.zeros(1)}, f / "other.safetensors")
    (f / "model.safetensors.index.json").write_text(
        json.dumps(
            {
                "metadata": {},
                "weight_map": {
                    "model.embed_tokens.weight": "../outside.safetensors",
                    "lm_head.weight": "/etc/passwd",
                },
            }
        )
    )


def template(f, mark):
    subclasses = "().__class__.__base__.__subclasses__()"
    opened = f"x.__init__.__globals__['__builtins__']['open']('{mark}', 'w')"
    (f / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        f"{{% for x in {subclasses} %}}{{{{ {opened}.write('{MARK}') }}}}{{% endfor %}}"
    )


def link_outside(f, mark):
    (f / "model.safetensors").rename(f.parent / "w.safetensors")
    (f / "model.safetensors").symlink_to(f.parent / "w.safetensors")
    (f / "special_tokens_map.json").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    "make",
    [
        pickled,
        disguised,
        torch_zip,
        beside,
        auto_map,
        auto_map_known,
        auto_tokenizer,
        index_outside,
        template,
        link_outside,
    ],
    ids=lambda m: m.__name__,
)
def test_model_of_a_stranger_executes_nothing(make, small_model, tmp_path, monkeypatch, capsys):
    "Opened, imported, verified, used; and nothing outside its folder is read or written."
    mark, folder = tmp_path / "mark", tmp_path / "in" / "m"
    shutil.copytree(small_model, folder)
    make(folder, mark)
    monkeypatch.setenv("CODEX_NB_MODELS", str(tmp_path / "models"))
    for what in (
        lambda: load_model(find_model(str(folder))),
        lambda: import_model(folder),
        lambda: verify_model(folder),
    ):
        try:
            what()
        except (ArtifactError, ConfigError, OSError, ValueError, KeyError, RuntimeError):
            continue  # refused is fine; `mark` is what counts
    for words in (
        ["generate", str(folder), "-p", "max_new_tokens=2", "--device", "cpu"],
        ["chat", str(folder), "-p", "max_new_tokens=2", "--device", "cpu"],
    ):
        said = command(monkeypatch, capsys, *words, stdin="Who is there?\n")
        assert not mark.exists() and "Traceback" not in said and "root:" not in said, said
    said = everything(tmp_path / "models") if (tmp_path / "models").exists() else ""
    assert "root:x" not in said


def test_pickles_in_a_checkpoint_are_not_opened(tmp_path, small_model):
    "Files that other tools would open: a sharded checkpoint's metadata, an optimizer."
    from codex_nb.core.artifacts import seal

    mark, folder = tmp_path / "mark", tmp_path / "step-00000001"
    shutil.copytree(small_model, folder)
    for n in (".metadata", "optimizer.pt", "__0_0.distcp", "rng.pkl"):
        (folder / n).write_bytes(pickle.dumps(Evil(mark)))
    (folder / "state.json").write_bytes(pickle.dumps(Evil(mark)))
    from codex_nb.train.checkpoint import ResumeMetadata, load_checkpoint
    from codex_nb.train.optim import OptimConfig, make_optimizer

    m = load_model(small_model).train()
    for sealed in (False, True):
        if sealed:
            seal(folder, "checkpoint", {}, {}, {})
        with pytest.raises((ArtifactError, CheckpointError, ValueError)):
            load_checkpoint(
                folder, m, make_optimizer(m, OptimConfig()), ResumeMetadata({}, {}, {}, {}, {})
            )
    assert not mark.exists()


def archive(path, names):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as z:
            for n in names:
                z.writestr(n, "x")
    else:
        with tarfile.open(path, "w:gz") as t:
            for n in names:
                i = tarfile.TarInfo(n)
                i.size = 1
                t.addfile(i, io.BytesIO(b"x"))
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            t.addfile(link)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.txt.zip"])
def test_archives_are_not_unpacked(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    folder = tmp_path / "data"
    folder.mkdir()
    archive(folder / name, ["../../outside.txt", "/tmp/outside-codex-nb.txt", "inside.txt"])
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"text {i}")
    for data in (folder / name, folder):
        try:
            corpus = open_corpus(CorpusConfig(data=str(data)))
        except ReadError:
            continue
        assert len(corpus) == 60  # the others alone
    assert (
        not (tmp_path / "outside.txt").exists()
        and not Path("/tmp/outside-codex-nb.txt").exists()
        and sorted(p.name for p in tmp_path.iterdir()) in (["data"], ["data", "home"])
    )


def test_decompression_bomb_does_not_fill_the_memory(tmp_path):
    "A gigabyte of one letter in a megabyte, in one line: refused by its length, in little memory."
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", compresslevel=9) as f:
        f.write(b'{"text": "')
        for _ in range(1024):
            f.write(b"a" * (1 << 20))
        f.write(b'"}\n')
    done = program("read_bomb.py", tmp_path / "bomb.jsonl.gz", home=tmp_path, fresh=True)
    said, grown = done.stdout.strip().splitlines()
    assert "longer than" in said or "MiB" in said, done.stdout + done.stderr
    assert int(grown) < 200, grown


def test_run_folder_of_a_stranger_executes_nothing(tmp_path, monkeypatch, capsys):
    "Its notebook is a program, its names point outside, its records are none."
    mark, folder = tmp_path / "mark", tmp_path / "runs" / "theirs"
    words = ["run", "train", *flags(SMALL), "--folder", folder, "--quiet"]
    done = codex(*words, home=tmp_path)
    assert done.returncode == 0, done.stderr
    nb = nbformat.read(folder / "train.ipynb", 4)
    nb.cells.insert(
        0,
        nbformat.v4.new_code_cell(
            f"from pathlib import Path\nPath({str(mark)!r}).write_text({MARK!r})"
        ),
    )
    nb.metadata["kernelspec"] = {
        "name": f"; touch {mark}",
        "display_name": "x",
        "language": "python",
    }
    nbformat.write(nb, folder / "train.ipynb")
    said = json.loads((folder / "manifest.json").read_text())
    said["files"]["../../outside.txt"] = {"bytes": 1, "sha256": "0" * 64}
    (tmp_path / "outside.txt").write_text("x")
    (folder / "samples.ndjson").write_text('{"step": 1, "text": "<script>alert(1)</script>"}\n')
    (folder / "manifest.json").write_text(json.dumps(said))
    (folder / "weights.pt").write_bytes(pickle.dumps(Evil(mark)))
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    for words in (
        ["verify", "theirs"],
        ["runs"],
        ["diff", "theirs", "theirs", "--html", str(tmp_path / "page.html")],
        ["export", "theirs", "--to", "csv"],
        ["generate", "theirs", "-p", "max_new_tokens=2"],
        ["leaderboard", "theirs"],
        ["replay", "theirs", "--steps", "1", "--quiet"],
    ):
        said = command(monkeypatch, capsys, *words)
        assert "Traceback" not in said and not mark.exists(), (words, said)
    assert "L0 does not hold" in command(monkeypatch, capsys, "verify", "theirs")
    page = tmp_path / "page.html"
    assert not page.exists() or "<script>" not in page.read_text()
    assert (tmp_path / "outside.txt").read_text() == "x"
