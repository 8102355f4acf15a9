"""Tiny models of every layout."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from sae_experiments.models.hooks import (
    STREAMS,
    Site,
    blocks_of,
)

WIDTH, VOCABULARY, LENGTH = 16, 31, 12


NAMES = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}


GPT: dict[str, Any] = {**NAMES, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}


NEO: dict[str, Any] = {
    **NAMES,
    "hidden_size": WIDTH,
    "num_layers": 2,
    "num_heads": 2,
    "window_size": 4,
    "max_position_embeddings": LENGTH,
    "attention_types": [[["global", "local"], 1]],
}


PLAIN: dict[str, Any] = {
    **NAMES,
    "pad_token_id": None,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}


OPT = {**PLAIN, "word_embed_proj_dim": WIDTH, "ffn_dim": 24}


NEOX = {**PLAIN, "intermediate_size": 24, "rotary_pct": 0.5}


#: Grouped keys, and heads that are wider than their share of the stream.
ROPE = {**PLAIN, "intermediate_size": 24, "num_key_value_heads": 2}


WIDE = {**ROPE, "head_dim": 6}


MIXED = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}


#: By model type and a word about the form.
MADE = {
    ("gpt2", "wide"): transformers.GPT2Config(**GPT, n_inner=24),
    ("gpt2", "square"): transformers.GPT2Config(**GPT, n_inner=WIDTH),
    ("gpt2", "plain"): transformers.GPT2Config(**GPT),
    ("gpt_neo", "wide"): transformers.GPTNeoConfig(**NEO, intermediate_size=24),
    ("gpt_neo", "square"): transformers.GPTNeoConfig(**NEO, intermediate_size=WIDTH),
    ("gpt_neo", "plain"): transformers.GPTNeoConfig(**NEO),
    ("gpt_neox", "parallel"): transformers.GPTNeoXConfig(**NEOX),
    ("gpt_neox", "serial"): transformers.GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    ("opt", "plain"): transformers.OPTConfig(**OPT),
    ("llama", "plain"): transformers.LlamaConfig(**ROPE),
    ("mistral", "sliding"): transformers.MistralConfig(**WIDE, sliding_window=4),
    ("qwen2", "plain"): transformers.Qwen2Config(**ROPE),
    ("qwen3", "wide heads"): transformers.Qwen3Config(**WIDE),
    ("gemma", "wide heads"): transformers.GemmaConfig(**WIDE),
    ("gemma2", "mixed"): transformers.Gemma2Config(**WIDE, **MIXED, query_pre_attn_scalar=9),
    ("gemma3_text", "mixed"): transformers.Gemma3TextConfig(
        **WIDE, **MIXED, query_pre_attn_scalar=9
    ),
    ("phi", "plain"): transformers.PhiConfig(**PLAIN, intermediate_size=24),
    ("phi3", "plain"): transformers.Phi3Config(**ROPE),
}


def made(config: Any) -> nn.Module:
    """A random model whose parts are far enough from zero to be told apart."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for p in model.parameters():
        p.data.normal_(0.0 if p.ndim > 1 else 0.5, 0.3)
    return model.eval().requires_grad_(False)


def all_sites(model: nn.Module) -> list[Site]:
    n = len(blocks_of(model))
    inside = [Site(s, i + 1) for s in STREAMS if s != "resid" for i in range(n)]
    return [*(Site("resid", i) for i in range(n + 1)), *inside]
