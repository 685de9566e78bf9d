"""Train, fine-tune and evaluate causal language models, offline and reproducibly.

    import codex_nb as cx

Names are loaded when they are first used, so this import is fast and needs neither torch nor
transformers. Each name is documented in its module; `help(cx.RunConfig)` shows it.
"""

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
    "model.causal_lm": ["build_model", "count_parameters", "flops_per_token"],
    "model.model_config": ["ModelConfig"],
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
    "eval.statistics": ["bootstrap_ratio", "paired_difference"],
    "run.settings": ["CompareConfig", "FinetuneConfig", "JudgeConfig", "RunConfig", "SweepConfig"],
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
    "run.preflight": ["LearnedText"],
    "run.trainer": ["Trainer"],
    "run.recipe": ["export_merged", "finish", "train_model"],
    "run.judging": ["judge", "judge_task", "train_and_judge"],
    "experiments.verify": ["verify_run"],
    "experiments.replay": ["replay"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        from difflib import get_close_matches

        near = get_close_matches(name, _MODULE_OF, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'codex_nb' has no attribute {name!r}{hint}")
    value = getattr(import_module(f"codex_nb.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
