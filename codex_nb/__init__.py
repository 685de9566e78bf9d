"""Train, fine-tune and evaluate causal language models, offline and reproducibly.

    import codex_nb as cx

    cfg = cx.RunConfig.from_preset("smoke", steps=60)
    run = cx.train_and_judge(cfg, corpus=["a text", "another", ...])
    run.summary, run.metrics

Names are loaded when they are first used, so this import is fast and needs neither torch nor
transformers. `help(cx.evaluate)`, or `cx.evaluate?` in Jupyter, shows a function with its
parameters.

Read data        read_path, build_corpus, open_corpus, Corpus, CorpusConfig, Document, Message
Tokenize         train_tokenizer, import_tokenizer, Tokenizer, TokenizerConfig, build_tokens,
                 TokenStore, PackedDataset
Build a model    build_model, load_model, ModelConfig, count_parameters, flops_per_token,
                 adapter_report
Settings         RunConfig, FinetuneConfig, PreferConfig, DistillConfig, JudgeConfig,
                 CompareConfig, SweepConfig
Train            train_and_judge, or step by step: prepare_data, tokenizer_for, dataset_for,
                 start_run, model_for, train_model, judge, judge_task, export_merged, finish,
                 print_next
Preferences      PreferenceDataset, PreferenceLoss, preference_pairs, pair_logps
Distillation     DistillationLoss, Teacher, open_teacher
Only the loop    fit, Trainer, TrainState, Hook, prepare_training, LearnedText
Evaluate         evaluate, score, sample_documents, summary_table, summary_lines, as_table
Compare          bootstrap, bootstrap_ratio, paired_difference
Generate         generate, reply, chat_cell, GenerateConfig
Runs             Run, RunRecord, find_run, list_runs, new_run_folder, find_base,
                 require_checkpoint, read_metrics, read_samples, plot_metrics, plot_system
Check a run      verify_run, replay
Errors           ConfigError, ReadError
"""

import sys
from importlib import import_module

__version__ = "0.1.0"

# Module -> the names that are taken from it
_EXPORTS = {
    "core.config": ["ConfigError"],
    "data.documents": ["Document", "Message", "ReadError"],
    "data.readers": ["read_path"],
    "data.corpus": ["Corpus", "CorpusConfig", "build_corpus", "open_corpus"],
    "data.tokenizer": ["Tokenizer"],
    "data.tokenizer_training": ["TokenizerConfig", "import_tokenizer", "train_tokenizer"],
    "data.tokens": ["PackedDataset", "TokenStore", "build_tokens"],
    "data.pairs": ["PreferenceDataset"],
    "model.causal_lm": ["build_model", "count_parameters", "flops_per_token"],
    "model.model_config": ["ModelConfig"],
    "model.distillation_loss": ["DistillationLoss"],
    "model.preference_loss": ["PreferenceLoss"],
    "model.adapters": ["adapter_report"],
    "model.model_registry": ["load_model"],
    "tracking.metrics_log": ["plot_metrics", "read_metrics", "read_samples"],
    "tracking.system_monitor": ["plot_system"],
    "train.checkpoint": ["require_checkpoint"],
    "train.engine": ["Hook", "TrainState", "fit"],
    "eval.eval_config": ["GenerateConfig"],
    "eval.evaluate": ["as_table", "evaluate", "summary_lines", "summary_table"],
    "eval.generate": ["generate", "reply"],
    "eval.scoring": ["sample_documents", "score"],
    "eval.statistics": ["bootstrap", "bootstrap_ratio", "paired_difference"],
    "run.settings": [
        "CompareConfig",
        "DistillConfig",
        "FinetuneConfig",
        "JudgeConfig",
        "PreferConfig",
        "RunConfig",
        "SweepConfig",
    ],
    "run.run_record": ["RunRecord"],
    "run.run_folder": ["Run", "find_run", "list_runs", "new_run_folder"],
    "run.bases": ["find_base"],
    "run.next_steps": ["print_next"],
    "run.training_inputs": [
        "dataset_for",
        "model_for",
        "prepare_data",
        "prepare_training",
        "start_run",
        "tokenizer_for",
    ],
    "run.reference": ["pair_logps", "preference_pairs"],
    "run.teacher": ["Teacher", "open_teacher"],
    "run.preflight": ["LearnedText"],
    "run.trainer": ["Trainer"],
    "run.recipe": ["export_merged", "finish", "train_model"],
    "run.judging": ["judge", "judge_task", "train_and_judge"],
    "experiments.verify": ["verify_run"],
    "experiments.replay": ["replay"],
    "deploy.chat_cell": ["chat_cell"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = list(_MODULE_OF)


def system_problem() -> str | None:
    "Why the package cannot be used on this system, in a sentence; None where it can."
    if sys.platform != "win32":
        return None
    return (
        "codex_nb runs on Linux and macOS, and not on Windows itself: use it in the Windows "
        "Subsystem for Linux, which wsl --install sets up"
    )


def __getattr__(name: str):
    if name not in _MODULE_OF:
        from difflib import get_close_matches

        near = get_close_matches(name, _MODULE_OF, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'codex_nb' has no attribute {name!r}{hint}")
    if problem := system_problem():
        raise ImportError(problem)
    value = getattr(import_module(f"codex_nb.{_MODULE_OF[name]}"), name)
    _complete_docs(value)
    globals()[name] = value  # found at once from now on
    return value


def _complete_docs(value) -> None:
    "So that `help` shows the parameters, also of what a function returns."
    import re

    from codex_nb.core.docstrings import complete_doc

    complete_doc(value)
    returned = str(getattr(value, "__annotations__", {}).get("return", ""))
    for name in {*re.findall(r"\w+", returned)} & _MODULE_OF.keys():
        complete_doc(getattr(import_module(f"codex_nb.{_MODULE_OF[name]}"), name))


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"]
