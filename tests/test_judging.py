"""Judging: the same figure however it is made, evaluations that are stopped and go on, planted copies, comparisons that are fair."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
import zlib
from unittest.mock import patch

import numpy as np
import pytest
from test_launch import BIN, ROOT
from test_launch import run as command

PROVE = bool(os.environ.get("PROVE"))


def trained(home, name, **given):
    from codex_nb.run.judging import train_and_judge
    from codex_nb.run.settings import RunConfig

    with patch.dict(os.environ, CODEX_NB_HOME=str(home)):
        train_and_judge(
            RunConfig.from_preset(
                "smoke",
                **(
                    dict(
                        steps=40,
                        eval_every=100,
                        width=32,
                        seq_len=64,
                        save_every=100,
                        resamples=200,
                        dtype="fp32",
                    )
                    | given
                ),
            ),
            home / "runs" / name,
        )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    trained(home, "a-0")
    trained(home, "a-1", seed=1)
    trained(home, "b-0", steps=10)
    trained(home, "b-1", steps=10, seed=1)
    return home


def evaluate(home, name, **given):
    words = [
        w
        for k, v in (
            dict(checkpoint="a-0", split="train", max_documents=60, resamples=200, max_new_tokens=4)
            | given
        ).items()
        for w in ("-p", f"{k}={v if isinstance(v, str) else json.dumps(v)}")
    ]
    return command(
        "codex-nb",
        "run",
        "evaluate",
        "--quiet",
        "--folder",
        str(home / "runs" / name),
        *words,
        home=home,
    )


def summary(home, name, part="train"):
    return json.loads((home / "runs" / name / "evaluations" / part / "summary.json").read_text())


def records(home, name, part="train"):
    return [
        json.loads(l)
        for l in (home / "runs" / name / "evaluations" / part / "records.ndjson")
        .read_text()
        .splitlines()
    ]


def test_the_same_figure_however_it_is_made(home):
    "Batch 1, 3, 16; 1 and 2 processes: 1e-6. bf16: 2e-3."
    made = {}
    for batch, nproc, dtype in (
        ((16, 1, "fp32"), (3, 2, "fp32"))
        if not PROVE
        else [(b, n, d) for b in (1, 3, 16) for n in (1, 2) for d in ("fp32", "bf16")]
    ):
        name = f"e-{batch}-{nproc}-{dtype}"
        done = evaluate(home, name, eval_batch=batch, nproc=nproc, dtype=dtype, ngram=0)
        assert done.returncode == 0, done.stderr
        made[batch, nproc, dtype] = np.array([r["nll"] for r in records(home, name)])
    first = made[16, 1, "fp32"]
    for (b, n, d), nll in made.items():
        off = (abs(nll - first) / first).max()
        print(f"batch {b} processes {n} {d}: {off:.1e}")
        assert len(nll) == 60 and off < (1e-6 if d == "fp32" else 2e-3), (b, n, d, off)


def wait_for(check, seconds=120):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL] if PROVE else [signal.SIGTERM])
def test_stopped_and_gone_on(home, how):
    name = f"stopped-{how.name}"
    folder = home / "runs" / name
    words = [
        w
        for k, v in dict(
            checkpoint="a-0",
            split="train",
            max_documents=240,
            eval_batch=1,
            stride=4,
            resamples=200,
            max_new_tokens=4,
            ngram=0,
        ).items()
        for w in ("-p", f"{k}={v}")
    ]
    p = subprocess.Popen(
        [BIN / "codex-nb", "run", "evaluate", "--quiet", "--folder", str(folder), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CODEX_NB_HOME": str(home), "OMP_NUM_THREADS": "1"},
    )
    part = folder / "scoring" / "part-0-of-1.ndjson"
    wait_for(lambda: part.exists() and part.read_bytes().count(b"\n") > 60 or p.poll() is not None)
    p.send_signal(how)
    _, err = p.communicate(timeout=60)
    assert p.returncode == (-9 if how == signal.SIGKILL else 143), err
    before = part.read_bytes()
    assert 60 < before.count(b"\n") < 241
    lines = before.splitlines(keepends=True)
    i, mark = json.loads(lines[1].partition(b" ")[2])
    mark["nll"] += 1000  # a record that scoring would not make
    said = json.dumps([i, mark]).encode()
    part.write_bytes(b"".join([lines[0], b"%08x %b\n" % (zlib.crc32(said), said), *lines[2:]]))
    done = command("codex-nb", "resume", name, "--quiet", home=home)
    assert done.returncode == 0, done.stderr
    assert len(records(home, name)) == 240 and not (folder / "scoring").exists()
    assert command("codex-nb", "verify", name, home=home).returncode == 0
    assert records(home, name)[i]["nll"] == mark["nll"]  # not made again


def test_planted_copies_are_found(home, tmp_path):
    from codex_nb.data.corpus import CorpusConfig, open_corpus

    rng = np.random.default_rng(0)
    with patch.dict(os.environ, CODEX_NB_HOME=str(home)):
        taken = [d.text for d in open_corpus(CorpusConfig(data="sample")).split("train")]
    words = [f"w{i}" for i in range(5000)]
    fresh = lambda n: " ".join(rng.choice(words, n))
    n = 399 if PROVE else 60  # every third is planted
    docs = [
        {
            "id": f"{i:03}",
            "text": fresh(40)
            + (" " + " ".join(taken[i].split()[4:24]).upper() + " " if i % 3 == 0 else " ")
            + fresh(30),
            "meta": {"planted": str(i % 3 == 0)},
        }
        for i in range(n)
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    done = evaluate(
        home,
        "planted",
        data=str(tmp_path / "eval.jsonl"),
        max_documents=1000,
        slices=["planted"],
        split="all",
    )
    assert done.returncode == 0, done.stderr
    s, rows = summary(home, "planted", "all"), records(home, "planted", "all")
    assert len(rows) == n
    planted = {r["id"] for r in rows if r["meta"]["planted"] == "True"}
    assert {r["id"] for r in rows if r["overlap"]["found"]} == planted and len(planted) == n / 3
    assert s["contamination"]["contaminated"] == len(planted) and s["contamination"]["clean"][
        "documents"
    ] == len(rows) - len(planted)
    assert s["slices"]["planted"]["False"]["metrics"] == s["contamination"]["clean"]["metrics"]
    print(f"found {len(planted)} of {len(planted)}")


def test_compared(home):
    done = command("codex-nb", "compare", "b-0", "b-1", "a-0", "a-1", "--json", home=home)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (c,) = found["comparisons"]
    assert (
        c["shown"]
        and c["seeds"] == [2, 2]
        and c["bits_per_byte"]["high"] < 0
        and "2 of 2 seeds" in c["verdict"]
    )
    assert {r["setting"] for r in found["settings"]} == {"seed", "steps", "checkpoint"}
    same = json.loads(command("codex-nb", "compare", "a-0", "a-0", "--json", home=home).stdout)[
        "comparisons"
    ][0]
    assert (
        not same["shown"] and same["verdict"].startswith("no difference shown") and same["p"] == 1
    )
    shutil.copytree(home / "runs" / "a-0", home / "runs" / "hurt-0")
    with open(
        home / "runs" / "hurt-0" / "evaluations" / "validation" / "records.ndjson", "r+b"
    ) as f:
        f.seek(200)
        f.write(b"9")
    done = command("codex-nb", "compare", "b-0", "hurt-0", home=home)
    assert done.returncode == 1 and "the content has changed" in done.stderr


BAD = {
    "no such checkpoint": (dict(checkpoint="nowhere"), "nowhere: no such run here"),
    "no such data": (dict(data="/nowhere/at/all"), "there is no such file or folder"),
    "no such slice": (dict(slices=["season"]), "slices: no document has 'season'"),
    "no such task": (dict(task="riddles"), "no built-in task of that name"),
    "too many examples": (dict(task="questions", shots=90), "use fewer shots"),
    "no such metric": (
        dict(task="questions", task_metrics=["bleuu"]),
        "there is no metric 'bleuu'; did you mean bleu?",
    ),
    "stride": (dict(stride=100), "stride must be in 1..64, got 100"),
    "batch": (dict(eval_batch=0), "eval_batch: given 0"),
}


@pytest.mark.parametrize("name", BAD if PROVE else list(BAD)[::4])
def test_bad_input_is_one_clear_error(home, name):
    given, said = BAD[name]
    done = evaluate(
        home,
        f"bad-{name.replace(' ', '-')}",
        **(dict(max_documents=4) | (dict(max_questions=5) if "task" in given else {}) | given),
    )
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    folder = home / "runs" / f"bad-{name.replace(' ', '-')}"
    assert not list(folder.glob("evaluations/*/summary.json")) or "task" in given


def test_a_task_from_the_command_line(home):
    done = evaluate(
        home, "asked", task="questions", max_questions=24, task_metrics=["exact_match", "word_f1"]
    )
    assert done.returncode == 0, done.stderr
    s, rows = summary(home, "asked", "task-questions"), records(home, "asked", "task-questions")
    assert len(rows) == 24 and s["questions_in_task"] == 360
    for m, v in s["metrics"].items():
        if m != "f1_macro":
            assert math.isclose(
                v["value"], np.mean([r["scores"][m] for r in rows if m in r["scores"]])
            )
