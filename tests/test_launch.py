"""Bad input: one clear error, the right exit code, nothing left behind. And what papermill does by hand."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SMALL = "-p steps 3 -p width 32 -p seq_len 32 -p batch_size 2 -p eval_documents 1 -p max_documents 4 -p max_new_tokens 4 -p resamples 100".split()


def run(*words, home, cwd=ROOT, **env):
    return subprocess.run(
        [BIN / words[0], *words[1:]],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"CODEX_NB_HOME": str(home)} | env,
    )


def left(home):
    return sorted(
        p.relative_to(home).as_posix()
        for p in Path(home).rglob("*")
        if p.is_file() and not p.name.startswith(".")
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    d = tmp_path_factory.mktemp("inputs")
    (d / "empty").mkdir()
    (d / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00")
    (d / "short.txt").write_text("too short\nfor a row\n")
    (d / "shortish.txt").write_text("".join(f"line {i}\n" for i in range(60)))
    (d / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "misspelt"}\n')
    return d


BAD = {
    "unknown parameter": ("epohcs 3", "epohcs: unknown parameter, given 3; did you mean epochs?"),
    "missing path": (
        "data {}/nowhere",
        "there is no such file or folder; give a path, or one of chat, markov, sample, stdlib",
    ),
    "empty folder": ("data {}/empty", "no text in this folder: it is empty"),
    "binary file": ("data {}/picture.png", "this is a binary file, not text"),
    "bad line": ("data {}/bad.jsonl", "bad.jsonl:2: "),
    "too short to divide": ("data {}/short.txt", "too little text: the validation split is empty"),
    "too short for a row": (
        "data {}/shortish.txt -p seq_len 512",
        "tokens cannot fill a row of 512: give more text or a smaller seq_len",
    ),
    "seq_len": ("seq_len 0", "model.seq_len: given 0; must be int, >= 2"),
    "preset": ("preset tinny", "there is no preset 'tinny'; did you mean tiny?"),
    "device": ("device cuda:9", "device: 'cuda:9' cannot be used"),
    "wrong type": ("steps many", "fit.steps: given 'many'; must be int, >= 1"),
    "two limits": ("epochs 1 -p steps 1", "epochs were both given"),
}


@pytest.mark.parametrize("name", BAD if os.environ.get("PROVE") else list(BAD)[::3])
def test_bad_input_is_one_clear_error(name, inputs, tmp_path):
    given, expected = BAD[name]
    done = run("codex-nb", "run", "train", "-p", *given.format(inputs).split(), home=tmp_path)
    assert done.returncode == 1 and expected in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )
    kept = [
        p for p in left(tmp_path) if not (name == "too short for a row" and p.startswith("store/"))
    ]  # a corpus that is whole is no half-written thing
    assert kept == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "given,expected", [("epohcs 3", "did you mean epochs?"), ("seq_len 0", "must be int, >= 2")]
)
def test_papermill_stops_on_a_bad_parameter(given, expected, tmp_path):
    done = run(
        "papermill",
        "nbs/train.ipynb",
        str(tmp_path / "out.ipynb"),
        "-p",
        *given.split(),
        home=tmp_path / "home",
    )
    assert done.returncode != 0 and expected in done.stderr and not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "where,notebook",
    [(ROOT / "nbs", "train.ipynb")]
    + ([(ROOT, "nbs/train.ipynb")] if os.environ.get("PROVE") else []),
)
def test_papermill_by_hand(where, notebook, tmp_path):
    "`-p epochs 3` is three passes; without an output path the executed notebook goes to standard output."
    out = [str(tmp_path / "out.ipynb")] if where == ROOT else []
    done = run(
        "papermill",
        notebook,
        *out,
        "-p",
        "epochs",
        "3",
        *SMALL[3:6],
        "-p",
        "batch_size",
        "64",
        "-p",
        "eval_every",
        "500",
        "-p",
        "max_documents",
        "4",
        home=tmp_path,
        cwd=where,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    executed = json.loads(Path(out[0]).read_text() if out else done.stdout)
    assert any("# Parameters" in "".join(c["source"]) for c in executed["cells"])
    (folder,) = (tmp_path / "runs").iterdir()
    said = json.loads((folder / "config.json").read_text())
    assert said["config"]["fit"]["epochs"] == 3 and said["config"]["fit"]["steps"] is None
    state = json.loads(next((folder / "checkpoints").glob("*/state.json")).read_text())["progress"]
    tokens = json.loads(next((tmp_path / "store" / "tokens").glob("*/manifest.json")).read_text())[
        "meta"
    ]["tokens"]
    assert state["position"] == 3 * (tokens // 64) and state["step"] == -(-3 * (tokens // 64) // 64)
    verified = run("codex-nb", "verify", folder.name[-4:], home=tmp_path)
    assert (
        verified.returncode == 0
        and "L0 holds: finished" in verified.stdout
        and "parent corpus: ok" in verified.stdout
    )


def test_run_then_the_same_folder_again(tmp_path):
    folder = tmp_path / "runs" / "mine"
    done = run("codex-nb", "run", "train", *SMALL, "--folder", str(folder), home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"finished: {folder}" in done.stdout and (folder / "train.ipynb").is_file()
    before = left(folder)
    again = run("codex-nb", "run", "train", *SMALL, "--folder", str(folder), home=tmp_path)
    assert (
        again.returncode == 1
        and "this run is already finished" in again.stderr
        and left(folder) == before
    )
    listed = run("codex-nb", "runs", home=tmp_path)
    assert "finished" in listed.stdout and "mine" in listed.stdout
    judged = run(
        "codex-nb",
        "run",
        "evaluate",
        "-p",
        "checkpoint",
        "mine",
        "-p",
        "max_documents",
        "3",
        "-p",
        "resamples",
        "100",
        "-p",
        "max_new_tokens",
        "4",
        home=tmp_path,
    )
    assert judged.returncode == 0, judged.stderr
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    changed = run("codex-nb", "verify", "mine", home=tmp_path)
    assert (
        changed.returncode == 1
        and "config.json" in changed.stdout
        and "L0 does not hold" in changed.stdout
    )


def test_a_run_that_fails_leaves_what_it_had(tmp_path):
    code = textwrap.dedent("""
        import sys, codex_nb.run.recipe as r
        from pathlib import Path
        from codex_nb.experiments.launch import launch
        nb = Path("nbs/train.ipynb").read_text().replace("state = cx.train_model(run, corpus, tokenizer, dataset, model)",
            "import torch\\\\nfrom codex_nb.train.engine import Hook\\\\ndef spoil(s):\\\\n    if s.step == 2: next(s.model.parameters()).data.fill_(float('inf'))\\\\nstate = cx.train_model(run, corpus, tokenizer, dataset, model, hooks=(Hook(spoil),))")
        p = Path(sys.argv[1])/"train.ipynb"; p.write_text(nb)
        o = launch(str(p), {"steps": 5, "width": 32, "seq_len": 32, "batch_size": 2, "max_new_tokens": 4})
        print(o.code, o.status, o.folder); print(o.error)
    """)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CODEX_NB_HOME": str(tmp_path)},
    )
    first, error = done.stdout.splitlines()[-2:]
    code, status, folder = first.split()
    assert (
        (code, status) == ("3", "failed")
        and "NonFiniteError: step 3: loss nan" in error
        and "samples" in error
    ), done.stdout + done.stderr
    folder = Path(folder)
    assert (folder / "train.ipynb").is_file() and [
        json.loads(l)["step"] for l in (folder / "metrics.ndjson").read_text().splitlines()
    ] == [0, 1, 2]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["meta"]["status"] == "failed" and "NonFiniteError" in manifest["meta"]["error"]
    assert "L0 holds: failed" in run("codex-nb", "verify", str(folder), home=tmp_path).stdout


def test_killed_run_is_interrupted_and_resumes(tmp_path):
    folder = tmp_path / "runs" / "killed"
    p = subprocess.Popen(
        [
            BIN / "codex-nb",
            "run",
            "train",
            *SMALL[3:],
            "-p",
            "steps",
            "200",
            "-p",
            "save_every",
            "20",
            "-p",
            "eval_every",
            "500",
            "--folder",
            str(folder),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=os.environ | {"CODEX_NB_HOME": str(tmp_path)},
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while time.monotonic() < end and not list(folder.glob("checkpoints/step-*")):
        time.sleep(0.2)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    from codex_nb.run.run_folder import run_status

    for proc in Path("/proc").glob("[0-9]*"):  # the kernel outlives its launcher: it is killed too
        try:
            if f"CODEX_NB_RUN={folder}".encode() in (proc / "environ").read_bytes():
                os.kill(int(proc.name), signal.SIGKILL)
        except OSError:
            continue
    time.sleep(0.5)
    assert run_status(folder) == "interrupted"
    assert "interrupted" in run("codex-nb", "runs", home=tmp_path).stdout
    last = max(int(p.name[5:]) for p in folder.glob("checkpoints/step-*"))
    again = run("codex-nb", "resume", "killed", home=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"going on from step-{last:08}" in again.stdout and f"finished: {folder}" in again.stdout
    assert [
        json.loads(l)["step"]
        for l in (folder / "metrics.ndjson").read_text().splitlines()
        if '"train"' in l
    ] == list(range(1, 201))
    assert "L0 holds: finished" in run("codex-nb", "verify", "killed", home=tmp_path).stdout


def test_paths_are_meant_from_where_it_was_started(tmp_path):
    "Continued and executed again by somebody who stands elsewhere."
    home = tmp_path / "home"
    for name in ("texts", "work", "elsewhere"):
        (home / name).mkdir(parents=True)
    (home / "texts" / "tales.jsonl").write_bytes((ROOT / "data" / "sample.jsonl").read_bytes())
    here = [
        "-p",
        "data",
        "../texts",
        *SMALL[3:],
        "-p",
        "steps",
        "150",
        "-p",
        "save_every",
        "20",
        "-p",
        "eval_every",
        "500",
        "--folder",
        "../runs/one",
    ]
    p = subprocess.Popen(
        [BIN / "codex-nb", "run", "train", *here],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=home / "work",
        env=os.environ | {"CODEX_NB_HOME": str(home)},
    )
    end = time.monotonic() + 120
    while time.monotonic() < end and not list(home.glob("runs/one/checkpoints/step-*")):
        time.sleep(0.05)
    p.send_signal(signal.SIGTERM)
    assert p.wait(timeout=60) == 143
    assert (
        json.loads((home / "runs" / "one" / "config.json").read_text())["started_in"]
        == "../../work"
    )
    again = run("codex-nb", "resume", "one", home=home, cwd=home / "elsewhere")
    assert again.returncode == 0 and "continuing" in again.stdout, again.stderr[-1500:]
    replayed = run(
        "codex-nb", "replay", "one", "--steps", "5", "--quiet", home=home, cwd=home / "elsewhere"
    )
    assert replayed.returncode == 0 and "proven: L2" in replayed.stdout, (
        replayed.stdout[-1500:] + replayed.stderr[-1500:]
    )
    # given away, it names no folder that is not there
    away = tmp_path / "away" / "deep" / "one"
    shutil.copytree(home / "runs" / "one", away)
    given = run(
        "codex-nb",
        "replay",
        str(away),
        "--steps",
        "5",
        "--quiet",
        home=tmp_path / "away",
        cwd=tmp_path / "away",
    )
    assert (
        given.returncode == 1 and "or say with -p data PATH where it lies here" in given.stderr
    ), given.stderr[-1500:]


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="no mount namespace allowed here",
)
def test_full_disk_stops_with_74(tmp_path):
    words = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=6m tmpfs /mnt && exec "$@"',
        "sh",
        str(BIN / "codex-nb"),
        "run",
        "train",
        "-p",
        "steps",
        "60",
        "-p",
        "width",
        "256",
        "-p",
        "heads",
        "4",
        "-p",
        "save_every",
        "10",
        "-p",
        "eval_every",
        "100",
    ]
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"CODEX_NB_HOME": "/mnt"}
    )
    assert (
        done.returncode == 74
        and "no space left on device" in done.stderr
        and "bytes free" in done.stderr
        and "Traceback" not in done.stderr
    ), (done.returncode, done.stderr[-1500:])


def test_a_kernel_that_lost_its_cell_is_ended(tmp_path):
    code = textwrap.dedent("""
        import sys, nbformat as nf, codex_nb.experiments.launch as l
        cells = ["preset = 'smoke'", "from codex_nb.run.run_folder import Run\\nfrom codex_nb.run.settings import RunConfig\\nrun = Run.start('train', RunConfig.from_notebook(globals()))", "import signal, time\\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\\n(run.folder/'.deaf').touch()\\ntime.sleep(1000)"]
        nb = nf.v4.new_notebook(cells=[nf.v4.new_code_cell(c, metadata={"tags": ["parameters"]} if not i else {}) for i, c in enumerate(cells)])
        nf.write(nb, sys.argv[1]+"/train.ipynb")
        l.IDLE = 2
        o = l.launch(sys.argv[1]+"/train.ipynb", {}, sys.argv[1]+"/run", enough=(l.Path(sys.argv[1])/"run"/".deaf").exists)
        print(o.code, o.status, o.error)
    """).replace("\\\\n", "\\n")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env=os.environ | {"CODEX_NB_HOME": str(tmp_path)},
    )
    assert done.stdout.splitlines()[-1:] == ["130 interrupted interrupted by SIGINT"], (
        done.stdout + done.stderr
    )


def test_hostile_parameters(tmp_path, monkeypatch):
    "Names, values and paths made to be executed or to lie outside: each is refused, or is the plain value it is."
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from codex_nb.core.config import Config, ConfigError
    from codex_nb.experiments.launch import check_parameters, find_notebook
    from codex_nb.run.settings import KINDS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "home"))
    evil = "__import__('pathlib').Path('executed').touch()"
    pieces = [
        evil,
        f"x={evil}; y",
        f"lr\n{evil}",
        "lr = 1 #",
        "class",
        "lambda",
        "__builtins__",
        "__class__",
        "lr.real",
        "ｌｒ",
        "lr\u200b",
        "In",
        "preset",
        "_preset",
        "exec",
        "%%bash",
        "!touch executed",
        "../../executed",
        "/etc/passwd",
        "~",
        "$(touch executed)",
        "`touch executed`",
        "{{7*7}}",
        f"{{{evil}}}",
        "\x00",
        "\ud800",
    ]
    names = st.one_of(
        st.sampled_from(
            [*pieces, "lr", "data", "targets", "mixture", "checkpoint", "threads", "steps"]
        ),
        st.text(max_size=20),
        st.sampled_from(pieces).flatmap(lambda a: st.text(max_size=5).map(lambda b: a + b)),
    )

    class Odd:
        def __repr__(self):
            Path("executed").touch()
            return "1"

    plain = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=30),
        st.sampled_from(pieces),
        st.binary(max_size=5),
        st.just((1, 2)),
        st.just({1}),
        st.builds(Odd),
        st.just(Path("/x")),
    )
    values = st.recursive(
        plain,
        lambda v: st.one_of(
            st.lists(v, max_size=3),
            st.dictionaries(st.one_of(st.sampled_from(pieces), st.text(max_size=8)), v, max_size=3),
        ),
        max_leaves=6,
    )
    seen = {"refused": 0, "taken": 0}

    @settings(
        max_examples=1000 if os.environ.get("PROVE") else 100,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(list(KINDS)), names, values)
    def attack(kind, name, value):
        try:
            cfg = check_parameters(KINDS[kind], {name: value})
        except ConfigError:
            seen["refused"] += 1
        else:
            assert isinstance(cfg, Config)
            json.dumps(value)
            seen["taken"] += 1
        try:
            assert str(find_notebook(name)).endswith(".ipynb")
        except ConfigError:
            pass

    attack()
    print(seen)
    assert seen["refused"] > 50 and not list(tmp_path.iterdir())
