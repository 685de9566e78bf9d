"""Models come from disk alone: found, refused and opened in a process without network."""

import os
import subprocess
import sys
import textwrap

import pytest

CODE = textwrap.dedent("""
    import socket, sys
    from pathlib import Path
    from codex_nb.core.config import ConfigError
    from codex_nb.model.model_registry import find_model, import_model, load_model, verify_model
    from codex_nb.model.causal_lm import ModelConfig, build_model, count_parameters, hide_progress_bars
    try: socket.create_connection(("192.0.2.1", 80), timeout=2); sys.exit("there is a network")
    except OSError: pass
    model = build_model(ModelConfig(width=32, layers=1, heads=2, seq_len=16), 64, 0, 0)
    with hide_progress_bars(): model.save_pretrained("made")
    import_model("made", "small")
    assert verify_model(find_model("small")) == []
    assert count_parameters(load_model(find_model("small"))) == count_parameters(model)
    for name in ("gpt2", "openai-community/gpt2", "meta-llama/Llama-3.2-1B"): # names that a hub would know
        try: find_model(name); sys.exit(f"{name} was found")
        except ConfigError as e: assert "looked at" in str(e) and "codex-nb models import" in str(e), e
    print("done")
""")


@pytest.mark.skipif(
    subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0,
    reason="no network namespace allowed here",
)
@pytest.mark.parametrize("offline", [None, "1", "0"])
def test_without_a_network(offline, tmp_path):
    env = (
        {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        | ({"HF_HUB_OFFLINE": offline} if offline else {})
        | {"CODEX_NB_MODELS": str(tmp_path / "models")}
    )
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr


def test_places_in_order(tmp_path, monkeypatch):
    from codex_nb.core.config import ConfigError
    from codex_nb.model.model_registry import find_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CODEX_NB_MODELS", str(tmp_path / "shared"))

    def put(folder):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"x")

    with pytest.raises(ConfigError) as e:
        find_model("m")
    said = str(e.value)
    assert (
        said.index(str(tmp_path / "m"))
        < said.index(str(tmp_path / "shared" / "m"))
        < said.index(str(tmp_path / "models" / "m"))
    )
    for place in (tmp_path / "models" / "m", tmp_path / "shared" / "m", tmp_path / "m"):
        put(place)
        assert find_model("m").absolute() == place


BAD = {
    "no such base": ("-p base nowhere", "base: no model 'nowhere'; looked at"),
    "adapter without base": ("-p adapter lora", "an adapter needs a base"),
    "shape and base": ("-p base x -p layers 3", "layers: given together with base"),
    "processes": ("-p nproc 3", "batch_size: 16 rows cannot be shared equally by 3 processes"),
    "kernels": ("-p products onednn -p dtype bf16", "products: onednn is for fp32 on a CPU"),
    "rank": ("-p rank 0", "adapter.rank: given 0; must be int, >= 1"),
    "on_bad": ("-p on_bad ignore", "fit.on_bad: given 'ignore'; must be one of 'stop', 'skip'"),
}


@pytest.mark.parametrize("name", BAD if os.environ.get("PROVE") else list(BAD)[::3])
def test_bad_input_is_one_clear_error(name, tmp_path):
    from test_launch import left, run

    given, expected = BAD[name]
    done = run("codex-nb", "run", "train", *given.split(), home=tmp_path)
    assert done.returncode == 1 and expected in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )
    assert [p for p in left(tmp_path) if not p.startswith("store/")] == [] and not (
        tmp_path / "runs"
    ).exists()


def test_every_setting_that_would_change_nothing_is_refused():
    from codex_nb.core.config import Config, ConfigError
    from codex_nb.run.settings import SET_BY_BASE, FinetuneConfig, JudgeConfig, RunConfig

    away = {
        "tokenizer": dict(tokenizer_path="x"),
        "checkpoint": dict(keep_best=0),
        "monitor": dict(monitor=False),
        "optim": dict(schedule="constant"),
    }  # where they mean nothing
    seen = 0
    for cls in (RunConfig, JudgeConfig):
        for part, field in cls.model_fields.items():
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, Config)):
                continue
            for name in field.annotation.ignored_when:
                value = field.annotation.model_fields[
                    name
                ].get_default()  # a name that is no field ends here
                with pytest.raises(ConfigError, match=f"{name}: given, but has no effect"):
                    cls.from_preset(
                        None,
                        **{
                            name: value
                            if value is not None
                            else "x"
                            if "str" in str(field.annotation.model_fields[name].annotation)
                            else 5
                        },
                        **away.get(part, {}),
                    )
                seen += 1
    assert seen > 15
    for name in SET_BY_BASE:
        path = next(
            f.annotation
            for f in RunConfig.model_fields.values()
            if isinstance(f.annotation, type)
            and issubclass(f.annotation, Config)
            and name in f.annotation.model_fields
        )
        value = path.model_fields[name].get_default()
        with pytest.raises(ConfigError, match=f"{name}: given together with base"):
            FinetuneConfig.from_preset(
                None, **{name: value if value is not None else {"ffn": 8, "kv_heads": 2}[name]}
            )


def test_a_base_that_does_not_fit(tmp_path, monkeypatch):
    import shutil

    from test_launch import run

    from codex_nb.data.corpus import CorpusConfig, open_corpus
    from codex_nb.data.tokenizer_training import TokenizerConfig, train_tokenizer
    from codex_nb.model.causal_lm import ModelConfig, build_model, hide_progress_bars

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    tokenizer = train_tokenizer(
        open_corpus(CorpusConfig(data="sample")), TokenizerConfig(vocab_size=512)
    )
    with hide_progress_bars():
        build_model(
            ModelConfig(width=32, layers=1, heads=2, seq_len=64),
            tokenizer.vocab_size,
            tokenizer.eot,
            0,
        ).save_pretrained(tmp_path / "base")
    for n in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer.path / n, tmp_path / "base" / n)
    done = run(
        "codex-nb",
        "run",
        "finetune",
        "-p",
        "base",
        str(tmp_path / "base"),
        "-p",
        "targets",
        '["query"]',
        home=tmp_path,
    )
    assert (
        done.returncode == 1
        and "targets: query: no such linear layer in this model; there are down_proj" in done.stderr
    ), done.stderr
    done = run(
        "codex-nb",
        "run",
        "train",
        "-p",
        "base",
        str(tmp_path / "base"),
        "-p",
        "vocab_size",
        "600",
        "-p",
        "steps",
        "2",
        home=tmp_path,
    )
    assert (
        done.returncode == 1
        and "vocab_size: given together with base, which has its own" in done.stderr
    ), done.stderr
    larger = train_tokenizer(
        open_corpus(CorpusConfig(data="sample")), TokenizerConfig(vocab_size=600)
    )
    done = run(
        "codex-nb",
        "run",
        "train",
        "-p",
        "base",
        str(tmp_path / "base"),
        "-p",
        "tokenizer_path",
        str(larger.path),
        "-p",
        "steps",
        "2",
        home=tmp_path,
    )
    assert (
        done.returncode == 1
        and "leave out tokenizer_path, and the base's own is used" in done.stderr
    ), done.stderr
