"""Bad input: one clear error, the right exit code, nothing left behind. And papermill by hand."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import (
    BIN,
    PROVE,
    ROOT,
    codex,
    command,
    counts,
    environment,
    files_below,
    flags,
    program,
    run_record,
    start,
    train_steps,
    wait_until,
)

from codex_nb.tracking.figures import four_digits

SMALL = dict(
    steps=3,
    width=32,
    seq_len=32,
    batch_size=2,
    eval_documents=1,
    max_documents=4,
    max_new_tokens=4,
    resamples=100,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    "Data that nothing can be made of."
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
        "there is no such file or folder; give a path, or one of chat, markov, preferences",
    ),
    "empty folder": ("data {}/empty", "no text in this folder: it is empty"),
    "picture": ("data {}/picture.png", "this looks like a picture, which holds no text"),
    "bad line": ("data {}/bad.jsonl", "bad.jsonl:2: "),
    "too short to divide": ("data {}/short.txt", "too little text: the validation split is empty"),
    "too short for a row": (
        "data {}/shortish.txt -p seq_len 512",
        "tokens cannot fill a row of 512: give more text or a smaller seq_len",
    ),
    "seq_len": ("seq_len 0", "codex-nb: seq_len: given 0; must be int, >= 2"),
    "preset": ("preset tinny", "there is no preset 'tinny'; did you mean tiny?"),
    "device": ("device cuda:9", "device: 'cuda:9' cannot be used"),
    "wrong type": ("steps many", "codex-nb: steps: given 'many'; must be int, >= 1"),
    "two limits": ("epochs 1 -p steps 1", "epochs were both given"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name, inputs, tmp_path):
    given, expected = BAD[name]
    done = codex("run", "train", "-p", *given.format(inputs).split(), home=tmp_path)
    assert done.returncode == 1 and expected in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()
    kept = files_below(tmp_path)
    if name == "too short for a row":  # its corpus and tokenizer are complete
        kept = [p for p in kept if not p.startswith("store/")]
    assert kept == []


@pytest.mark.parametrize(
    "given,expected", [("epohcs 3", "did you mean epochs?"), ("seq_len 0", "must be int, >= 2")]
)
def test_papermill_stops_on_a_bad_parameter(given, expected, tmp_path):
    words = ["nbs/train.ipynb", tmp_path / "out.ipynb", "-p", *given.split()]
    done = command("papermill", *words, home=tmp_path / "home")
    assert done.returncode != 0 and expected in done.stderr
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "where,notebook",
    [(ROOT / "nbs", "train.ipynb")] + ([(ROOT, "nbs/train.ipynb")] if PROVE else []),
)
def test_papermill_by_hand(where, notebook, tmp_path):
    "`-p epochs 3` is three passes; without an output path the notebook goes to standard output."
    output = [tmp_path / "out.ipynb"] if where == ROOT else []
    words = "-p epochs 3 -p width 32 -p batch_size 64 -p eval_every 500 -p max_documents 4".split()
    done = command("papermill", notebook, *output, *words, home=tmp_path, cwd=where)
    assert done.returncode == 0, done.stderr[-2000:]
    executed = json.loads(output[0].read_text() if output else done.stdout)
    assert any("# Parameters" in "".join(c["source"]) for c in executed["cells"])
    (folder,) = (tmp_path / "runs").iterdir()
    fit = run_record(folder)["config"]["fit"]
    assert fit["epochs"] == 3 and fit["steps"] is None
    state = json.loads(next((folder / "checkpoints").glob("*/state.json")).read_text())
    (tokens,) = (tmp_path / "store" / "tokens").glob("*/manifest.json")
    rows = json.loads(tokens.read_text())["meta"]["tokens"] // 64
    progress = state["progress"]
    assert progress["position"] == 3 * rows and progress["step"] == -(-3 * rows // 64)
    verified = codex("verify", folder.name[-4:], home=tmp_path)
    assert verified.returncode == 0 and "L0 holds: finished" in verified.stdout
    assert "parent corpus: ok" in verified.stdout


def test_finished_run_is_kept_listed_evaluated_and_verified(tmp_path):
    folder = tmp_path / "runs" / "mine"
    words = ["run", "train", *flags(SMALL), "--folder", folder]
    done = codex(*words, home=tmp_path, CODEX_NB_PROGRESS="")
    assert done.returncode == 0, done.stderr
    assert f"finished: {folder}" in done.stdout and (folder / "train.ipynb").is_file()
    assert done.stdout.endswith("\nnext: codex-nb report mine\n      codex-nb generate mine\n")
    before = files_below(folder)
    again = codex(*words, home=tmp_path)
    assert again.returncode == 1 and "this run is already finished" in again.stderr
    assert files_below(folder) == before
    listed = codex("runs", home=tmp_path)
    assert "finished" in listed.stdout and "mine" in listed.stdout
    summary = json.loads((folder / "evaluations" / "validation" / "summary.json").read_text())
    result = summary["metrics"]["bits_per_byte"]["value"]
    # The executed notebook opens with the result, which its last step wrote there.
    top = next(
        c for c in json.loads((folder / "train.ipynb").read_text())["cells"] if c.get("outputs")
    )
    assert f"{result:.4g} bits per byte, 95 % interval" in "".join(
        top["outputs"][0]["data"]["text/html"]
    )
    assert "mine" in "".join(top["outputs"][0]["data"]["text/plain"])
    for shown in (done.stdout, listed.stdout):  # the sealed evaluation, and it says so
        assert f"validation: {four_digits(result)} bits per byte" in shown
    (run,) = json.loads(codex("runs", "--json", home=tmp_path).stdout)
    assert run["evaluations"]["validation"]["bits_per_byte"] == result
    assert run["during_training"]["validation.bits_per_byte"] != result  # of fewer documents
    given = dict(checkpoint="mine", max_documents=3, resamples=100, max_new_tokens=4)
    judged = codex("run", "evaluate", *flags(given), home=tmp_path)
    assert judged.returncode == 0, judged.stderr
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    changed = codex("verify", "mine", home=tmp_path)
    assert changed.returncode == 1 and "config.json" in changed.stdout
    assert "L0 does not hold" in changed.stdout


def test_verify_reports_both_levels_where_the_settings_cannot_be_read(tmp_path):
    "As after an edit, or from a version that has other settings."
    folder = tmp_path / "runs" / "mine"
    done = codex("run", "train", *flags(SMALL), "--folder", folder, "--quiet", home=tmp_path)
    assert done.returncode == 0, done.stderr
    record = run_record(folder)
    record["config"]["fit"]["stepz"] = 3
    (folder / "config.json").write_text(json.dumps(record))
    text = codex("verify", "mine", home=tmp_path)
    assert text.returncode == 1 and not text.stderr, text.stderr
    assert "config.json: " in text.stdout and "L0 does not hold" in text.stdout
    assert text.stdout.splitlines()[-1].startswith("L1 does not hold: ")
    assert "stepz" in text.stdout
    found = json.loads(codex("verify", "mine", "--json", home=tmp_path).stdout)
    assert not found["ok"] and found["L1"]["holds"] is False


def test_run_that_fails_is_sealed_with_what_it_had(tmp_path):
    done = program("launch_spoiled.py", tmp_path, home=tmp_path)
    first, error = done.stdout.splitlines()[-2:]
    code, status, folder = first.split()
    assert (code, status) == ("3", "failed"), done.stdout + done.stderr
    assert "NonFiniteError: step 3: loss nan" in error and "samples" in error
    folder = Path(folder)
    assert (folder / "train.ipynb").is_file()
    records = (folder / "metrics.ndjson").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == [0, 1, 2]
    meta = json.loads((folder / "manifest.json").read_text())["meta"]
    assert meta["status"] == "failed" and "NonFiniteError" in meta["error"]
    assert "L0 holds: failed" in codex("verify", folder, home=tmp_path).stdout


def kill_those_of(folder):
    "End the kernel of a run whose launcher was killed."
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"CODEX_NB_RUN={folder}".encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def test_killed_run_is_interrupted_and_resumes_to_its_end(tmp_path):
    from codex_nb.run.run_folder import run_status

    folder = tmp_path / "runs" / "killed"
    settings = SMALL | dict(steps=200, save_every=20, eval_every=500)
    words = ["run", "train", *flags(settings), "--folder", folder]
    p = start("codex-nb", *words, home=tmp_path, session=True)
    wait_until(lambda: p.poll() is not None or list(folder.glob("checkpoints/step-*")))
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    kill_those_of(folder)
    time.sleep(0.5)
    assert run_status(folder) == "interrupted"
    assert "interrupted" in codex("runs", home=tmp_path).stdout
    last = max(int(p.name[5:]) for p in folder.glob("checkpoints/step-*"))
    again = codex("resume", "killed", home=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"resuming from step-{last:08}" in again.stdout and f"finished: {folder}" in again.stdout
    assert train_steps(folder) == list(range(1, 201))
    assert "L0 holds: finished" in codex("verify", "killed", home=tmp_path).stdout


@pytest.mark.skipif(not PROVE, reason="three runs; that of a prepared run, below")
def test_relative_paths_are_meant_from_where_the_run_was_started(tmp_path):
    "Resumed and replayed from another folder."
    home = tmp_path / "home"
    elsewhere = home / "else" / "where"  # from here, ../texts is nothing
    for folder in (home / "texts", home / "work", elsewhere):
        folder.mkdir(parents=True)
    shutil.copyfile(ROOT / "data" / "sample.jsonl", home / "texts" / "tales.jsonl")
    settings = SMALL | dict(data="../texts", steps=150, save_every=20, eval_every=500)
    words = ["run", "train", *flags(settings), "--folder", "../runs/one"]
    p = start("codex-nb", *words, home=home, cwd=home / "work", fresh=PROVE)
    wait_until(lambda: p.poll() is not None or list(home.glob("runs/one/checkpoints/step-*")))
    p.send_signal(signal.SIGTERM)
    p.communicate(timeout=60)
    assert p.returncode == 143
    assert run_record(home / "runs" / "one")["launch_dir"] == "../../work"
    again = codex("resume", "one", home=home, cwd=elsewhere)
    assert again.returncode == 0 and "resuming" in again.stdout, again.stderr[-1500:]
    words = ["replay", "one", "--steps", "5", "--quiet"]
    replayed = codex(*words, home=home, cwd=elsewhere)
    assert replayed.returncode == 0 and "proven: L2" in replayed.stdout, replayed.stdout[-1500:]
    # given away, it names no folder that is not there
    away = tmp_path / "away" / "deep" / "one"
    shutil.copytree(home / "runs" / "one", away)
    words = ["replay", away, "--steps", "5", "--quiet"]
    refused = codex(*words, home=tmp_path / "away", cwd=tmp_path / "away")
    assert refused.returncode == 1 and "-p data PATH" in refused.stderr, refused.stderr[-1500:]


def test_prepared_run_keeps_the_folder_it_was_prepared_in(tmp_path):
    """Prepared in one folder and trained from another, by hand.

    Relative paths are meant from the first; and its first start is no continuation.
    """
    elsewhere = tmp_path / "else" / "where"  # from here, ../texts is nothing
    for there in (tmp_path / "texts", tmp_path / "work", elsewhere):
        there.mkdir(parents=True)
    shutil.copyfile(ROOT / "data" / "sample.jsonl", tmp_path / "texts" / "tales.jsonl")
    folder, given = tmp_path / "runs" / "one", flags(SMALL | dict(data="../texts"))
    here = dict(home=tmp_path, cwd=tmp_path / "work")
    prepared = codex("prepare", folder, *given, **here)
    assert prepared.returncode == 0, prepared.stderr
    assert run_record(folder)["launch_dir"] == "../../work"
    words = ["-m", "codex_nb.run.recipe", folder / "config.json"]
    done = command("python", *words, home=tmp_path, cwd=elsewhere)
    assert done.returncode == 0, done.stderr[-1500:]
    assert "writing to" in done.stdout and "resuming" not in done.stdout
    assert run_record(folder)["launch_dir"] == "../../work"
    assert "L1 holds" in codex("verify", "one", home=tmp_path).stdout


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="no mount namespace allowed here",
)
def test_full_disk_stops_with_74(tmp_path):
    small_disk = 'mount -t tmpfs -o size=6m tmpfs /mnt && exec "$@"'
    settings = dict(steps=60, width=256, heads=4, save_every=10, eval_every=100)
    words = ["unshare", "--mount", "sh", "-c", small_disk, "sh", str(BIN / "codex-nb")]
    done = subprocess.run(
        [*words, "run", "train", *flags(settings)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment("/mnt"),
    )
    assert done.returncode == 74, (done.returncode, done.stderr[-1500:])
    assert "no space left on device" in done.stderr and "bytes free" in done.stderr
    assert "Traceback" not in done.stderr


def test_kernel_that_ignores_interrupts_is_ended(tmp_path):
    done = program("launch_deaf.py", tmp_path, home=tmp_path)
    last = done.stdout.splitlines()[-1:]
    assert last == ["130 interrupted interrupted by SIGINT"], done.stdout + done.stderr


def test_refused_resume_leaves_the_run_interrupted(tmp_path):
    "Its data is gone for a day, as from a disk that is not mounted: nothing ran, nothing changes."
    (tmp_path / "texts").mkdir()
    texts, folder = tmp_path / "texts" / "tales.jsonl", tmp_path / "runs" / "one"
    shutil.copyfile(ROOT / "data" / "sample.jsonl", texts)
    prepared = codex("prepare", folder, *flags(SMALL | dict(data=str(texts))), home=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    before = (folder / "config.json").read_bytes()
    texts.rename(tmp_path / "elsewhere.jsonl")
    refused = codex("resume", "one", home=tmp_path)
    assert refused.returncode == 1 and "no such file" in refused.stderr, refused.stderr
    assert "the run is interrupted" in refused.stderr
    assert "go on with: codex-nb resume /" in refused.stderr
    assert (
        files_below(folder) == ["config.json"] and (folder / "config.json").read_bytes() == before
    )
    (tmp_path / "elsewhere.jsonl").rename(texts)
    resumed = codex("resume", "one", home=tmp_path)
    assert resumed.returncode == 0 and f"finished: {folder}" in resumed.stdout, resumed.stderr


def test_run_of_another_process_is_left_to_it(tmp_path, monkeypatch):
    "Whether it is seen to be running before a kernel starts, or only by the notebook."
    import nbformat

    from codex_nb.core.config import Config
    from codex_nb.experiments import launch
    from codex_nb.run.run_folder import Run, run_status

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    folder = tmp_path / "runs" / "one"
    running = Run.start("train", Config(), folder=folder)
    before = {n: (folder / n).read_bytes() for n in files_below(folder)}
    refused = codex("run", "train", "--folder", folder, home=tmp_path)
    assert refused.returncode == 1 and "already running" in refused.stderr, refused.stderr

    start = (
        "from codex_nb.core.config import Config\n"
        "from codex_nb.run.run_folder import Run\n"
        "Run.start('train', Config())"
    )
    cells = [nbformat.v4.new_code_cell("preset = 'smoke'", metadata={"tags": ["parameters"]})]
    notebook = nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_code_cell(start)])
    nbformat.write(notebook, tmp_path / "train.ipynb")
    with monkeypatch.context() as m:  # two launchers that looked at the same moment
        m.setattr(launch, "run_status", lambda folder: "interrupted")
        outcome = launch.launch(str(tmp_path / "train.ipynb"), {}, folder)
    assert outcome.code == 1 and "in use by process" in outcome.error
    assert run_status(folder) == "running"
    running.lock.release()
    assert run_status(folder) == "interrupted"
    assert {n: (folder / n).read_bytes() for n in files_below(folder)} == before


def test_hostile_parameters_are_refused_or_taken_literally(tmp_path, monkeypatch):
    "Names, values and paths made to be executed or to lie outside."
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
        max_examples=counts(100, 1000),
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
