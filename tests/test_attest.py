"""Signatures of runs: who signed what, and what is refused, by name."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import test_forgery
from helpers import BIN, PROVE, codex, environment, wait_until

from codex_nb.core.artifacts import ArtifactError, json_text, read_manifest, seal
from codex_nb.experiments.attest import (
    ATTESTATIONS,
    LEVELS,
    NOT_PROVEN,
    VERDICT,
    known_level,
    printable,
    read_signature,
    require_level,
    run_subject,
    sign,
    signatures,
    weakest,
    write_verdict,
)
from codex_nb.experiments.verify import verify_run
from codex_nb.run.run_record import RunError

pytestmark = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed"
)
# a run to change, and an execution of the same settings
two_executions, twin, run = test_forgery.two_executions, test_forgery.twin, test_forgery.run
WHO = ("maker", "auditor", "stranger")


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    "Keys by name, and `locked`, which has a passphrase."
    folder = tmp_path_factory.mktemp("keys")
    for name in (*WHO, "locked"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-C", name, "-f", str(folder / name)]
        words += ["-N", "correct horse" if name == "locked" else ""]
        subprocess.run(words, check=True)
    return {name: folder / name for name in (*WHO, "locked")}


def public(key):
    return key.with_suffix(".pub").read_text()


@pytest.fixture
def signers(keys, tmp_path):
    "A file that trusts the maker and the auditor."
    path = tmp_path / "signers"
    path.write_text("".join(f"{n}@example.org {public(keys[n])}" for n in WHO[:2]))
    return path


@pytest.fixture
def signed(run, keys):
    sign(run, keys["maker"])
    return run


def replay_of(folder, tmp_path, proven="L3", **more):
    "What a replay of this run leaves, as far as an auditor needs it."
    made = tmp_path / "replays" / f"of-{folder.name}-{proven}"
    made.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "environment.json", made)
    levels = [{"name": "L0", "holds": True, "detail": "all files are as they were sealed"}]
    verdict = {"subject": run_subject(folder), "proven": proven, "levels": levels} | more
    write_verdict(made, verdict)
    return made


def told(folder, signers):
    return [a.problem for a in signatures(folder, signers)]


def attestation(folder):
    (path,) = (folder / ATTESTATIONS).glob("*.json")
    return path


def resign(folder, key, change=lambda body: body, namespace="codex-nb"):
    "Edit the statement and sign it again, as `ssh-keygen` does for anyone."
    path = attestation(folder)
    body = json.loads(path.read_bytes())
    change(body)
    path.write_text(json.dumps(body))
    path.with_suffix(".json.sig").unlink()
    words = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(key), "-n", namespace, str(path)]
    subprocess.run(words, check=True, capture_output=True)


def test_a_signed_run_is_the_same_run(run, twin, keys, signers, tmp_path):
    before, subject = read_manifest(run), run_subject(run)
    sign(run, keys["maker"])
    sign(run, keys["auditor"], "auditor", replay_of(run, tmp_path))
    after = read_manifest(run)
    assert (after.digest, after.created, after.producer) == (
        before.digest,
        before.created,
        before.producer,
    )
    assert run_subject(run) == subject and len(after.attachments) == len(before.attachments) + 4
    assert verify_run(run)["problems"] == []
    assert test_forgery.identical_level(run, twin).holds is True
    found = {a.role: a for a in signatures(run, signers)}
    assert {role: (a.problem, a.principal, a.level) for role, a in found.items()} == {
        "maker": ("", "maker@example.org", ""),
        "auditor": ("", "auditor@example.org", "L3"),
    }
    sign(run, keys["maker"])  # again: replaced, not added
    assert len(signatures(run, signers)) == 2 and verify_run(run)["ok"]


@pytest.mark.parametrize("written", ["maker-*.json", "maker-*"])
def test_a_signature_that_was_killed_half_written_is_made_again(run, keys, signers, written):
    sealed = (run / "manifest.json").read_bytes()
    sign(run, keys["maker"])
    for path in {*(run / ATTESTATIONS).iterdir()} - {*(run / ATTESTATIONS).glob(written)}:
        path.unlink()
    (run / "manifest.json").write_bytes(sealed)
    assert "not in the manifest" in verify_run(run)["problems"][0]
    sign(run, keys["maker"])
    assert verify_run(run)["ok"] and told(run, signers) == [""]


def test_a_statement_is_one_of_in_toto_about_every_file(signed):
    body = json.loads(attestation(signed).read_bytes())
    assert body["_type"] == "https://in-toto.io/Statement/v1"
    subjects = {s["name"]: s["digest"]["sha256"] for s in body["subject"]}
    assert subjects.pop(signed.name) == read_manifest(signed).digest
    files = {
        p.relative_to(signed).as_posix()
        for p in signed.rglob("*")
        if p.is_file() and not any(x.startswith(".") for x in p.relative_to(signed).parts)
    }
    ours = {n for n in files if n.startswith(f"{ATTESTATIONS}/")}
    assert subjects.keys() == files - ours - {"manifest.json"}
    assert body["predicate"]["role"] == "maker" and body["predicate"]["level"] is None


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_changed_byte_in_any_file_is_named(signed, signers):
    listed = read_manifest(signed).attachments
    names = [n for n in listed if not n.startswith(f"{ATTESTATIONS}/") and listed[n]["size"]]
    assert len(names) > 20
    for name in names:
        content = (signed / name).read_bytes()
        flip(signed / name)
        assert told(signed, signers) == [f"changed since it was signed: {name}"]
        (signed / name).write_bytes(content)
    assert told(signed, signers) == [""]


def edit_meta(folder):
    m = read_manifest(folder)
    m = replace(m, meta=m.meta | {"status": "failed"})
    (folder / "manifest.json").write_text(json_text(m.to_dict()))


def edit_version(folder):
    m = read_manifest(folder)
    m = replace(m, producer=m.producer | {"version": "9.9"}, created="2020-01-01T00:00:00+00:00")
    (folder / "manifest.json").write_text(json_text(m.to_dict()))


def link_a_folder(folder):
    (folder / "models").symlink_to(folder.parent)


def add_file(folder):
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "better.png").write_bytes(b"a better curve")


def add_beside_signatures(folder):
    (folder / ATTESTATIONS / "proof.html").write_text("proven: L5")


def remove_file(folder):
    (folder / "environment.json").unlink()


def replace_by_link(folder):
    path = folder / "environment.json"
    path.rename(folder.parent / "elsewhere.json")
    path.symlink_to(folder.parent / "elsewhere.json")


def replace_by_pipe(folder):
    (folder / "environment.json").unlink()
    os.mkfifo(folder / "environment.json")


def statement_pipe(folder):
    attestation(folder).with_suffix(".json.sig").unlink()
    os.mkfifo(attestation(folder).with_suffix(".json.sig"))


def edit_statement(folder):
    path = attestation(folder)
    path.write_text(path.read_text().replace("maker", "maken"))


def break_statement(folder):
    attestation(folder).write_text("[" * 100_000)


def no_signature(folder):
    attestation(folder).with_suffix(".json.sig").unlink()


def no_statement(folder):
    attestation(folder).unlink()


DAMAGES = {
    edit_meta: "changed since it was signed: manifest.json",
    edit_version: "changed since it was signed: manifest.json",
    link_a_folder: "not signed: models",
    add_file: "not signed: figures/better.png",
    add_beside_signatures: "not signed: a file without a statement",
    remove_file: "missing since it was signed: environment.json",
    replace_by_link: "changed since it was signed: environment.json",
    replace_by_pipe: "changed since it was signed: environment.json",
    statement_pipe: "is missing, or is not a file",
    edit_statement: "signature is of another statement",
    break_statement: "cannot be read: RecursionError",
    no_signature: "is missing, or is not a file",
    no_statement: "not signed: a file without a statement",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_what_is_not_as_it_was_signed_is_named(damage, signed, signers):
    damage(signed)
    found = [x for x in told(signed, signers) if x]
    assert len(found) == 1 and DAMAGES[damage] in found[0]


def test_only_the_keys_that_are_trusted_count(signed, keys, signers, tmp_path):
    only = tmp_path / "only"
    key = public(keys["maker"])
    for line, problem in {
        f"auditor@example.org {public(keys['auditor'])}": "key not among the signers",
        f'maker@example.org namespaces="git" {key}': "key not among the signers for codex-nb",
        f'maker@example.org namespaces="codex-nb" {key}': "",
        f'maker@example.org valid-after="21240101" {key}': "key not among the signers",
        f'*@example.org,maker valid-before="21240101" {key}': "",
        "": "key not among the signers",
    }.items():
        only.write_text(line)
        assert told(signed, only) == [problem], line
    resign(signed, keys["stranger"])
    assert told(signed, signers) == ["key not among the signers"]
    with pytest.raises(ArtifactError, match="no such file of signers"):
        signatures(signed, tmp_path / "nobody")


def test_a_signature_for_another_purpose_is_refused(signed, keys, signers):
    resign(signed, keys["maker"], namespace="git")
    assert told(signed, signers) == ["signature of another namespace: 'git'"]


def test_a_maker_who_says_to_be_an_auditor_is_refused(signed, keys, signers, home):
    "By the namespace of the signature, and by those that the signers' file allows a key."

    def promote(body):
        body["predicate"].update(role="auditor", level="L3")

    resign(signed, keys["maker"], promote)
    other = "signature of another namespace than that of 'auditor': 'codex-nb'"
    assert told(signed, signers) == [other]
    resign(signed, keys["maker"], namespace="codex-nb-audit")
    test_forgery.reseal(signed)
    assert told(signed, signers) == [""] and known_level(signed, signers) == "L3"
    maker = public(keys["maker"])
    signers.write_text(f'maker@example.org namespaces="codex-nb" {maker}')
    assert told(signed, signers) == ["key not among the signers for codex-nb-audit"]
    assert known_level(signed, signers) == "L0"
    signers.write_text(f'maker@example.org namespaces="codex-nb,codex-nb-audit" {maker}')
    assert told(signed, signers) == [""]


def test_a_statement_of_another_type_is_refused(signed, keys, signers):
    resign(signed, keys["maker"], lambda body: body.update(predicateType="https://slsa.dev/x"))
    assert "statement of another type" in told(signed, signers)[0]


def test_a_signature_copied_from_another_run_is_refused(signed, twin, keys, signers, tmp_path):
    # the twin has the same digest, since it is another execution of the same settings
    other = shutil.copytree(twin, tmp_path / "other")
    shutil.copytree(signed / ATTESTATIONS, other / ATTESTATIONS)
    assert told(other, signers)[0].startswith("changed since it was signed: ")
    m = read_manifest(other)
    (other / "manifest.json").unlink()
    config = m.config | {"exact": "0" * 64}
    seal(other, "run", config, m.parents, m.meta, attachments=("*",))
    assert told(other, signers) == ["statement is about another run"]


def test_the_signature_of_one_statement_does_not_fit_another(signed, keys, signers, tmp_path):
    made = sign(signed, keys["auditor"], "auditor", replay_of(signed, tmp_path, "L1"))
    maker = next(p for p in (signed / ATTESTATIONS).glob("maker-*.json"))
    shutil.copy(maker.with_suffix(".json.sig"), made.with_suffix(".json.sig"))
    assert sorted(told(signed, signers)) == ["", "signature is of another statement"]


def test_what_cannot_be_signed(run, keys, tmp_path, monkeypatch):
    def refused(words, *args):
        with pytest.raises(RunError, match=words):
            sign(run, *args)

    sealed = (run / "manifest.json").read_bytes()
    refused("there is no such key; make one with", tmp_path / "none")
    refused("there is no role 'author'", keys["maker"], "author")
    refused("an auditor needs a verdict; replay it", keys["maker"], "auditor")
    refused("only an auditor has a replay", keys["maker"], "maker", tmp_path)
    refused("there is no verdict of a replay", keys["maker"], "auditor", tmp_path)
    proof = replay_of(run, tmp_path, subject="0" * 64)
    refused("the verdict is about another run", keys["maker"], "auditor", proof)
    proof = replay_of(run, tmp_path, subject=None)
    refused("the verdict is about another run", keys["maker"], "auditor", proof)
    proof = replay_of(run, tmp_path, "nothing")
    refused("the replay proved nothing", keys["maker"], "auditor", proof)
    proof = replay_of(run, tmp_path, "L4", tolerance=0.5)
    refused("L4 within a tolerance of 0.5 proves too little", keys["maker"], "auditor", proof)
    proof = replay_of(run, tmp_path)
    verdict = json.loads((proof / VERDICT).read_text())
    for mac in (None, "", "ab" * 32, "\u00e9"):
        (proof / VERDICT).write_text(json.dumps(verdict | {"mac": mac}))
        refused("was not written here by you", keys["maker"], "auditor", proof)
    answer = tmp_path / "answer"  # a program that would tell the passphrase in a window
    answer.write_text("#!/bin/sh\necho correct horse\n")
    answer.chmod(0o755)
    monkeypatch.setenv("SSH_ASKPASS", str(answer))
    monkeypatch.setenv("DISPLAY", ":0")
    refused("cannot sign: .*ssh-agent", keys["locked"])
    text = tmp_path / "text"
    text.write_text("no key")
    refused("cannot sign", text)
    (run / ATTESTATIONS).symlink_to(tmp_path)
    refused("is a link, must be a folder", keys["maker"])
    (run / ATTESTATIONS).unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("ssh-keygen: is not installed", keys["maker"])
    monkeypatch.undo()
    assert (run / "manifest.json").read_bytes() == sealed and verify_run(run)["ok"]
    flip(run / "metrics.ndjson")
    refused("does not hold at L0: .*metrics.ndjson: the content has changed", keys["maker"])
    (run / "manifest.json").unlink()
    refused("only a sealed run can be signed", keys["maker"])


def test_a_failed_signing_leaves_the_run_as_it_was(signed, keys, signers, monkeypatch):
    from codex_nb.experiments import attest

    before = {p: p.read_bytes() for p in signed.rglob("*") if p.is_file()}

    def fail(*args, **more):
        raise OSError(28, "no space left")

    monkeypatch.setattr(attest, "replace", fail)
    for name in ("maker", "stranger"):
        with pytest.raises(OSError, match="no space left"):
            sign(signed, keys[name])
    after = {p: p.read_bytes() for p in signed.rglob("*") if p.is_file()}
    assert {p.name for p in after.keys() ^ before.keys()} <= {".lock"}
    assert all(after[p] == before[p] for p in before) and told(signed, signers) == [""]


def test_a_key_in_an_agent_needs_no_passphrase(run, keys, tmp_path, monkeypatch):
    if shutil.which("ssh-agent") is None:
        pytest.skip("ssh-agent is not installed")
    socket = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    try:
        wait_until(socket.exists)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        subprocess.run(["ssh-add", "-q", str(keys["stranger"])], check=True)
        path = sign(run, keys["stranger"].with_suffix(".pub"))
        assert read_signature(path.with_suffix(".json.sig").read_text())[1] == "codex-nb"
    finally:
        agent.terminate()
        agent.wait()


def test_the_commands(run, keys, signers, tmp_path):
    home = tmp_path / "home"
    codex_nb = lambda *words: codex(*words, home=home)  # noqa: E731
    assert codex_nb("verify", run, "--quick").returncode == 0
    unsigned = codex_nb("verify", run, "--quick", "--signers", signers)
    assert (unsigned.returncode, unsigned.stdout.splitlines()[-1]) == (
        1,
        "signature: there is none",
    )
    made = codex_nb("sign", run, "--key", keys["maker"])
    assert made.returncode == 0 and made.stdout.startswith("signed as maker with SHA256:")
    proof = replay_of(run, tmp_path)
    words = ["sign", run, "--key", keys["auditor"], "--as", "auditor"]
    assert "an auditor needs a verdict" in codex_nb(*words).stderr
    assert codex_nb(*words, "--replay", proof).returncode == 0
    good = codex_nb("verify", run, "--quick", "--signers", signers)
    assert good.returncode == 0
    lines = good.stdout.splitlines()[-2:]
    assert lines[0].startswith("signature of the auditor auditor@example.org, proved L3, ")
    assert lines[1].startswith("signature of the maker maker@example.org, ")
    signers.write_text(f"auditor {public(keys['auditor'])}")
    found = codex_nb("verify", run, "--quick", "--json", "--signers", signers)
    table = json.loads(found.stdout)["signatures"]
    assert found.returncode == 1
    assert [(a["valid"], a["problem"]) for a in table] == [
        (True, ""),
        (False, "key not among the signers"),
    ]


def test_a_file_name_cannot_pretend_to_be_a_line(signed, signers):
    fake = "x\nsignature of the auditor auditor@example.org, proved L3\x1b[2A"
    (signed / fake).write_text("")
    (found,) = signatures(signed, signers)
    assert found.problem == f"not signed: {fake}" and str(found).isprintable()
    assert printable("a\nb\x1b é \udcff") == "a\\nb\\x1b é \\udcff"


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A workspace without replays."
    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    monkeypatch.delenv("CODEX_NB_SIGNERS", raising=False)
    return tmp_path


def test_a_replay_here_proves_a_level_of_exactly_this_content(run, home):
    assert known_level(run) == "L0"
    for proven in ("nothing", "L5", ["L3"], None, "L1"):
        replay_of(run, home, proven=proven)
    assert known_level(run) == "L1"
    made = replay_of(run, home, "L4")
    assert known_level(run) == "L4"
    replay_of(run, home, "L2")
    assert known_level(run) == "L4"  # of a figure, L4 says more
    replay_of(run, home, "L3")
    assert known_level(run) == "L3"
    for text in ("[]", "{", "[" * 100_000, '{"subject": 1}'):
        (made / VERDICT).write_text(text)
    (made / VERDICT).unlink()
    os.mkfifo(made / VERDICT)
    assert known_level(run) == "L3"
    add_file(run)  # every hash is still that of the manifest
    assert known_level(run) == NOT_PROVEN
    test_forgery.reseal(run)
    assert known_level(run) == "L0"  # another content, of which no replay is known
    (run / "manifest.json").unlink()
    assert known_level(run) == NOT_PROVEN


def test_nothing_that_a_run_says_of_itself_is_a_level(run, home):
    (run / VERDICT).write_text(json.dumps({"subject": run_subject(run), "proven": "L3"}))
    replay_of(run, run)  # run/replays
    test_forgery.reseal(run)
    assert known_level(run) == "L0"


def test_a_folder_cannot_bring_its_own_verdict(run, home, monkeypatch):
    "A received folder may be a workspace, with a verdict about its run."
    verdict = json.loads((replay_of(run, home, "L3") / VERDICT).read_text())
    assert known_level(run) == "L3"
    not_ours = ({"mac": "\u00e9"}, {"levels": float("nan")}, {"levels": "\ud800"})
    for change in ({"mac": ""}, {"mac": "ab" * 32}, {"mac": None}, {"levels": []}, *not_ours):
        (home / "replays" / f"of-{run.name}-L3" / VERDICT).write_text(json.dumps(verdict | change))
        assert known_level(run) == "L0"
    monkeypatch.setenv("HOME", str(home / "another-user"))
    (home / "replays" / f"of-{run.name}-L3" / VERDICT).write_text(json.dumps(verdict))
    assert known_level(run) == "L0"
    assert ((home / "another-user/.local/state/codex_nb/verdict.key").stat().st_mode & 0o77) == 0


def test_a_loose_tolerance_proves_no_l4(run, home):
    replay_of(run, home, "L4", tolerance=0.5)
    assert known_level(run) == "L0"


def test_an_audit_of_segments_is_signed_with_its_report(run, keys, signers, home):
    segment = {"of": "training", "start": 0, "stop": 4, "step": 1}
    finding = {"segment": segment, "holds": True, "detail": "equal bit for bit"}
    report = {"subject": run_subject(run), "ok": True, "number": 7}
    report |= {"drawn": [segment], "findings": [finding]}
    made = home / "audited"
    made.mkdir()
    others = ([], None, [{}], [5], [finding | {"holds": False}], [finding | {"holds": None}])
    changes = [(dict(findings=x), "not every drawn") for x in others]
    changes += [(dict(drawn=x), "not every drawn") for x in ([], None, [segment | {"stop": 8}])]
    for change, message in (
        *changes,
        (dict(ok=False), "not every drawn"),
        (dict(subject="ab"), "another"),
    ):
        (made / "audit.json").write_text(json.dumps(report | change))
        with pytest.raises(RunError, match=message):
            sign(run, keys["auditor"], "auditor", made)
    (made / "audit.json").write_text(json.dumps(report))
    path = sign(run, keys["auditor"], "auditor", made)
    assert json.loads(path.read_text())["predicate"]["audit"] == report
    assert told(run, signers) == [""] and verify_run(run)["ok"]


def test_an_auditor_who_is_trusted_proves_a_level(run, keys, signers, home, monkeypatch):
    audit = replay_of(run, home, "L4")
    audit.rename(home / "audit")
    sign(run, keys["maker"])
    sign(run, keys["stranger"], "auditor", home / "audit")
    assert (known_level(run), known_level(run, signers)) == ("L0", "L0")
    signers.write_text(signers.read_text() + f"new@example.org {public(keys['stranger'])}")
    assert (known_level(run), known_level(run, signers)) == ("L0", "L4")
    monkeypatch.setenv("CODEX_NB_SIGNERS", str(signers))
    assert known_level(run) == "L4"
    monkeypatch.setenv("CODEX_NB_SIGNERS", str(home / "nowhere"))
    with pytest.raises(ArtifactError, match="no such file of signers"):
        known_level(run)


def test_a_maker_proves_no_level(signed, keys, signers, home):
    resign(signed, keys["maker"], lambda body: body["predicate"].update(level="L3"))
    test_forgery.reseal(signed)
    assert known_level(signed, signers) == "L0"


def test_a_replay_says_what_it_is_about(run, twin, keys, signers, home, monkeypatch):
    from codex_nb.experiments import replay as replays
    from codex_nb.experiments.launch import Outcome

    def launch(notebook, given, folder, *args, **more):
        shutil.copytree(twin, folder, dirs_exist_ok=True)
        return Outcome(folder, "finished", 0)

    monkeypatch.setattr(replays, "launch", launch)
    sign(run, keys["maker"])
    found = replays.replay(run)
    assert found.levels[3].holds is True
    assert found.proven == known_level(run)
    made = sign(run, keys["auditor"], "auditor", found.folder)
    assert found.proven == known_level(run)  # also after more signatures
    said = json.loads(made.read_bytes())["predicate"]
    assert said["level"] == found.proven
    assert [level["name"] for level in said["levels"]] == list(LEVELS[1:4]) + ["L3", "L4"]
    assert said["machine"]["torch"] and {a.problem for a in signatures(run, signers)} == {""}


def test_runs_below_a_required_level_are_named():
    require_level({"a": "L3", "b": "L4"}, "L4")
    require_level({}, "L3")
    with pytest.raises(
        RunError, match=r"below L3: b \(L4\), c \(not proven\); .*replay b; .*replay c"
    ):
        require_level({"a": "L3", "b": "L4", "c": NOT_PROVEN}, "L3")
    given = weakest(["L3, given base a", "L4, given base b", "L3"])
    assert given == "L4, given base a, given base b"
    require_level({"a": given}, "L4")
    assert weakest([given, "L1"]) == "L1"  # the order of the samples needs no model
    for level in ("l3", "L5", NOT_PROVEN, ""):
        with pytest.raises(RunError, match="there is no such level"):
            require_level({}, level)


def test_compare_shows_levels(run, twin, home):
    runs = home / "runs"
    runs.mkdir()
    a, b = shutil.copytree(run, runs / "one"), shutil.copytree(twin, runs / "two")
    replay_of(a, home)
    printed = codex("compare", "one", "two", home=home)
    assert printed.returncode == 0, printed.stderr
    levels = dict(re.findall(r"^(one|two) .* (L\d|not proven) ", printed.stdout, re.M))
    assert levels == {"one": "L3", "two": "L0"}
    refused = codex("compare", "one", "two", "--require", "L3", "--json", home=home)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "below L3: two (L0); prove it here: codex-nb replay two" in refused.stderr
    replay_of(b, home)
    done = codex("compare", "one", "two", "--require", "L3", "--json", home=home)
    assert [row["level"] for row in json.loads(done.stdout)["figures"]] == ["L3", "L3"]


READERS = ["verify twin", "compare twin claimed", "card twin --out -", "report twin --out -"]


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="no mount namespace allowed here",
)
@pytest.mark.parametrize("words", READERS if PROVE else READERS[:1])
@pytest.mark.parametrize("mount", ["read-only", "full"] if PROVE else ["full"])
def test_a_run_is_read_where_nothing_can_be_written(mount, words, two_executions):
    commands = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1"'
    if mount == "full":
        commands = 'mount -t tmpfs -o size=40m tmpfs /mnt && cp -a "$1"/. /mnt'
        commands += " && ! dd if=/dev/zero of=/mnt/filled bs=1k status=none 2>/dev/null"
    home = "/mnt" if mount == "full" else two_executions
    shell = ["unshare", "--mount", "sh", "-c", f'{commands}; shift; exec "$@"', "sh"]
    done = subprocess.run(
        [*shell, two_executions, BIN / "codex-nb", *words.split()],
        env=environment(home),
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
