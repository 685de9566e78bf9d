"""A run executed again: equal where nothing differs, and every planted difference found and named."""

import json
import os
import shutil
import subprocess
from unittest.mock import patch

import pytest
from test_launch import BIN, ROOT

PROVE = bool(os.environ.get("PROVE"))
SMALL = dict(
    steps=12,
    width=32,
    seq_len=32,
    batch_size=4,
    save_every=4,
    keep_last=9,
    eval_every=6,
    eval_documents=4,
    max_documents=8,
    max_new_tokens=4,
    resamples=100,
    vocab_size=400,
    threads=1,
    validation_fraction=0.2,
)


def flags(given):
    return [
        w
        for k, v in given.items()
        for w in ("-p", f"{k}={v if isinstance(v, str) else json.dumps(v)}")
    ]


def codex(home, *words, path="", **env):
    return subprocess.run(
        [BIN / "codex-nb", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {"CODEX_NB_HOME": str(home), "OMP_NUM_THREADS": "1"}
        | ({"PYTHONPATH": str(path)} if path else {})
        | env,
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    home = tmp_path_factory.mktemp("original")
    (home / "texts.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "text": f"Day {i}: the {('old', 'new', 'red')[i % 3]} boat went {('out', 'home')[i % 2]} at {i * 7 % 24} with {i} nets, and came back late."
                }
            )
            + "\n"
            for i in range(150)
        )
    )
    done = codex(
        home,
        "run",
        "train",
        "--quiet",
        "--folder",
        home / "runs" / "claimed",
        *flags(SMALL | {"data": str(home / "texts.jsonl")}),
    )
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def home(original, tmp_path):  # a copy to plant something in
    shutil.copytree(original, tmp_path / "home")
    return tmp_path / "home"


def replay(home, steps=None, ok=False, **parameters):  # in a new process it is in any case
    from codex_nb.experiments.replay import replay

    with patch.dict(os.environ, CODEX_NB_HOME=str(home), OMP_NUM_THREADS="1"):
        found = json.loads(
            json.dumps(replay(home / "runs" / "claimed", steps, parameters=parameters).to_dict())
        )
    assert found["ok"] == ok, found
    return shown(found)


def command(home, *words, code=1, **kw):  # the same from a command line
    done = codex(home, "replay", "claimed", "--json", *words, **kw)
    assert done.returncode == code, done.stderr + done.stdout
    return shown(json.loads(done.stdout))


def shown(found):
    return found | {
        "held": {l["name"]: l["holds"] for l in found["levels"]},
        "said": {l["name"]: l["said"] for l in found["levels"]},
    }


def sealed_again(home, checkpoint=None):  # as if it had been so from the beginning
    from codex_nb.core.artifacts import read_manifest, seal
    from codex_nb.run.run_folder import seal_run

    run = home / "runs" / "claimed"
    if checkpoint:
        m = read_manifest(checkpoint)
        (checkpoint / "manifest.json").unlink()
        seal(checkpoint, "checkpoint", m.config, m.parents, m.meta)
    (run / "manifest.json").unlink()
    seal_run(run, "finished")


def asked_otherwise(home, path, value):
    from codex_nb.core.config import digest_of

    file = home / "runs" / "claimed" / "config.json"
    said = json.loads(file.read_text())
    for part in ("config", "identity"):
        here = said[part]
        for p in path[:-1]:
            here = here[p]
        here[path[-1]] = value
    file.write_text(json.dumps(said | {"digest": digest_of(said["identity"])}))
    sealed_again(home)


def test_nothing_planted(original):
    found = command(original, code=0)
    assert (
        found["proven"] == "L3"
        and found["held"] == {"L0": True, "L1": True, "L2": True, "L3": True, "L4": None}
        and "digest of the run" in found["said"]["L3"]
    )
    assert found["diff"]["same"] and not any(
        found["diff"][k] for k in ("settings", "inputs", "code", "machine", "environment")
    )
    part = replay(original, 5, ok=True)
    assert part["proven"] == "L2" and part["said"]["L2"].startswith("5 steps")
    again = codex(original, "diff", "claimed", found["folder"], "--exit-code")
    assert again.returncode == 0 and "the same to the last byte" in again.stdout


def test_a_byte_of_the_data(home):
    text = (home / "texts.jsonl").read_text()
    (home / "texts.jsonl").write_text(text.replace("the old boat", "the odd boat", 1))
    found = replay(home, data=str(home / "texts.jsonl"))
    assert {"corpus", "tokens"} <= found["diff"]["inputs"].keys() and found["held"]["L0"]
    assert (
        found["held"]["L1"] is False or found["held"]["L2"] is False or found["held"]["L3"] is False
    )
    shutil.rmtree(home / "store")  # nor can it be hidden by leaving the store away
    if PROVE:
        assert {"corpus", "tokens"} <= replay(home, data=str(home / "texts.jsonl"))["diff"][
            "inputs"
        ].keys()


def test_a_damaged_parent(home):
    (path,) = (home / "store" / "tokens").glob("*/ids.bin")
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    done = codex(home, "verify", "claimed")
    assert (
        done.returncode == 1
        and "ids.bin" in done.stdout
        and "L0 does not hold" in done.stdout
        and "L1 does not hold: the token store is damaged" in done.stdout
    )


def test_a_merge_of_the_tokenizer(home):
    from codex_nb.core.artifacts import read_manifest, seal

    (folder,) = (p.parent for p in (home / "store" / "tokenizer").glob("*/tokenizer.json"))
    said = json.loads((folder / "tokenizer.json").read_text())
    merges = said["model"]["merges"]
    merges[3], merges[9] = merges[9], merges[3]
    (folder / "tokenizer.json").write_text(json.dumps(said))
    m = read_manifest(folder)
    (folder / "manifest.json").unlink()
    seal(folder, m.kind, m.config, m.parents, m.meta)
    found = replay(home)
    assert "tokenizer" in found["diff"]["inputs"] and "corpus" not in found["diff"]["inputs"]
    assert found["held"]["L3"] is False


def test_a_seed(home):
    asked_otherwise(home, ["seed"], 1)
    assert codex(home, "verify", "claimed").stdout.splitlines()[-1].startswith("L1 does not hold")
    found = replay(home)
    assert found["held"]["L0"] is True and found["held"]["L1"] is False and found["proven"] == "L0"
    assert found["diff"]["first"]["split"] == "start" and any(
        "identity.seed" in x for x in found["diff"]["checkpoints"]
    )


def test_a_learning_rate(home):
    asked_otherwise(home, ["optim", "lr"], 0.0081)
    found = replay(home)
    assert found["held"]["L1"] is True and found["held"]["L2"] is False and found["proven"] == "L1"
    assert (found["diff"]["first"]["step"], found["diff"]["first"]["what"]) == (2, "loss") and any(
        "schedule.optim.lr" in x for x in found["diff"]["checkpoints"]
    )


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
def test_threads(home):
    from codex_nb.experiments.replay import replay

    with patch.dict(os.environ, CODEX_NB_HOME=str(home), OMP_NUM_THREADS="1"):
        found = replay(home / "runs" / "claimed", 6, parameters={"threads": 2}).to_dict()
    assert found["diff"]["machine"] == {"threads": [1, 2]} and found["diff"]["settings"] == {
        "threads": [1, 2]
    }  # whether the last bits differ depends on the machine


def test_a_line_of_the_package(home, tmp_path):
    shutil.copytree(
        ROOT / "codex_nb",
        tmp_path / "other" / "codex_nb",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    path = tmp_path / "other" / "codex_nb" / "engine.py"
    text = path.read_text()
    assert text.count("(batch_sum/tokens).backward()") == 1
    path.write_text(
        text.replace("(batch_sum/tokens).backward()", "(batch_sum/tokens*1.0001).backward()")
    )
    found = command(home, "--steps", 6, path=tmp_path / "other")
    assert "files.engine.py" in found["diff"]["code"] and not found["diff"]["machine"]
    assert found["held"]["L2"] is False and (
        found["diff"]["first"]["step"],
        found["diff"]["first"]["what"],
    ) == (1, "grad_norm")


def test_the_version_of_a_package(home, tmp_path):
    (tmp_path / "tqdm-99.0.dist-info").mkdir()
    (tmp_path / "tqdm-99.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tqdm\nVersion: 99.0\n"
    )
    found = command(home, "--steps", 3, path=tmp_path, code=0)
    assert found["diff"]["environment"]["packages.tqdm"][1] == "99.0" and found["proven"] == "L2"


def test_a_weight(home):
    from safetensors.torch import load_file, save_file

    folder = home / "runs" / "claimed" / "checkpoints" / "step-00000008"
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[2]
    weights[name].view(-1)[1] *= -1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    from codex_nb.experiments.replay import sealed_level

    with patch.dict(os.environ, CODEX_NB_HOME=str(home)):
        level = sealed_level(home / "runs" / "claimed")
    assert level.holds is False and "step-00000008/model.safetensors" in level.said
    sealed_again(home, folder)
    found = replay(home)
    assert (
        found["held"]["L0"] is True
        and found["held"]["L2"] is True
        and found["held"]["L3"] is False
        and found["proven"] == "L2"
    )
    assert name in found["said"]["L3"] and "step-00000008" in found["said"]["L3"]


def test_a_line_of_the_record(home):
    path = home / "runs" / "claimed" / "metrics.ndjson"
    lines = path.read_text().splitlines()
    i = next(
        i for i, l in enumerate(lines) if '"split": "train"' in l and json.loads(l)["step"] == 7
    )
    r = json.loads(lines[i])
    r["exact"]["loss"] = (float.fromhex(r["exact"]["loss"]) * 0.9).hex()
    lines[i] = json.dumps(r)
    path.write_text("\n".join(lines) + "\n")
    from codex_nb.run.run_folder import verify_run

    with patch.dict(os.environ, CODEX_NB_HOME=str(home)):
        assert "metrics.ndjson" in verify_run(home / "runs" / "claimed")["problems"][0]
    sealed_again(home)
    found = replay(home)
    assert (
        found["held"]["L0"] is True
        and found["held"]["L2"] is False
        and (found["diff"]["first"]["step"], found["diff"]["first"]["what"]) == (7, "loss")
    )
    if not PROVE:
        return
    lines.pop(i)
    path.write_text("\n".join(lines) + "\n")
    sealed_again(home)
    found = replay(home)
    assert (found["diff"]["first"]["step"], found["diff"]["first"]["what"]) == (7, "record")
