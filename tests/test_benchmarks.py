"Public benchmarks: what is scored is what lm-evaluation-harness scores, choice by choice."

import csv
import gzip
import io
import json
import logging
import math
from pathlib import Path

import pytest
import yaml
from helpers import PROVE, write_model, write_tokenizer

# All texts are invented for these tests; only the form is that of the benchmarks.
ARC = [
    ("z-1", "Which of these is heaviest?", ["a feather", "a whale", "a pea"], "ABC", "B"),
    ("z-2", "What do bees make?", ["honey", "bread", "glass", "rain"], "1234", "1"),
    ("z-3", "Was trägt Äpfel?", ["ein Stein", "ein Apfelbaum", "eine Tür"], "ABC", "B"),
    ("z-4", "Where is a fish at home? ", ["in the sky", "in water", "on a roof"], "ABC", "B"),
]
HELLASWAG = [
    dict(
        ind=4,
        activity_label="Baking a cake",
        ctx_a="A girl breaks two eggs [step] into a bowl.",
        ctx_b="she",
        label=2,
        split_type="indomain",
        endings=["sings.", "runs  away from it.", "stirs them [substeps] with flour.", "é à ü."],
    ),
    dict(
        ind=5,
        activity_label="[header] How to fold a boat [title] Take a sheet",
        ctx_a="Fold it in half. [substeps]",
        ctx_b="",
        label=0,
        split_type="zeroshot",
        endings=["Open the fold.", "Burn it.", "Eat it with a spoon.", "Sail to Rome now."],
    ),
]
PIQA = [
    ("To dry a wet book,", "put paper between its pages.", "put it into the sea.", 0),
    ("How to find north?\n", "Ask a stone.", "Use a compass, and hold it level.", 1),
    ("Keep bread fresh", "in a closed box", "in a closed boat", 0),
]
WINOGRANDE = [
    ("w-1", "The nail bent under the hammer because the _ was soft.", "nail", "hammer", "1"),
    ("w-2", "Ida gave Ole her coat since _ was cold.", "Ida", "Ole", "2"),
    ("w-3", "The cup is in the bag, so the _ is larger .", "cup", "bag", "2"),
]
MMLU = {
    "dev": [
        ("How many legs has a spider?", ["4", "6", "8", "10"], "C"),
        ("Which is a bird?", ["eel", "owl", "elk", "ant"], "B"),
        ("What is blood?", ["a tissue, fluid", "a bone", "an organ", "a nerve"], "A"),
    ],
    "test": [
        ("Which organ pumps blood?", ["the ear", "the heart", "the skin", "the nose"], "B"),
        ('What is a "joint"? ', ["a place, of two bones", "a tooth", "a vein", "hair"], "A"),
    ],
}
LAMBADA = [
    'The lamp went out. "Do not move," she said, and he did not move',
    "He had one shoe, and all day he looked for the other shoe",
    "In the end the old man ate the apple, and gave the boy the core — süß",
]
BOOLQ = [
    ("Moss is a plant. " * 60 + "It has no roots.", "is moss a plant", True),
    ("A tin can is made of steel.", "are tin cans made of wood", False),
]
SEQ_LEN = 256
# The harness's own model class, and our adapter, which chapter 58 compares as well
WAYS = ["hflm", "adapter"] if PROVE else ["hflm"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    "A model of random weights whose tokenizer puts an id in front of every text."
    folder = tmp_path_factory.mktemp("model")
    texts = [*LAMBADA, *(row[1] for row in ARC), *(row[0] for row in PIQA)]
    special = ["<|end|>", "<|begin|>"]
    size = write_tokenizer(folder, texts, special, bos=special[1], opens=True)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(vocab_size=size, max_position_embeddings=SEQ_LEN, tie_word_embeddings=True)
    write_model(folder, sharper=8, **shape)
    return folder


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def csv_text(rows):
    out = io.StringIO()
    csv.writer(out).writerows([q, *choices, letter] for q, choices, letter in rows)
    return out.getvalue()


def arc_rows(nested):
    for name, stem, texts, labels, key in ARC:
        if nested:
            options = [{"text": t, "label": k} for t, k in zip(texts, labels)]
            yield {"id": name, "question": {"stem": stem, "choices": options}, "answerKey": key}
        else:
            choices = {"text": texts, "label": [*labels]}
            yield {"id": name, "question": stem, "choices": choices, "answerKey": key}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "The benchmarks in their authors' form: a path for each."
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "arc.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(r) + "\r\n" for r in arc_rows(True)).encode("utf-8-sig"))
    )
    write_lines(folder / "hellaswag_val.jsonl", HELLASWAG)
    write_lines(
        folder / "piqa" / "valid.jsonl", [{"goal": g, "sol1": a, "sol2": b} for g, a, b, _ in PIQA]
    )
    (folder / "piqa" / "valid-labels.lst").write_text("".join(f"{r[3]}\n" for r in PIQA))
    names = ("qID", "sentence", "option1", "option2")
    write_lines(folder / "wino" / "dev.jsonl", [dict(zip(names, r)) for r in WINOGRANDE])
    (folder / "wino" / "dev-labels.lst").write_text("".join(f"{r[4]}\n" for r in WINOGRANDE))
    for part, rows in MMLU.items():
        path = folder / "data" / part / f"anatomy_{part}.csv"
        path.parent.mkdir(parents=True)
        path.write_text(csv_text(rows), "utf-8")
    write_lines(folder / "lambada_test.jsonl", [{"text": text} for text in LAMBADA])
    (folder / "lambada_test_plain_text.txt").write_text("".join(f"{t}\n" for t in LAMBADA))
    rows = [dict(passage=p, question=q, answer=a, title="-") for p, q, a in BOOLQ]
    write_lines(folder / "boolq.jsonl", rows)
    return {
        "arc_easy": folder / "arc.jsonl.gz",
        "hellaswag": folder / "hellaswag_val.jsonl",
        "piqa": folder / "piqa",
        "winogrande": folder / "wino",
        "mmlu": folder / "data",
        "lambada_openai": folder / "lambada_test.jsonl",
        "lambada_standard": folder / "lambada_test_plain_text.txt",
        "boolq": folder / "boolq.jsonl",
    }


# The rows as the harness's own task files expect them
HARNESS_ROWS = {
    "arc_easy": [*arc_rows(False)],
    "hellaswag": [row | {"label": str(row["label"])} for row in HELLASWAG],
    "piqa": [dict(goal=g, sol1=a, sol2=b, label=k) for g, a, b, k in PIQA],
    "winogrande": [
        dict(sentence=s, option1=a, option2=b, answer=k) for _, s, a, b, k in WINOGRANDE
    ],
    "mmlu_anatomy": [
        dict(question=q, subject="anatomy", choices=c, answer="ABCD".index(k))
        for q, c, k in MMLU["test"]
    ],
    "lambada_openai": [{"text": text} for text in LAMBADA],
    "boolq": [dict(passage=p, question=q, label=int(a)) for p, q, a in BOOLQ],
}
HARNESS_FILES = {
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "mmlu_anatomy": "mmlu/default/mmlu_anatomy.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "boolq": "super_glue/boolq/default.yaml",
}


@pytest.fixture(scope="module")
def harness_tasks(tmp_path_factory):
    "The harness's own tasks, words and all, with our rows in place of the ones it downloads."
    import lm_eval.tasks

    folder, known = tmp_path_factory.mktemp("harness"), Path(lm_eval.tasks.__file__).parent
    for name, rows in HARNESS_ROWS.items():
        data = {"test": str(write_lines(folder / f"{name}.json", rows))}
        task = {"include": str(known / HARNESS_FILES[name]), "task": f"our_{name}"}
        task |= dict(dataset_path="json", dataset_name=None, tag=None, test_split="test")
        task |= dict(training_split=None, validation_split=None)
        if name == "mmlu_anatomy":
            shown = [
                dict(question=q, subject="anatomy", choices=c, answer="ABCD".index(k))
                for q, c, k in MMLU["dev"]
            ]
            data["dev"] = str(write_lines(folder / "dev.json", shown))
            task["num_fewshot"] = 1
        task["dataset_kwargs"] = {"data_files": data}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def by_harness(model_folder, harness_tasks):
    "What the harness finds with its own model class, and through our adapter."
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from codex_nb.core.config import environment_with
    from codex_nb.data.tokenizer_training import import_tokenizer
    from codex_nb.eval.lm_eval_adapter import lm_eval_model
    from codex_nb.model.model_registry import load_model

    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    cache = str(harness_tasks / ".cache")
    offline = dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_CACHE=cache)
    ours = lm_eval_model(load_model(model_folder), import_tokenizer(model_folder))
    theirs = HFLM(pretrained=str(model_folder), device="cpu", dtype="float32", batch_size=4)
    found = {}
    with environment_with(**offline):
        for name, lm in zip(WAYS, (theirs, ours)):
            found[name] = simple_evaluate(
                model=lm,
                tasks=[f"our_{name}" for name in HARNESS_ROWS],
                bootstrap_iters=0,
                log_samples=True,
                task_manager=TaskManager(include_path=str(harness_tasks), include_defaults=False),
            )
    return found


@pytest.fixture(scope="module")
def ours(model_folder, files):
    "Our answers to each benchmark, with their summary."
    from codex_nb.core.store import TemporaryWorkspace
    from codex_nb.data.tokenizer_training import import_tokenizer
    from codex_nb.eval.benchmarks import import_task, open_task
    from codex_nb.eval.eval_config import TaskConfig
    from codex_nb.eval.tasks import ask, summarize_answers
    from codex_nb.model.model_registry import load_model

    model, tokenizer, found = load_model(model_folder), import_tokenizer(model_folder), {}
    with TemporaryWorkspace():
        for name, path in files.items():
            import_task(name, path)
            task = open_task(name)
            cfg = TaskConfig(task=name, shots=1 if name == "mmlu" else 0)
            answers = ask(
                model, tokenizer, task.questions, cfg, pool=task.examples, sampler=task.sampler
            )
            found[name] = answers, summarize_answers(answers, 200)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HARNESS_ROWS)
def test_every_choice_is_as_likely_as_in_the_harness(by_harness, ours, name, way):
    result, task = by_harness[way], f"our_{name}"
    answers, summary = ours["mmlu" if name == "mmlu_anatomy" else name]
    samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(answers) == len(HARNESS_ROWS[name])
    for sample, answer in zip(samples, answers):
        likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
        assert [-x for x in answer.nll] == pytest.approx(likelihoods, abs=1e-4)
        for metric in ("acc", "acc_norm"):
            assert metric not in sample or sample[metric] == answer.scores[metric]
    figures = {k.partition(",")[0]: v for k, v in result["results"][task].items()}
    for metric in {"acc", "acc_norm", "perplexity"} & {*figures}:
        assert summary["metrics"][metric]["value"] == pytest.approx(figures[metric], rel=1e-5)
    assert "acc" in figures


def test_what_was_asked_leaves_nothing_to_chance(ours):
    "The comparison is worthless if no choice is close, none is long, or none is cut."
    answers = [a for found, _ in ours.values() for a in found]
    assert {0.0, 1.0} == {a.scores["acc"] for a in answers}
    assert any(a.scores.get("acc_norm", a.scores["acc"]) != a.scores["acc"] for a in answers)
    assert any("cut_left" in a.meta for a in ours["boolq"][0])
    assert "were cut on the left" in ours["boolq"][1]["notes"][-1]
    assert [a.nll for a in ours["lambada_openai"][0]] == [
        a.nll for a in ours["lambada_standard"][0]
    ]
    normalised = {k: v.get("normalised_by") for k, v in ours["arc_easy"][1]["metrics"].items()}
    assert normalised == {"acc": "nothing", "acc_norm": "characters", "acc_bytes": "bytes"}


SOLUTIONS = [
    ("3 * 4 = 12\n#### 12", "3 * 4 is 12.\n#### 12"),
    ("#### 1,250", "so $1,250. in all"),
    ("#### 7", "#### 7. Next, 8"),
    ("#### -3", "It is minus three"),
    ("#### 40", "#### $40"),
]


def test_results_of_solutions_are_read_as_in_the_harness():
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    from codex_nb.eval.answer_checks import number_scores

    ignored = [",", "\\$", "(?s).*#### ", "\\.$"]
    patterns = {
        "exact_match": RegexFilter("#### (\\-?[0-9\\.\\,]+)"),
        "exact_match_flexible": RegexFilter("(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
    }
    for solution, text in SOLUTIONS:
        scores = number_scores(text, solution)
        for name, pattern in patterns.items():
            ((found,),) = pattern.apply([[text]], [{}])
            theirs = exact_match_hf_evaluate(
                [found], [solution], regexes_to_ignore=ignored, ignore_case=True
            )
            assert scores[name] == theirs["exact_match"], (name, text)


def core_reference(model_folder, data, kind, shots, delimiter):
    "CORE by a plain loop, as nanochat's description has it: one row at a time, mean loss a token."
    import random

    import torch

    from codex_nb.data.tokenizer_training import import_tokenizer
    from codex_nb.model.model_registry import load_model

    model, tokenizer = load_model(model_folder), import_tokenizer(model_folder)
    data = [*data]
    random.Random(1337).shuffle(data)
    right = []
    for i, item in enumerate(data):
        others = [row for k, row in enumerate(data) if k != i]
        before = "".join(
            {
                "multiple_choice": lambda e: e["query"] + delimiter + e["choices"][e["gold"]],
                "schema": lambda e: e["context_options"][e["gold"]] + delimiter + e["continuation"],
                "language_modeling": lambda e: e["context"].strip() + delimiter + e["continuation"],
            }[kind](e)
            + "\n\n"
            for e in random.Random(1234 + i).sample(others, shots)
        )
        if kind == "multiple_choice":
            texts = [before + item["query"] + delimiter + c for c in item["choices"]]
        elif kind == "schema":
            texts = [before + c + delimiter + item["continuation"] for c in item["context_options"]]
        else:
            start = before + item["context"].strip() + delimiter
            texts = [start.strip(), start + item["continuation"]]
        rows = [[*tokenizer.opening, *tokenizer.encode(t)] for t in texts]
        same = 0
        while same < min(map(len, rows)) and len({tuple(r[: same + 1]) for r in rows}) == 1:
            same += 1
        ends = 0
        while ends < min(map(len, rows)) and len({tuple(r[-ends - 1 :]) for r in rows}) == 1:
            ends += 1
        losses = []
        for row in rows if kind != "language_modeling" else rows[1:]:
            first = {"multiple_choice": same, "schema": len(row) - ends}.get(kind, len(rows[0]))
            with torch.no_grad():
                logp = model(torch.tensor([row])).logits[0].log_softmax(-1)
            targets = range(first, len(row))
            losses.append(-sum(logp[t - 1, row[t]].item() for t in targets) / len(targets))
            greedy = all(int(logp[t - 1].argmax()) == row[t] for t in targets)
        is_right = (
            greedy if kind == "language_modeling" else losses.index(min(losses)) == item["gold"]
        )
        right.append((float(is_right), losses))
    return right


CORE = {
    "multiple_choice": (
        "\nAnswer: ",
        1,
        [
            {"query": f"Is {n} big?", "choices": ["no", "not at all", "yes"], "gold": n % 3}
            for n in range(6)
        ],
    ),
    "schema": (
        " ",
        0,
        [
            {
                "context_options": [f"Ida ({n})", f"Ole ({n}) who"],
                "continuation": "was cold",
                "gold": n % 2,
            }
            for n in range(5)
        ],
    ),
    "language_modeling": (
        " ",
        2,
        [{"context": f" {n} and one ", "continuation": f"is {n + 1}"} for n in range(5)],
    ),
}


def test_core_is_scored_as_a_plain_loop_scores_it(model_folder, tmp_path):
    from codex_nb.core.store import TemporaryWorkspace
    from codex_nb.data.tokenizer_training import import_tokenizer
    from codex_nb.eval.benchmarks import import_task, open_task
    from codex_nb.eval.eval_config import TaskConfig
    from codex_nb.eval.tasks import ask
    from codex_nb.model.model_registry import load_model

    entries, baselines = [], ["Eval Task,Random baseline"]
    for kind, (delimiter, shots, rows) in CORE.items():
        write_lines(tmp_path / "eval_data" / f"{kind}.jsonl", rows)
        entry = dict(label=kind, dataset_uri=f"{kind}.jsonl", num_fewshot=[shots])
        entries.append(entry | dict(icl_task_type=kind, continuation_delimiter=delimiter))
        baselines.append(f"{kind},{0 if kind == 'language_modeling' else 50}")
    (tmp_path / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    (tmp_path / "eval_meta_data.csv").write_text("\n".join(baselines) + "\n")
    model, tokenizer = load_model(model_folder), import_tokenizer(model_folder)
    with TemporaryWorkspace():
        import_task("core", tmp_path)
        for kind, (delimiter, shots, rows) in CORE.items():
            task = open_task(f"core_{kind}")
            cfg = TaskConfig(task=task.name, shots=task.shots)
            answers = ask(
                model, tokenizer, task.questions, cfg, pool=task.examples, sampler=task.sampler
            )
            expected = core_reference(model_folder, rows, kind, shots, delimiter)
            metric = "acc" if kind == "language_modeling" else "acc_per_token"
            assert [a.scores[metric] for a in answers] == [right for right, _ in expected], kind
            if shots == 0:
                continue
            for a, (_, losses) in zip(answers, expected):
                # the same tokens: the ratio of sum and mean is a whole number
                ratios = [n / mean for n, mean in zip(a.nll, losses)]
                assert ratios == pytest.approx([round(r) for r in ratios], abs=1e-3), kind


def test_a_refused_file_leaves_no_task_behind(files, tmp_path):
    from codex_nb.core.config import ConfigError
    from codex_nb.core.store import TemporaryWorkspace
    from codex_nb.data.documents import ReadError
    from codex_nb.eval.benchmarks import import_task, list_tasks

    write_lines(
        tmp_path / "valid.jsonl", [{"goal": g, "sol1": a, "sol2": b} for g, a, b, _ in PIQA]
    )
    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    with TemporaryWorkspace() as workspace:
        with pytest.raises(ReadError, match="has 2 answers for 3 questions"):
            import_task("piqa", tmp_path)
        (tmp_path / "valid-labels.lst").unlink()
        with pytest.raises(ReadError, match=r"valid.jsonl:1: has no answer, as in a test set"):
            import_task("piqa", tmp_path)
        with pytest.raises(ReadError, match=r":2: has 7 columns"):
            bad = tmp_path / "anatomy_test.csv"
            bad.write_text(csv_text(MMLU["test"][:1]) + "a,b,c,d,e,A,B\n")
            import_task("mmlu", bad)
        with pytest.raises(ConfigError, match=r"shots: 5 requested, but only \d .*with --shots"):
            few = [{"question": q, "answer": "#### 4"} for q in ("2 + 2?", "1 + 3?")]
            write_lines(tmp_path / "test.jsonl", few)
            import_task("gsm8k", tmp_path)
        assert list_tasks() == [] and not [*workspace.path.rglob("questions.jsonl")]


@pytest.mark.parametrize("name", ["arc_easy", "hellaswag", "piqa", "winogrande", "boolq"])
def test_a_table_of_the_hub_gives_the_same_questions(files, tmp_path, name):
    import msgspec
    import pyarrow
    import pyarrow.parquet

    from codex_nb.eval.benchmarks import read_benchmark

    path = tmp_path / "validation-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(HARNESS_ROWS[name]), path)
    ours, tables = (read_benchmark(name, p)[0] for p in (files[name], path))
    plain = [[msgspec.structs.replace(q, id="", group=None) for q in x] for x in (ours, tables)]
    assert plain[0] == plain[1]


def test_perplexity_is_of_whole_words(ours):
    answers, summary = ours["lambada_openai"]
    mean = math.fsum(a.nll[0] for a in answers) / len(answers)
    assert summary["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(mean))


def test_a_task_file_of_the_harness_becomes_a_sealed_run(
    model_folder, harness_tasks, by_harness, tmp_path, monkeypatch
):
    from codex_nb.eval.evaluate import read_evaluation
    from codex_nb.eval.tasks import Answer
    from codex_nb.experiments.verify import verify_run
    from codex_nb.run.judging import find_checkpoint, judge_tasks, open_trained
    from codex_nb.run.recipe import finish
    from codex_nb.run.settings import JudgeConfig
    from codex_nb.run.training_inputs import start_run

    monkeypatch.setenv("CODEX_NB_HOME", str(tmp_path))
    found = find_checkpoint(str(model_folder))
    task = str(harness_tasks / "arc_easy.yaml")
    cfg = JudgeConfig.from_preset("smoke", task=task, dtype="fp32", checkpoint=str(model_folder))
    run = start_run("evaluate", cfg, tmp_path / "runs" / "asked", checkpoint=found)
    (summary,) = judge_tasks(run, *open_trained(found), found)
    finish(run)
    assert verify_run(run.folder)["problems"] == []
    expected = by_harness["hflm"]["results"]["our_arc_easy"]
    for metric in ("acc", "acc_norm"):
        assert summary["metrics"][metric]["value"] == expected[f"{metric},none"]
    assert summary["harness"]["results"]["acc,none"] == expected["acc,none"]
    answers = read_evaluation(run.folder / "evaluations" / "task-our_arc_easy", Answer)[1]
    samples = sorted(by_harness["hflm"]["samples"]["our_arc_easy"], key=lambda s: s["doc_id"])
    for answer, sample in zip(answers, samples):
        likelihoods = [-float(response[0]) for response in sample["filtered_resps"]]
        assert answer.nll == pytest.approx(likelihoods, abs=1e-4)
