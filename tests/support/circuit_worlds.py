"""Tiny language models of every known kind with two SAEs on them, for the tests of circuits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sae_experiments.models.hooks import Site, activations
from sae_experiments.saes.base import SAE
from sae_experiments.saes.batch_topk import BatchTopK
from sae_experiments.studies.circuits.attribution import Circuit

C, T, VOCABULARY, F = 24, 10, 18, 40


#: Options of the kinds with gated MLPs: grouped queries, heads of another width, windows.
GATED = {"llama": {}, "mistral": {"sliding_window": 4}, "qwen2": {}}
GATED |= {"qwen3": {"head_dim": 8}, "gemma": {"head_dim": 8}}
KINDS = ("gpt2", "gpt_neo", *GATED)


def model(kind: str, *, layers: int = 4, scale: float = 0.3) -> nn.Module:
    """A random model of one of `KINDS` in double precision, biases included; GPT-Neo's odd blocks
    attend locally.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoConfig,
        GPTNeoForCausalLM,
    )

    torch.manual_seed(0)
    names = {
        "vocab_size": VOCABULARY,
        "initializer_range": scale,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "gpt2":
        made: nn.Module = GPT2LMHeadModel(
            GPT2Config(n_layer=layers, n_head=2, n_embd=C, n_positions=T, **names)
        )
    elif kind in GATED:
        config = AutoConfig.for_model(
            kind,
            hidden_size=C,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=T,
            intermediate_size=3 * C,
            pad_token_id=None,
            **GATED[kind],
            **names,
        )
        made = AutoModelForCausalLM.from_config(config)
    else:
        types = [[["global", "local"], layers // 2]]
        config = GPTNeoConfig(
            hidden_size=C,
            num_layers=layers,
            num_heads=2,
            attention_types=types,
            window_size=4,
            max_position_embeddings=T,
            intermediate_size=3 * C,
            **names,
        )
        made = GPTNeoForCausalLM(config)
    for p in made.parameters():
        if p.ndim == 1:
            p.data += 0.1 * torch.randn_like(p)
    return made.double().eval()


def width(lm: nn.Module, site: Site) -> int:
    """Width of a site."""
    inner = 4 * C if "GPT2" in type(lm).__name__ else 3 * C
    return inner if site.stream == "mlp_act" else C


def sae(width: int, seed: int, *, d_sae: int = F) -> SAE:
    """A random SAE with biases."""
    torch.manual_seed(seed)
    made = BatchTopK(d_in=width, d_sae=d_sae, k=6).double()
    made.b_dec.data.normal_(0, 0.3)
    made.b_enc.data.normal_(0, 0.1)
    return made.eval().requires_grad_(False)


def tokens(n: int, seed: int = 0) -> Tensor:
    """Random prompts."""
    return torch.randint(0, VOCABULARY, (n, T), generator=torch.Generator().manual_seed(seed))


def circuit(
    lm: nn.Module, upstream: str, downstream: str, *, n: int = 3, memory_mb: float = 4.0
) -> tuple[Circuit, Tensor]:
    """A circuit between two sites, a fifth of the latents active, and prompts for it."""
    sites = [Site(s.split(".")[0], int(s.split(".")[1])) for s in (upstream, downstream)]
    ids, saes = tokens(n), []
    for i, site in enumerate(sites):
        made = sae(width(lm, site), i + 1)
        made.calibrate_threshold(activations(lm, ids, [site])[site].flatten(0, 1), 6)
        saes.append(made)
    return Circuit(lm, saes[0], sites[0], sites[0], saes[1], sites[1], memory_mb=memory_mb), ids
