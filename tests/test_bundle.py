"""A bundle works where there is no network, no repository and nothing but what it needs."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers import LIB, NBS, PROGRAMS, PROVE, ROOT, flags

# a command in a network namespace of its own, which has nothing but the loopback interface
OFFLINE = ["unshare", "--map-root-user", "--net", sys.executable, str(PROGRAMS / "loopback_up.py")]
if (
    not shutil.which("unshare")
    or subprocess.run([*OFFLINE, "true"], capture_output=True).returncode
):
    OFFLINE = []
FOREIGN = ("COV", "PYTHON", "VIRTUAL", "PIP", "CODEX", "WARM")


def offline(*words, check=True, **more):
    "Run a command without a network."
    words = [*OFFLINE, *map(str, words)]
    done = subprocess.run(words, capture_output=True, text=True, **more)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture
def bundle(small_model, tmp_path, monkeypatch):
    "A bundle with a model, a tokenizer, data and a policy."
    from codex_nb.data.corpus import CorpusConfig, open_corpus
    from codex_nb.data.tokenizer_training import TokenizerConfig, train_tokenizer
    from codex_nb.deploy.bundle import make_bundle

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path / "here"))
    corpus = open_corpus(CorpusConfig(data="sample"))
    tokenizer = train_tokenizer(corpus, TokenizerConfig(vocab_size=400))
    rules = "schema: 1\nrules:\n  - {kind: personal, action: redact}\n"
    (tmp_path / "policy.yaml").write_text(rules)
    made = make_bundle(
        tmp_path / "bundle",
        models=(small_model,),
        tokenizers=(tokenizer.digest[:12],),
        data=(ROOT / "data" / "chat.jsonl",),
        policy=tmp_path / "policy.yaml",
    )
    return made.path.rename(tmp_path / "carried"), made.digest


def empty_wheels(needed, folder, wheel_folders):
    for name, version in needed.items():
        (folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").touch()


def test_state_of_training_is_left_out_of_a_bundle(small_model, tmp_path):
    "Of one process it is a file; of several, a folder of shards."
    from codex_nb.deploy.bundle import make_bundle

    model = tmp_path / "small"
    shutil.copytree(small_model, model)
    kept = {p.name for p in model.iterdir()}
    for name in ("optimizer", "ema"):
        (model / name).mkdir()
        (model / name / "__0_0.distcp").write_bytes(b"shard")
        (model / f"{name}.safetensors").write_bytes(b"whole")
    made = make_bundle(tmp_path / "bundle", models=(model,), fetch=empty_wheels)
    assert {p.name for p in (made.path / "models" / "small").iterdir()} == kept
    assert not [p for p in made.path.rglob("*") if p.name.startswith(("optimizer", "ema", "__0"))]


@pytest.mark.skipif(not PROVE, reason="two minutes: torch is installed; make prove")
def test_bundle_installs_trains_judges_and_replays_without_a_network(bundle, tmp_path):
    from codex_nb.deploy.audit import load_claims

    (carried, digest), target = bundle, tmp_path / "there"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}

    # a wheel that was changed on the way: refused, and nothing made
    wheel = next((carried / "wheels").glob("pydantic-*.whl"))
    content = wheel.read_bytes()
    wheel.write_bytes(content[:-1] + b"?")
    refused = offline(sys.executable, carried / "install.py", target, check=False, env=clean)
    assert refused.returncode == 1 and not target.exists()
    assert f"wheels/{wheel.name}: the content has changed" in refused.stderr
    wheel.write_bytes(content)

    assert digest in offline(sys.executable, carried / "install.py", target, env=clean).stdout
    names = ["data", "env", "models", "nbs", "policy.yaml", "tokenizers"]
    assert sorted(p.name for p in target.iterdir()) == names
    bin = target / "env" / "bin"
    env = clean | {"PATH": f"{bin}:/usr/bin:/bin", "CODEX_NB_HOME": str(target)}

    def installed(*words):
        return offline(bin / "codex-nb", *words, env=env, cwd=target).stdout

    if OFFLINE:
        tried = offline(bin / "python", PROGRAMS / "reach_the_network.py", env=env)
        assert "unreachable" in tried.stdout
    modules = [
        ".".join(p.relative_to(LIB).with_suffix("").parts)
        for p in LIB.rglob("*.py")
        if not p.stem.startswith("_")
    ]
    imported = offline(
        bin / "python", PROGRAMS / "import_modules.py", *modules, env=env, cwd=tmp_path
    )
    assert imported.stdout.startswith(str(target))

    assert json.loads(installed("doctor", "--json"))["healthy"]
    assert small_model_answers(installed)
    small = dict(steps=3, batch_size=2, eval_documents=1, max_documents=4, max_new_tokens=4)
    small |= dict(resamples=100)
    settings = dict(preset="smoke") | small | dict(sinks="mlflow", policy="policy.yaml")
    assert "finished: " in installed("run", "train", *flags(settings))
    (run,) = (target / "runs").iterdir()
    # a sink that is not installed is named, with the remedy; and the run goes on
    text = (run / "train.ipynb").read_text()
    assert "mlflow is disabled for this run" in text and "pip install 'codex_nb[mlflow]'" in text
    assert "L0 holds" in installed("verify", run.name)
    assert "proven: L3" in installed("replay", run.name, "--quiet")
    audit = json.loads(installed("audit", "--json"))
    assert len(audit["rows"]) == len(load_claims()) and audit["stubs"] == []
    manifest = json.loads((carried / "manifest.json").read_text())
    notebook = (target / "nbs" / "train.ipynb").read_bytes()
    sha256 = hashlib.sha256(notebook).hexdigest()
    assert sha256 == manifest["files"]["nbs/train.ipynb"]["sha256"]
    if PROVE:
        tokenizer = str(next((target / "tokenizers").iterdir()))
        installed("run", "train", *flags(dict(base="small", tokenizer_path=tokenizer) | small))
        given = dict(checkpoint=run.name, resamples=100, data="data/chat.jsonl", max_documents=8)
        assert "finished: " in installed("run", "evaluate", *flags(given))


def small_model_answers(installed):
    "Whether the model that was carried along is listed, and writes."
    listed = "small" in installed("models", "list")
    return listed and installed("generate", "small", "--prompt", "One", "-p", "max_new_tokens=4")


def digests_of(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_builds_of_one_commit_are_identical(tmp_path):
    left_out = [".venv", ".ci-logs", "runs", "store", "build", "dist", "__pycache__", ".hypothesis"]
    left_out += [".mypy_cache", ".ruff_cache", ".git"]
    ignore = shutil.ignore_patterns(*left_out)
    shutil.copytree(ROOT, tmp_path / "a", symlinks=True, ignore=ignore)
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere", symlinks=True)
    for p in (tmp_path / "elsewhere").rglob("*"):
        os.utime(p, (1, 1), follow_symlinks=False)

    def build(folder, *words):
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", *words],
            cwd=folder,
            check=True,
            capture_output=True,
            env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"},
        )
        return digests_of(folder / "dist")

    made = build(tmp_path / "a")
    assert build(tmp_path / "elsewhere") == made and len(made) == 2
    # the wheel can be built from the source archive, and is the same
    sdist = next((tmp_path / "a" / "dist").glob("*.tar.gz"))
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    ((name, digest),) = build(source, "-t", "wheel").items()
    assert digest == made[name]
    names = zipfile.ZipFile(source / "dist" / name).namelist()
    notebooks = (
        *("train", "finetune", "prefer", "distill"),
        *("evaluate", "compare", "sweep", "audit"),
    )
    assert {f"codex_nb/notebooks/{n}.ipynb" for n in notebooks} <= set(names)
    assert "codex_nb/py.typed" in names  # the package says that it is typed
    assert not [n for n in names if n.startswith(("tests", "nbs", "tools"))]


@pytest.mark.skipif(
    not PROVE or not OFFLINE,
    reason="two minutes; make prove, where a network namespace is allowed",
)
def test_slow_cells_of_the_offline_tutorial(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.read(NBS / "tutorials" / "5_no_network.ipynb", 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(nb, timeout=300, kernel_name="python3", resources=resources).execute()
    text = "".join(o.get("text", "") for c in nb.cells for o in c.get("outputs", []))
    assert "complete, and made for this kind of machine" in text
    assert "L0 holds" in text and "this machine has no default route" in text
