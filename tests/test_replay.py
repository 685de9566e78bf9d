"""A run executed again: nothing differs, or what was planted is found and named."""

import json
import os
import re
import shutil

import pytest
from helpers import LIB, PROVE, codex, flags, shared_folder

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


def text(i):
    color, way = ("old", "new", "red")[i % 3], ("out", "home")[i % 2]
    return (
        f"Day {i}: the {color} boat went {way} at {i * 7 % 24} with {i} nets, and came back late."
    )


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    "A workspace with one finished run."

    def make(home):
        lines = [json.dumps({"text": text(i)}) + "\n" for i in range(150)]
        (home / "texts.jsonl").write_text("".join(lines))
        folder, settings = home / "runs" / "claimed", SMALL | {"data": str(home / "texts.jsonl")}
        words = ["run", "train", "--quiet", "--folder", folder, *flags(settings)]
        done = codex(*words, home=home)
        assert done.returncode == 0, done.stderr

    return shared_folder(tmp_path_factory, "claimed-run", make)


@pytest.fixture
def home(original, tmp_path):
    "A copy to plant something in."
    shutil.copytree(original, tmp_path / "home")
    return tmp_path / "home"


def with_levels(found):
    "A replay's outcome, with what was found at each level by its name."
    levels = {level["name"]: level for level in found["levels"]}
    return found | {
        "held": {name: level["holds"] for name, level in levels.items()},
        "detail": {name: level["detail"] for name, level in levels.items()},
    }


def replay(home, *words, code=1, parameters=None, **env):
    "Replay the run; what was found."
    more = flags(parameters or {})
    done = codex("replay", "claimed", "--json", *words, *more, home=home, **env)
    assert done.returncode == code, done.stderr + done.stdout
    return with_levels(json.loads(done.stdout))


def seal_again(home, checkpoint=None):
    "Seal what was changed, as if it had been so from the beginning."
    from codex_nb.core.artifacts import read_manifest, seal
    from codex_nb.run.run_folder import seal_run

    run = home / "runs" / "claimed"
    if checkpoint:
        m = read_manifest(checkpoint)
        (checkpoint / "manifest.json").unlink()
        seal(checkpoint, "checkpoint", m.config, m.parents, m.meta)
    (run / "manifest.json").unlink()
    seal_run(run, "finished")


def change_setting(home, path, value):
    "Let the run claim another setting than it was trained with."
    from codex_nb.core.config import digest_of

    file = home / "runs" / "claimed" / "config.json"
    record = json.loads(file.read_text())
    for part in ("config", "identity"):
        inner = record[part]
        for p in path[:-1]:
            inner = inner[p]
        inner[path[-1]] = value
    file.write_text(json.dumps(record | {"digest": digest_of(record["identity"])}))
    seal_again(home)


def test_replay_proves_every_level_where_nothing_differs(home):
    found = replay(home, code=0)
    assert found["proven"] == "L3" and "digest of the run" in found["detail"]["L3"]
    assert found["held"] == {"L0": True, "L1": True, "L2": True, "L3": True, "L4": None}
    differences = ("settings", "inputs", "code", "machine", "environment")
    assert found["diff"]["same"] and not any(found["diff"][k] for k in differences)
    part = replay(home, "--steps", 5, code=0)
    assert part["proven"] == "L2" and part["detail"]["L2"].startswith("5 steps")
    again = codex("diff", "claimed", found["folder"], "--exit-code", home=home)
    assert again.returncode == 0 and "identical byte for byte" in again.stdout


def test_replay_finds_a_changed_byte_of_the_data(home):
    data = home / "texts.jsonl"
    data.write_text(data.read_text().replace("the old boat", "the odd boat", 1))
    found = replay(home, parameters={"data": str(data)})
    assert {"corpus", "tokens"} <= found["diff"]["inputs"].keys() and found["held"]["L0"]
    assert False in (found["held"]["L1"], found["held"]["L2"], found["held"]["L3"])
    if PROVE:  # nor can it be hidden by leaving the store away
        shutil.rmtree(home / "store")
        assert {"corpus", "tokens"} <= replay(home, parameters={"data": str(data)})["diff"][
            "inputs"
        ].keys()


def test_verify_finds_a_damaged_token_store(home):
    (path,) = (home / "store" / "tokens").glob("*/ids.bin")
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    done = codex("verify", "claimed", home=home)
    assert done.returncode == 1 and "ids.bin" in done.stdout
    assert "L0 does not hold" in done.stdout
    assert "L1 does not hold: the token store is damaged" in done.stdout


def test_replay_finds_swapped_merges_of_the_tokenizer(home):
    from codex_nb.core.artifacts import read_manifest, seal

    (file,) = (home / "store" / "tokenizer").glob("*/tokenizer.json")
    tokenizer = json.loads(file.read_text())
    merges = tokenizer["model"]["merges"]
    merges[3], merges[9] = merges[9], merges[3]
    file.write_text(json.dumps(tokenizer))
    m = read_manifest(file.parent)
    (file.parent / "manifest.json").unlink()
    seal(file.parent, m.kind, m.config, m.parents, m.meta)
    found = replay(home)
    assert "tokenizer" in found["diff"]["inputs"] and "corpus" not in found["diff"]["inputs"]
    assert found["held"]["L3"] is False


def test_replay_finds_another_seed(home):
    shutil.rmtree(home / "runs" / "claimed" / "evaluations")  # it names the seed too: L0
    change_setting(home, ["seed"], 1)
    verified = codex("verify", "claimed", home=home)
    assert verified.stdout.splitlines()[-1].startswith("L1 does not hold")
    found = replay(home)
    assert found["held"]["L0"] is True and found["held"]["L1"] is False and found["proven"] == "L0"
    assert found["diff"]["first"]["split"] == "start"
    assert any("identity.seed" in x for x in found["diff"]["checkpoints"])


def test_replay_finds_another_learning_rate(home):
    change_setting(home, ["optim", "lr"], 0.0081)
    found = replay(home)
    assert found["held"]["L1"] is True and found["held"]["L2"] is False and found["proven"] == "L1"
    first = found["diff"]["first"]
    assert (first["step"], first["what"]) == (1, "lr")
    assert any("schedule.optim.lr" in x for x in found["diff"]["checkpoints"])


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
def test_replay_names_another_number_of_threads(home):
    words = ("replay", "claimed", "--json", "--steps", "6", "-p", "threads=2")
    found = json.loads(codex(*words, home=home).stdout)
    # whether the last bits differ depends on the machine
    assert found["diff"]["machine"] == {"threads": [1, 2]}
    assert found["diff"]["settings"] == {"threads": [1, 2]}


def claim_another_tqdm(folder):
    info = folder / "tqdm-99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tqdm\nVersion: 99.0\n")


def test_replay_finds_a_changed_line_and_another_version_of_a_package(home, tmp_path):
    other = tmp_path / "other" / "codex_nb"
    shutil.copytree(LIB, other, ignore=shutil.ignore_patterns("__pycache__"))
    path = other / "train" / "engine.py"
    source, line = path.read_text(), "(batch_sum / n).backward()"
    assert source.count(line) == 1
    path.write_text(source.replace(line, "(batch_sum / n * 1.0001).backward()"))
    claim_another_tqdm(other.parent)
    found = replay(home, "--steps", 6, PYTHONPATH=str(other.parent))
    assert "files.train/engine.py" in found["diff"]["code"] and not found["diff"]["machine"]
    assert found["diff"]["environment"]["packages.tqdm"][1] == "99.0"
    assert found["held"]["L2"] is False
    first = found["diff"]["first"]
    assert (first["step"], first["what"]) == (1, "grad_norm")


@pytest.mark.skipif(not PROVE, reason="two processes; that it is named, the test before shows")
def test_replay_with_another_version_of_a_package_can_still_hold(home, tmp_path):
    claim_another_tqdm(tmp_path)
    found = replay(home, "--steps", 3, PYTHONPATH=str(tmp_path), code=0)
    assert found["diff"]["environment"]["packages.tqdm"][1] == "99.0" and found["proven"] == "L2"


def test_replay_finds_a_changed_weight(home, monkeypatch):
    from safetensors.torch import load_file, save_file

    from codex_nb.core.artifacts import read_manifest
    from codex_nb.experiments.replay import sealed_level
    from codex_nb.run.run_record import record_state

    checkpoint = home / "runs" / "claimed" / "checkpoints" / "step-00000008"
    weights = load_file(checkpoint / "model.safetensors")
    name = sorted(weights)[2]
    weights[name].view(-1)[1] *= -1
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    monkeypatch.setenv("CODEX_NB_HOME", str(home))
    level = str(sealed_level(home / "runs" / "claimed"))
    assert level.startswith("L0 does not hold") and "step-00000008/model.safetensors" in level
    seal_again(home, checkpoint)
    run = home / "runs" / "claimed"
    assert "step-00000008: is not the state in states.ndjson" in str(sealed_level(run))
    record_state(run, 8, read_manifest(checkpoint).digest)
    seal_again(home)
    found = replay(home)
    assert found["held"]["L0"] is True and found["held"]["L2"] is True
    assert found["held"]["L3"] is False and found["proven"] == "L2"
    assert name in found["detail"]["L3"] and "step-00000008" in found["detail"]["L3"]


def test_replay_finds_a_changed_line_of_the_record(home, monkeypatch):
    from codex_nb.experiments.verify import verify_run
    from codex_nb.tracking.metrics_log import metrics_csv

    path = home / "runs" / "claimed" / "metrics.ndjson"
    lines = path.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    i = next(i for i, r in enumerate(records) if (r["split"], r["step"]) == ("train", 7))
    exact = records[i]["exact"]
    records[i]["values"]["loss"] = loss = float.fromhex(exact["loss"]) * 0.9
    exact["loss"] = loss.hex()
    lines[i] = json.dumps(records[i])
    path.write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("CODEX_NB_HOME", str(home))
    assert "metrics.ndjson" in verify_run(home / "runs" / "claimed")["problems"][0]
    metrics_csv(path, path.with_suffix(".csv"))
    seal_again(home)
    found = replay(home)
    first = found["diff"]["first"]
    assert found["held"]["L0"] is True and found["held"]["L2"] is False
    assert (first["step"], first["what"]) == (7, "loss")
    if PROVE:
        lines.pop(i)
        path.write_text("\n".join(lines) + "\n")
        metrics_csv(path, path.with_suffix(".csv"))
        seal_again(home)
        first = replay(home)["diff"]["first"]
        assert (first["step"], first["what"]) == (7, "record")


def test_lineage_finds_a_forged_base(tmp_path, monkeypatch):
    "A fine-tuning of forged weights replays to the last bit: it is proven given that base."
    from forger import FORGERIES, checkpoints

    from codex_nb.experiments.attest import known_level
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.settings import RunConfig

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    small = dict(steps=4, save_every=4, max_documents=6, resamples=100, seq_len=32)
    shape = dict(width=32, layers=1, max_new_tokens=8)
    base = tmp_path / "runs" / "base"
    train_and_judge(RunConfig.from_preset("smoke", **small, **shape), base)
    FORGERIES["weights"](base)
    tuned = tmp_path / "runs" / "tuned"
    settings = dict(small, base=str(checkpoints(base)[-1]), lr=1e-4)
    train_and_judge(RunConfig.from_preset("smoke", **settings), tuned)
    if PROVE:
        alone = codex("replay", tuned, "--quiet", home=tmp_path)
        assert alone.returncode == 0, alone.stdout
        assert "proven: L3, given base" in alone.stdout and "for which L0 holds" in alone.stdout
    down = codex("replay", tuned, "--lineage", "--quiet", home=tmp_path)
    assert down.returncode == 1, down.stdout
    assert "base: L3 does not hold" in down.stdout
    assert "proven: L3, given base" in down.stdout and "for which L2 holds" in down.stdout
    assert known_level(tuned) == "L2"
    base.rename(tmp_path / "elsewhere")
    assert re.fullmatch("L3, given base [0-9a-f]{12}", known_level(tuned))
