"""The one-file verifier decides as the package does, on intact runs and on damaged ones."""

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest
import test_attest
import test_forgery
from forger import MANIFEST, reseal
from helpers import codex

from codex_nb.core.artifacts import json_text, read_manifest, sha256_file
from codex_nb.core.config import digest_of
from codex_nb.deploy.verifier import NOT_CHECKED, verifier_source, write_verifier
from codex_nb.experiments.attest import printable, sign
from codex_nb.experiments.verify import verify_run
from codex_nb.run.run_folder import verify_files

two_executions, twin = test_forgery.two_executions, test_forgery.twin
keys, signers = test_attest.keys, test_attest.signers


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("verifier") / "verify.py"
    write_verifier(path)
    return path


@pytest.fixture
def home(twin, tmp_path):
    "A workspace with a run in it, and what the run was made from."
    shutil.copytree(twin.parent.parent / "store", tmp_path / "home" / "store")
    shutil.copytree(twin.parent / "claimed", tmp_path / "home" / "runs" / "claimed")
    return tmp_path / "home"


@pytest.fixture
def run(home, monkeypatch):
    monkeypatch.setenv("CODEX_NB_HOME", str(home))
    return home / "runs" / "claimed"


@pytest.fixture
def verify(program, tmp_path):
    "Run the file with Python alone: nothing installed, no environment, an empty folder."
    empty = tmp_path / "empty"
    empty.mkdir()

    def call(*words):
        command = [sys.executable, "-I", "-S", program, *words]
        done = subprocess.run(
            command, cwd=empty, env={}, capture_output=True, text=True, timeout=60
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout.splitlines()

    return call


def wrong(lines):
    return [line.removeprefix("wrong: ") for line in lines if line.startswith("wrong: ")]


def test_it_is_short_needs_only_python_and_loads_no_torch(program):
    text = program.read_text()
    assert len(text.splitlines()) < 300
    imports = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in imports if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in imports if isinstance(n, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names | {"__future__"}
    loaded = "import sys; from codex_nb.deploy.verifier import verifier_source as v; v();"
    loaded += " print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_intact_run_holds(run, verify):
    code, lines = verify(run)
    assert (code, wrong(lines)) == (0, []) and verify_run(run)["ok"]
    states = {line.split()[1].rstrip(":"): line for line in lines if line.startswith("parent ")}
    assert states.keys() == verify_files(run)["parents"].keys()
    assert all(": ok, " in line for line in states.values())
    assert f"digest {read_manifest(run).digest}" in lines[-3]
    assert lines[-2:] == ["not checked: 0 signatures (give --signers FILE)", NOT_CHECKED]


def test_absent_parents_are_said_to_be_absent(run, verify, tmp_path):
    alone = shutil.copytree(run, tmp_path / "elsewhere" / "alone")
    code, lines = verify(alone)
    states = [line for line in lines if line.startswith("parent ")]
    assert code == 0 and len(states) >= 3
    assert all(": absent, not checked (" in line for line in states)


FIRST = "checkpoints/step-00000004"


def edit(path, change):
    body = json.loads(path.read_bytes())
    change(body)
    path.write_text(json_text(body))


def edit_and_check(path, change):
    "Change a manifest and make it consistent with itself, whatever it holds then."

    def all_of_it(body):
        change(body)
        body.pop("check")
        named = {k: body[k] for k in ("kind", "config", "parents", "files")}
        body["digest"] = digest_of(named)
        body["check"] = digest_of(body)

    edit(path, all_of_it)


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(path):
    path.rename(path.with_name(".hidden"))
    path.symlink_to(path.with_name(".hidden"))


def folder_instead(path):
    path.unlink()
    path.mkdir()


def another_checkpoint(run):
    "A checkpoint in the place of another, with its own manifest, of which the run knows nothing."
    shutil.rmtree(run / FIRST)
    shutil.copytree(run / "checkpoints" / "step-00000008", run / FIRST)
    edit_and_check(
        run / MANIFEST,
        lambda m: m["attachments"].update(
            {
                f"{FIRST}/{name}": m["attachments"][f"checkpoints/step-00000008/{name}"]
                for name in os.listdir(run / FIRST)
            }
        ),
    )


def listed_pipe(run):
    "A pipe that is listed as an empty file: whoever reads it waits for ever."
    pipe(run / "pipe")
    empty = {
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "size": 0,
    }
    edit_and_check(run / MANIFEST, lambda m: m["attachments"].update(pipe=empty))


def parent_damage(run):
    path = next((run.parent.parent / "store" / "tokens").glob(f"*/{MANIFEST}")).parent
    test_attest.flip(max(path.iterdir(), key=lambda p: p.stat().st_size))


def states(change):
    "The chain of states with every hash of it made right, but the one in the run's digest."

    def damage(run):
        path = run / "states.ndjson"
        path.write_text(change(path.read_text()))
        record = {"sha256": sha256_file(path), "size": path.stat().st_size}
        edit_and_check(run / MANIFEST, lambda m: m["attachments"].update({path.name: record}))

    return damage


DAMAGES = {
    "another state": states(lambda text: text.replace('"digest": "', '"digest": "ab', 1)),
    "a state more": states(lambda text: '{"step": 1, "digest": "ab"}\n' + text),
    "no states": states(lambda text: ""),
    "words as states": states(lambda text: "[" * 100_000),
    "a byte": lambda run: test_attest.flip(run / "metrics.ndjson"),
    "a byte of the weights": lambda run: test_attest.flip(run / FIRST / "model.safetensors"),
    "cut": lambda run: os.truncate(run / "metrics.ndjson", 10),
    "missing": lambda run: (run / "config.json").unlink(),
    "missing part": lambda run: shutil.rmtree(run / FIRST),
    "added": lambda run: (run / "figures.html").write_text("better"),
    "a name of two lines": lambda run: (run / "x\nfiles: as they were sealed").touch(),
    "added to a part": lambda run: (run / FIRST / "more.bin").write_text("better"),
    "a link": lambda run: link(run / "metrics.ndjson"),
    "a linked manifest": lambda run: link(run / MANIFEST),
    "a pipe": lambda run: pipe(run / "metrics.ndjson"),
    "a listed pipe": listed_pipe,
    "a pipe as manifest": lambda run: pipe(run / MANIFEST),
    "a pipe as manifest of a part": lambda run: pipe(run / FIRST / MANIFEST),
    "a folder": lambda run: folder_instead(run / "metrics.ndjson"),
    "a folder as manifest": lambda run: folder_instead(run / MANIFEST),
    "no manifest": lambda run: (run / MANIFEST).unlink(),
    "cut manifest": lambda run: os.truncate(run / MANIFEST, 1000),
    "bytes as manifest": lambda run: (run / MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "deep manifest": lambda run: (run / MANIFEST).write_text("[" * 200_000),
    "list as manifest": lambda run: (run / MANIFEST).write_text("[]"),
    "edited manifest": lambda run: edit(run / MANIFEST, lambda m: m["meta"].update(steps=9)),
    "not a number": lambda run: (run / MANIFEST).write_text('{"schema": 1, "check": NaN}'),
    "newer schema": lambda run: edit(run / MANIFEST, lambda m: m.update(schema=99)),
    "text as schema": lambda run: edit(run / MANIFEST, lambda m: m.update(schema="1")),
    "no size": lambda run: edit_and_check(
        run / MANIFEST, lambda m: m["attachments"]["config.json"].pop("size")
    ),
    "number as record": lambda run: edit_and_check(
        run / MANIFEST, lambda m: m["attachments"].update({"config.json": 5})
    ),
    "list as files": lambda run: edit_and_check(run / MANIFEST, lambda m: m.update(files=[])),
    "list as parents": lambda run: edit_and_check(run / MANIFEST, lambda m: m.update(parents=[])),
    "number as parent": lambda run: edit_and_check(
        run / MANIFEST, lambda m: m["parents"].update(corpus=5)
    ),
    "text as meta": lambda run: edit_and_check(run / MANIFEST, lambda m: m.update(meta="x")),
    "edited digest": lambda run: edit(run / MANIFEST, lambda m: m.update(digest="0" * 64)),
    "another digest of a part": lambda run: edit_and_check(
        run / MANIFEST, lambda m: m["parents"].update({FIRST: "0" * 64})
    ),
    "another checkpoint": another_checkpoint,
    "damaged parent": parent_damage,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_as_by_the_package(damage, run, verify):
    DAMAGES[damage](run)
    code, lines = verify(run)
    by_files, by_package = verify_files(run), verify_run(run)
    assert code == 1 and not by_package["ok"]
    found = wrong(lines)
    assert found and all(line.isprintable() for line in lines)
    # Word for word, where the files alone show it
    told = set(map(printable, by_files["problems"])) if damage != "damaged parent" else set()
    assert told <= set(found)
    assert len(found) == len(set(found))
    assert len([line for line in lines if line.startswith("files: not as ")]) == 1
    assert not [line for line in lines if line.startswith("files: as ")]


def test_an_intact_run_after_resealing_is_intact(run, verify):
    (run / "figures.html").write_text("added, and sealed again")
    reseal(run)
    code, lines = verify(run)
    assert (code, wrong(lines)) == (0, []) and verify_files(run)["ok"]


@test_attest.pytestmark
def test_signatures_are_checked_by_ssh_keygen(run, verify, keys, signers):
    assert verify(run, "--signers", signers)[0] == 1
    sign(run, keys["maker"])
    code, lines = verify(run, "--signers", signers)
    assert (code, wrong(lines)) == (0, [])
    assert lines[-2].startswith("signature of the maker maker@example.org, ")
    assert verify(run)[1][-2].startswith("not checked: 1 signatures")
    fake = "x\nsignature of the maker maker@example.org\x1b[1A"
    (run / fake).write_text("")
    code, lines = verify(run, "--signers", signers)
    assert code == 1 and "not signed: x\\nsignature of the maker" in lines[-2]
    (run / fake).unlink()
    test_attest.resign(run, keys["stranger"])
    code, lines = verify(run, "--signers", signers)
    assert code == 1 and "key not among the signers" in lines[-2]
    code, lines = verify(run, "--signers", "nowhere")
    assert code == 1 and "no such file of signers" in lines[-2]


def test_a_wrong_call_is_2(verify, run):
    assert verify("nowhere")[0] == 2
    assert verify()[0] == 2
    assert verify(run, "--level", "L3")[0] == 2
    assert verify(run / "config.json")[0] == 2


def test_the_command_writes_it(tmp_path, program):
    printed = codex("verifier", home=tmp_path)
    assert (printed.returncode, printed.stdout) == (0, program.read_text())
    assert printed.stdout == verifier_source()
    made = codex("verifier", tmp_path / "verify.py", home=tmp_path)
    assert made.returncode == 0
    assert (tmp_path / "verify.py").read_text() == printed.stdout


def test_other_versions_of_python_read_it(program):
    ast.parse(program.read_text(), feature_version=(3, 9))
    found = [shutil.which(f"python3.{n}") for n in (9, 10, 12, 13, 14)]
    for python in filter(None, found):
        done = subprocess.run([python, "-I", "-S", program, "nowhere"], capture_output=True)
        assert done.returncode in (2, 127), done.stderr  # 127: a shim without that version
