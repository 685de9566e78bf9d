"""What tests share: commands in processes, small settings, and how to read what a run has left."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import warm
from filelock import FileLock

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
NBS, LIB = ROOT / "nbs", ROOT / "codex_nb"
PROGRAMS = TESTS / "programs"
BIN = Path(sys.executable).parent
PROVE = bool(os.environ.get("PROVE"))


def counts(small, full):
    "How often: `full` in `make prove`."
    return full if PROVE else small


def environment(home, **more):
    "The environment of a command, with the workspace `home`."
    return os.environ | {"CODEX_NB_HOME": str(home), "OMP_NUM_THREADS": "1"} | more


def command(*words, home, cwd=ROOT, fresh=PROVE, input=None, **env):
    """Run a command of this environment to its end.

    It is forked from a process that has imported the large libraries. With `fresh`, in
    `make prove`, and where `PYTHONPATH` is given, it is a real one.
    """
    argv, env = [BIN / words[0], *map(str, words[1:])], environment(home, **env)
    if fresh or env.get("PYTHONPATH") != os.environ.get("PYTHONPATH"):
        return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, env=env, input=input)
    return warm.run(argv, cwd, env, input)


def codex(*words, home, **more):
    "Run `codex-nb WORDS`."
    return command("codex-nb", *words, home=home, **more)


def program(name, *words, home, **more):
    "Run a program of tests/programs."
    return command("python", PROGRAMS / name, *words, home=home, **more)


def start(*words, home, cwd=ROOT, session=False, fresh=True, **env):
    "Start a process, and return it: a real one, unless `fresh` is false."
    argv, env = [BIN / words[0], *map(str, words[1:])], environment(home, **env)
    if not fresh:
        return Started(argv, cwd, env)
    return subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=env,
        start_new_session=session,
    )


class Started(warm.Warm):
    "A forked process with its outputs."

    def __init__(self, argv, cwd, env):
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]
        super().__init__(argv, cwd, env, None, *self.files)

    def communicate(self, timeout=600):
        self.wait(timeout)
        for f in self.files:
            f.seek(0)
        return tuple(f.read() for f in self.files)


def flags(settings):
    "Settings as words of a command line."
    return [
        word
        for name, value in settings.items()
        for word in ("-p", f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    ]


def wait_until(condition, seconds=120, pause=0.02):
    "Wait for a condition to hold; fail when it never does."
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(pause)
    return found


def read_lines(path):
    "The records of a file of JSON lines; none where there is no file."
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train_records(folder):
    "What a run recorded of its training steps."
    return [r for r in read_lines(folder / "metrics.ndjson") if r["split"] == "train"]


def train_steps(folder):
    return [r["step"] for r in train_records(folder)]


def train_losses(folder):
    "Step -> exact loss."
    return {r["step"]: float.fromhex(r["exact"]["loss"]) for r in train_records(folder)}


def checkpoint_files(folder, step):
    "File of a checkpoint -> its digest."
    manifest = folder / "checkpoints" / f"step-{step:08}" / "manifest.json"
    return {name: f["sha256"] for name, f in json.loads(manifest.read_text())["files"].items()}


def run_record(folder):
    "A run's `config.json`."
    return json.loads((folder / "config.json").read_text())


def files_below(folder):
    "Every file that is not hidden."
    return sorted(
        p.relative_to(folder).as_posix()
        for p in Path(folder).rglob("*")
        if p.is_file() and not p.name.startswith(".")
    )


def free_port():
    "A port of the loopback interface that is free at this moment."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def shared_folder(tmp_path_factory, name, make):
    "A folder that is made once for all workers of pytest-xdist; not to be written to."
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def trained_runs(tmp_path_factory, name, settings):
    "A workspace with a run of the preset `smoke` for each name; made once, not to be written to."

    def make(home):
        from codex_nb.run.judging import train_and_judge
        from codex_nb.run.settings import RunConfig

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CODEX_NB_HOME", str(home))
            for run, given in settings.items():
                train_and_judge(RunConfig.from_preset("smoke", **given), home / "runs" / run)

    return shared_folder(tmp_path_factory, name, make)


def write_tokenizer(folder, texts, special, bos="", opens=False, template="", vocab_size=400):
    """A byte-level tokenizer, trained on a few texts; its number of ids.

    `special[0]` is the end of text; with `opens`, `bos` is put in front of every text."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    level = pre_tokenizers.ByteLevel
    fast = Fast(models.BPE())
    fast.pre_tokenizer, fast.decoder = level(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(level.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator([*texts] * 20, trainer)
    if opens:
        ids = [(bos, fast.token_to_id(bos))]
        fast.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0]}
    config |= {"bos_token": bos} if bos else {}
    config |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return fast.get_vocab_size()


def write_model(folder, kind="llama", sharper=1, **shape):
    "A model of random weights, larger than fresh ones by a factor."
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from codex_nb.model.causal_lm import hide_progress_bars

    with torch.random.fork_rng(), hide_progress_bars():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(sharper)
        model.save_pretrained(folder)
