"""Steering: the language model continues a text with a latent's decoder direction added."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from sae_experiments.metrics.base import EvalContext
from sae_experiments.models.gpt2 import CACHE, empty_cache
from sae_experiments.models.hooks import Site, patched
from sae_experiments.models.layouts import CausalLM
from sae_experiments.saes.base import SAE

#: Tokens of held-out text that the examples of a run start from.
PROMPT = 24
#: Sampling, unless something else is asked for.
TEMPERATURE, TOP_K = 0.8, 200


@torch.no_grad()
def direction(sae: SAE, latent: int, value: float) -> Tensor:
    """Change (O,) of the reconstruction by one latent at a value.

    If the SAE normalises rows, it is the change for a row of typical size.
    """
    acts = torch.zeros(2, sae.d_sae, device=sae.b_dec.device)
    acts[1, latent] = value
    nothing, something = sae.decode(acts)
    return something - nothing


def by_site(change: Tensor, widths: Mapping[Site, int]) -> dict[Site, Tensor]:
    """Split changes (R, O) of a reconstruction into those of each site that it consists of."""
    return dict(zip(widths, change.split(list(widths.values()), 1), strict=True))


@torch.no_grad()
def continued(
    model: CausalLM,
    prompt: Tensor,
    changes: Mapping[Site, Tensor],
    n: int,
    *,
    seed: int,
    temperature: float = TEMPERATURE,
    top_k: int = TOP_K,
) -> Tensor:
    """Continue one prompt in several versions, each with its own change of the activations.

    All versions use the same random numbers, so that they differ by the changes alone. When the
    context is full, its last half is read again.

    Args:
        model: The language model.
        prompt: Token ids (T,).
        changes: Vectors (R, D) that are added at every position of a site, for R versions.
        n: Tokens to write.
        seed: Seed of the sampling.
        temperature: Temperature of the sampling.
        top_k: Number of most probable tokens that are sampled from.

    Returns:
        Token ids (R, n).
    """
    versions, limit = len(next(iter(changes.values()))), model.config.n_positions
    out = prompt.expand(versions, -1)
    draws = torch.rand(n, generator=torch.Generator().manual_seed(seed)).to(prompt.device)
    window, past = out[:, -limit:], empty_cache(model)
    with ExitStack() as stack:
        for site, change in changes.items():
            stack.enter_context(patched(model, site, lambda x, c=change: x + c[:, None].to(x)))
        for draw in draws:
            if past.get_seq_length() + window.shape[1] > limit:
                window, past = out[:, -(limit // 2) :], empty_cache(model)
            given = {CACHE: past, "use_cache": True, "logits_to_keep": 1}
            logits = model(input_ids=window, **given).logits[:, -1].float() / temperature
            window = _sampled(logits, top_k, draw)
            out = torch.cat([out, window], 1)
    return out[:, len(prompt) :]


def _sampled(logits: Tensor, top_k: int, draw: Tensor) -> Tensor:
    """Tokens (R, 1) at one quantile of the distributions of logits (R, V), by falling logit."""
    ordered, ids = logits.sort(dim=1, descending=True, stable=True)
    ordered[:, top_k:] = -math.inf
    total = ordered.softmax(1).cumsum(1)
    places = (total < draw * total[:, -1:]).sum(1, keepdim=True)
    return ids.gather(1, places)


def examples(
    ctx: EvalContext,
    features: Sequence[Mapping[str, Any]] | None,
    *,
    latents: int,
    strength: float = 4.0,
    length: int = 60,
) -> list[dict[str, Any]]:
    """Continuations of held-out text under the latents that rules describe best.

    Each entry holds `latent` and `steering`. The latter has the `prompt`, and as `texts` three
    pairs of a strength (-strength, 0 and strength, in units of the latent's maximum) and a
    continuation.

    Args:
        ctx: The SAE, its language model and its held-out text.
        features: Descriptions of latents by the metrics: `latent`, `max`, and `f1` of its rule.
        latents: Number of latents.
        strength: Strength in units of the latent's maximum.
        length: Tokens to write.
    """
    lm, store = ctx.lm, ctx.held_out
    described = [f for f in features or () if f.get("f1") and f.get("max")]
    described.sort(key=lambda f: (-f["f1"], f["latent"]))
    described = described[:latents]
    if lm is None or store is None or not described:
        return []
    ctx.sae.eval()
    rows = [torch.zeros(ctx.sae.d_out, device=ctx.device)]  # the unchanged text, for all of them
    for feature in described:
        added = strength * direction(ctx.sae, feature["latent"], feature["max"])
        rows += [-added, added]
    widths = {site: store.width(site) for site in ctx.write_sites}
    prompt = lm.tokens(store.starts[:1])[0][0, : min(PROMPT, store.length)].to(ctx.device)
    ids = continued(lm.model, prompt, by_site(torch.stack(rows), widths), length, seed=0)
    plain, *changed = [spelled(ctx, row) for row in ids]
    return [
        {
            "latent": feature["latent"],
            "steering": {
                "prompt": spelled(ctx, prompt),
                "texts": [
                    [-strength, changed[2 * i]],
                    [0.0, plain],
                    [strength, changed[2 * i + 1]],
                ],
            },
        }
        for i, feature in enumerate(described)
    ]


def spelled(ctx: EvalContext, ids: Tensor) -> str:
    """The text of token ids (T,)."""
    return "".join(ctx.spell(i) for i in ids.tolist())
