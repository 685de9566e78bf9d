"""Small models of many architectures, and what this package makes of each, beside transformers."""

import contextlib
import io
import json

import torch
from helpers import write_model, write_tokenizer

TEXTS = [
    "The lamp stood by the river, and nobody knew who had lit it.",
    "Bread was baked at four, long before the market opened; at six it was gone.",
    "A letter came on Monday. It was short, and it said: come home.",
    "x",
    "Rain again, and again the bridge was closed to carts and horses.",
    "“Naïve café”, she read aloud: 37 words, no more.",
]
COMMON = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
GROUPED = COMMON | dict(num_key_value_heads=2, max_position_embeddings=128)
EXPERTS = GROUPED | dict(num_experts_per_tok=2)
OLDER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
# Model type -> settings
SHAPES = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | dict(head_dim=8),
    "gemma2": GROUPED | dict(head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
    "gemma3_text": GROUPED | dict(head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
    "phi3": GROUPED,
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gpt_neox": COMMON | dict(max_position_embeddings=128),
    "olmo2": GROUPED,
    "mistral": GROUPED | dict(head_dim=8, sliding_window=16),
    "granite": GROUPED,
    "smollm3": GROUPED,
    "mixtral": EXPERTS | dict(num_local_experts=4),
    "olmoe": EXPERTS | dict(num_experts=4),
    "opt": OLDER | dict(ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "falcon": OLDER | dict(max_position_embeddings=128),
    "mamba2": dict(hidden_size=32, num_hidden_layers=2, state_size=8, head_dim=8, num_heads=8)
              | dict(n_groups=1, chunk_size=8),
}  # fmt: skip
# Further ones: of other kinds of attention, recurrence and experts
MORE = {
    "gpt_oss": EXPERTS | dict(head_dim=8, num_local_experts=4, sliding_window=16),
    "qwen3_moe": EXPERTS | dict(head_dim=8, num_experts=4, moe_intermediate_size=32),
    "deepseek_v3": EXPERTS | dict(moe_intermediate_size=32, n_routed_experts=4, n_group=1)
                   | dict(topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8)
                   | dict(qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1)
                   | dict(num_key_value_heads=4),
    "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=8),
    "mpt": dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "rwkv": dict(hidden_size=32, attention_hidden_size=32, num_hidden_layers=2),
    "recurrent_gemma": COMMON | dict(num_hidden_layers=3, lru_width=32, attention_window_size=64),
    "zamba2": COMMON | dict(num_hidden_layers=3, mamba_d_state=8, mamba_headdim=8, n_mamba_heads=8)
              | dict(mamba_ngroups=1, chunk_size=8, max_position_embeddings=128)
              | dict(layers_block_type=["mamba", "hybrid", "mamba"], num_mem_blocks=1),
    "lfm2": GROUPED | dict(layer_types=["conv", "full_attention"], conv_L_cache=3),
    "qwen3_next": EXPERTS | dict(head_dim=8, num_experts=4, moe_intermediate_size=32)
                  | dict(shared_expert_intermediate_size=32, linear_num_key_heads=2)
                  | dict(linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
                  | dict(layer_types=["linear_attention", "full_attention"]),
}  # fmt: skip


def make_base(folder, kind, tokenizer=True):
    "A model of random weights, with a tokenizer of its own; returns the folder."
    size = write_tokenizer(folder, TEXTS, ["<|endoftext|>", "<s>"], "<s>", True, vocab_size=288)
    if not tokenizer:
        for path in folder.iterdir():
            path.unlink()
    ids = dict(vocab_size=size, eos_token_id=0, bos_token_id=1, pad_token_id=0)
    # Fresh weights give every token nearly the same logit.
    write_model(folder, kind, 4, **(SHAPES | MORE)[kind], **ids)
    return folder


def in_transformers(folder):
    "Model and tokenizer, without this package."
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from codex_nb.model.causal_lm import hide_progress_bars

    with hide_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def same_bits_per_byte(folder, model, tokenizer):
    "Whether the texts have the bits per byte that transformers computes, to 1e-5."
    from codex_nb.data.documents import Document
    from codex_nb.eval.scoring import score

    theirs, fast = in_transformers(folder)
    records = score(model, tokenizer, [Document(str(i), text=t) for i, t in enumerate(TEXTS)])
    expected = 0.0
    for text in TEXTS:
        ids = [*fast(text, split_special_tokens=True)["input_ids"], fast.eos_token_id]
        logits = theirs(torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
        expected -= logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
    return abs(sum(r.nll for r in records) / expected - 1) < 1e-5


def same_greedy_ids(folder, model, tokenizer, n=16):
    "Whether texts of several lengths, in one batch, go on as in transformers, one by one."
    from codex_nb.eval.eval_config import GenerateConfig
    from codex_nb.eval.generate import generate_batch

    theirs, fast = in_transformers(folder)
    prompts = TEXTS[:3]
    greedy = GenerateConfig(temperature=0, max_new_tokens=n)
    for prompt, made in zip(prompts, generate_batch(model, tokenizer, prompts, greedy)):
        ids = torch.tensor([fast(prompt)["input_ids"]])
        mask = torch.ones_like(ids)
        options = dict(do_sample=False, max_new_tokens=n, pad_token_id=0, attention_mask=mask)
        out = theirs.generate(ids, **options)[0, ids.shape[1] :].tolist()
        if made.ids != (out[: out.index(0)] if 0 in out else out):
            return False
    return True


@torch.no_grad()
def packed_as_alone(model, dataset):
    "Whether every document of packed rows gets the logits that it gets alone; None without any."
    from codex_nb.data.batches import to_batch
    from codex_nb.model.causal_lm import logits_of, takes_positions

    model.eval()
    found = []
    for i in range(min(8, len(dataset))):
        batch = to_batch(dataset, [i])
        logits, documents = (
            logits_of(model, batch)[0],
            dataset.documents(torch.tensor([i]).numpy())[0],
        )
        spans = [(documents == d).nonzero()[0] for d in {*documents.tolist()} - {-1}]
        for places in spans if len(spans) > 1 else []:
            part = slice(places[0], places[-1] + 1)
            positions = {"position_ids": batch.positions_BT[:, part]}
            options = positions if takes_positions(model) else {}
            alone = model(batch.ids_BT[:, part], use_cache=False, **options).logits[0]
            found.append(torch.allclose(logits[part], alone, atol=1e-4 * alone.abs().max().item()))
    return all(found) if found else None


def tensor_names(folder):
    from codex_nb.core.tensors import tensor_table, weight_files

    return {name for path in weight_files(folder) for name in tensor_table(path)}


SETTINGS = dict(seq_len=40, packing="best-fit", batch_size=4, steps=5, eval_every=5, save_every=5)
SETTINGS |= dict(eval_documents=4, max_documents=4, max_new_tokens=4, resamples=100, lr=1e-3)
SETTINGS |= dict(optimizer="adamw", monitor=False, device="cpu", dtype="fp32", products="torch")


def write_data(path):
    "Short texts, of which several fit a row."
    lines = [{"text": f"{t[:20]} {i}"} for i in range(12) for t in TEXTS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train_on(folder, data, run, **more):
    "Five steps, sealed and judged; the run, its model in memory, tokenizer and rows."
    from codex_nb.run import judging
    from codex_nb.run.settings import RunConfig
    from codex_nb.run.training_inputs import model_for, prepare_data, repacked, start_run

    cfg = RunConfig.from_preset("smoke", base=str(folder), data=str(data), **SETTINGS, **more)
    corpus, tokenizer, dataset = prepare_data(cfg)
    started = start_run("train", cfg, run, corpus=corpus, tokenizer=tokenizer, tokens=dataset.store)
    model = model_for(started.cfg, tokenizer)
    isolated = packed_as_alone(model, repacked(dataset, started.cfg))
    judging.train_model(started, corpus, tokenizer, dataset, model)
    judging.judge(started, model, tokenizer, corpus, judging.require_checkpoint(started.folder))
    return started, model, tokenizer, isolated


def examine(kind, home, data):
    "What this package makes of an architecture: a row of the table."
    from codex_nb.model.model_registry import import_model, load_model
    from codex_nb.run.judging import find_checkpoint, open_trained, require_checkpoint
    from codex_nb.run.preflight import preflight
    from codex_nb.run.recipe import export_merged, finish
    from codex_nb.run.settings import RunConfig

    source = make_base(home / "made" / kind, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        base = import_model(source, kind).path
        model, tokenizer = open_trained(find_checkpoint(str(base)))
        row = {
            "architecture": kind,
            "bits per byte": same_bits_per_byte(source, model, tokenizer),
            "greedy ids": same_greedy_ids(source, model, tokenizer),
        }
        settings = SETTINGS | dict(base=str(base), data=str(data))
        preflight(RunConfig.from_preset("smoke", **settings))

        run, trained, _, isolated = train_on(base, data, home / "runs" / f"{kind}-full")
        finish(run)
        reopened = load_model(require_checkpoint(run.folder).path)
        tensors = zip(trained.state_dict().values(), reopened.state_dict().values())
        row["packed"] = {True: "apart", False: "LEAKS", None: "padded"}[isolated]
        row["full"] = all(torch.equal(a, b) for a, b in tensors)
        stored = [require_checkpoint(run.folder).path]

        run, adapted, _, _ = train_on(base, data, home / "runs" / f"{kind}-lora", adapter="lora")
        grown = [p for name, p in adapted.named_parameters() if "lora_B" in name]
        row["LoRA"] = bool(grown) and all(p.any() for p in grown)
        merged = export_merged(run, adapted, tokenizer)
        finish(run)
        stored.append(merged.path)
        row["export"] = all(tensor_names(folder) == tensor_names(source) for folder in stored)
    return row
