"""Activations at our sites are those at TransformerLens' hook points of the same names."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers

from sae_experiments.models.hooks import activations
from sae_experiments.saes.saelens_config import hook_of_site
from support.layouts import GPT, LENGTH, NEOX, ROPE, VOCABULARY, WIDTH, all_sites, made

TOLERANCE = 1e-5
SHAPE = {
    "n_layers": 2,
    "d_model": WIDTH,
    "n_ctx": LENGTH,
    "d_vocab": VOCABULARY,
    "default_prepend_bos": False,
}
NEOX_SHAPE = {
    "n_heads": 4,
    "d_head": WIDTH // 4,
    "d_mlp": 24,
    "positional_embedding_type": "rotary",
    "rotary_adjacent_pairs": False,
}
#: Configuration of transformers, name of TransformerLens' conversion, and its configuration.
MODELS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "gpt2": (
        transformers.GPT2Config(**GPT),
        "convert_gpt2_weights",
        {
            "n_heads": 2,
            "d_head": WIDTH // 2,
            "d_mlp": 4 * WIDTH,
            "act_fn": "gelu_new",
            "normalization_type": "LN",
            "original_architecture": "GPT2LMHeadModel",
        },
    ),
    "gpt_neox": (
        transformers.GPTNeoXConfig(**NEOX),
        "convert_neox_weights",
        {
            **NEOX_SHAPE,
            "act_fn": "gelu",
            "normalization_type": "LN",
            "parallel_attn_mlp": True,
            "rotary_dim": WIDTH // 8,
            "original_architecture": "GPTNeoXForCausalLM",
        },
    ),
    "llama": (
        transformers.LlamaConfig(**ROPE),
        "convert_llama_weights",
        {
            **NEOX_SHAPE,
            "act_fn": "silu",
            "normalization_type": "RMS",
            "eps": 1e-6,
            "gated_mlp": True,
            "final_rms": True,
            "n_key_value_heads": 2,
            "rotary_dim": WIDTH // 4,
            "original_architecture": "LlamaForCausalLM",
        },
    ),
}


@pytest.mark.parametrize("layout", MODELS)
def test_sites_are_hook_points_of_transformer_lens(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = pytest.importorskip(
        "transformer_lens",
        reason="transformer-lens is not installed: pip install -e '.[peers]'",
    )
    if not hasattr(lens, "HookedTransformer"):
        pytest.skip("this transformer-lens has no model of its own to compare with")
    from transformer_lens.pretrained import weight_conversions

    # It is to be removed for one that wraps the model of transformers; this is the independent one.
    monkeypatch.setattr(warnings, "warn", lambda *args, **options: None)

    config, conversion, options = MODELS[layout]
    model = made(config)
    cfg = lens.HookedTransformerConfig(**SHAPE, **options)
    hooked = lens.HookedTransformer(cfg)
    weights = getattr(weight_conversions, conversion)(model, cfg)
    left = hooked.load_state_dict(weights, strict=False)
    # Masks and rotation tables are no weights; an output bias that a model lacks stays zero.
    assert not left.unexpected_keys
    buffers = ("mask", "IGNORE", "rotary_sin", "rotary_cos", "b_U")
    assert not [key for key in left.missing_keys if not key.endswith(buffers)]
    tokens = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    logits, cache = hooked.run_with_cache(tokens)
    ours = activations(model, tokens, all_sites(model))
    torch.testing.assert_close(
        logits.log_softmax(-1), model(tokens).logits.log_softmax(-1), atol=1e-4, rtol=1e-4
    )
    for site, values in ours.items():
        hook = hook_of_site(str(site))
        assert hook is not None, site
        if hook not in cache:
            assert str(site).startswith("mlp_in"), f"{hook} is no hook point of TransformerLens"
            continue
        theirs = cache[hook]
        error = float((values - theirs).abs().max() / theirs.abs().max())
        assert error < TOLERANCE, f"{site} is not {hook}: off by {error:.2g}"
