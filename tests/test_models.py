"""Models come from disk alone: found, refused and opened in a process without network."""

import os
import subprocess
import sys

import pytest
from helpers import PROGRAMS, codex, counts, files_below, flags

from codex_nb.core.config import Config, ConfigError


@pytest.mark.skipif(
    subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0,
    reason="no network namespace allowed here",
)
@pytest.mark.parametrize("offline", counts([None], [None, "1", "0"]))
def test_models_are_opened_without_a_network(offline, tmp_path):
    foreign = ("HF_", "TRANSFORMERS_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    env |= {"CODEX_NB_MODELS": str(tmp_path / "models")}
    if offline:
        env["HF_HUB_OFFLINE"] = offline
    done = subprocess.run(
        ["unshare", "--net", sys.executable, PROGRAMS / "open_models_offline.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr


def test_models_are_looked_for_in_the_documented_order(tmp_path, monkeypatch):
    from codex_nb.model.model_registry import find_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CODEX_NB_MODELS", str(tmp_path / "shared"))
    places = [tmp_path / "m", tmp_path / "shared" / "m", tmp_path / "models" / "m"]
    with pytest.raises(ConfigError) as e:
        find_model("m")
    found = [str(e.value).index(str(place)) for place in places]
    assert found == sorted(found)
    for place in reversed(places):
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
        (place / "model.safetensors").write_bytes(b"x")
        assert find_model("m").absolute() == place


BAD = {
    "no such base": ("-p base nowhere", "base: no model 'nowhere'; looked at"),
    "adapter without base": ("-p adapter lora", "an adapter needs a base"),
    "shape and base": ("-p base x -p layers 3", "layers: given together with base"),
    "processes": ("-p nproc 3", "batch_size: 16 rows cannot be divided equally among 3 processes"),
    "kernels": ("-p products onednn -p dtype bf16", "products: onednn is for fp32 on a CPU"),
    "rank": ("-p rank 0", "codex-nb: rank: given 0; must be int, >= 1"),
    "on_bad": (
        "-p on_bad ignore",
        "codex-nb: on_bad: given 'ignore'; must be one of 'stop', 'skip'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name, tmp_path):
    given, expected = BAD[name]
    done = codex("run", "train", *given.split(), home=tmp_path)
    assert done.returncode == 1 and expected in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()
    assert [p for p in files_below(tmp_path) if not p.startswith("store/")] == []


def parts_of(cls):
    "Name -> class, of the parts of a configuration."
    fields = {name: field.annotation for name, field in cls.model_fields.items()}
    return {n: c for n, c in fields.items() if isinstance(c, type) and issubclass(c, Config)}


def some_value(cls, name):
    "A value for a setting: its default, or one of the right type."
    field = cls.model_fields[name]  # a name that is no field ends here
    default = field.get_default()
    return default if default is not None else "x" if "str" in str(field.annotation) else 5


def test_every_setting_that_would_change_nothing_is_refused():
    from codex_nb.run.settings import SET_BY_BASE, FinetuneConfig, JudgeConfig, RunConfig

    # where they mean nothing
    beside = {
        "tokenizer": dict(tokenizer_path="x"),
        "checkpoint": dict(keep_best=0),
        "monitor": dict(monitor=False),
        "optim": dict(schedule="constant"),
    }
    seen = 0
    for cls in (RunConfig, JudgeConfig):
        for part, config in parts_of(cls).items():
            for name in config.ignored_when:
                given = {name: some_value(config, name)} | beside.get(part, {})
                with pytest.raises(ConfigError, match=f"{name}: given, but has no effect"):
                    cls.from_preset(None, **given)
                seen += 1
    assert seen > 15
    for name in SET_BY_BASE:
        configs = (*parts_of(RunConfig).values(), RunConfig)
        config = next(c for c in configs if name in c.model_fields)
        value = config.model_fields[name].get_default()
        value = value if value is not None else {"ffn": 8, "kv_heads": 2, "depth": 2}[name]
        with pytest.raises(ConfigError, match=f"{name}: given together with base"):
            FinetuneConfig.from_preset(None, **{name: value})


def test_base_that_does_not_fit_is_refused(small_model, tmp_path, monkeypatch):
    from codex_nb.data.corpus import CorpusConfig, open_corpus
    from codex_nb.data.tokenizer_training import TokenizerConfig, train_tokenizer

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))

    def error(kind, **given):
        words = flags(dict(base=str(small_model)) | given)
        done = codex("run", kind, *words, home=tmp_path)
        assert done.returncode == 1, done.stdout
        return done.stderr

    message = "targets: query: no such linear layer in this model; there are down_proj"
    assert message in error("finetune", targets=["query"])
    message = "vocab_size: given together with base, which has its own"
    assert message in error("train", vocab_size=600, steps=2)
    corpus = open_corpus(CorpusConfig(data="sample"))
    larger = train_tokenizer(corpus, TokenizerConfig(vocab_size=600))
    message = "leave out tokenizer_path to use the base's own"
    assert message in error("train", tokenizer_path=str(larger.path), steps=2)
