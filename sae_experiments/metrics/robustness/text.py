"""Perturbed activations inside the language model, and agreement with SAEs from other seeds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr
from torch import Tensor

from sae_experiments.metrics.base import EvalContext, logits_of
from sae_experiments.metrics.robustness.noise import WINDOWS_PER_PASS, NoiseSource
from sae_experiments.metrics.robustness.sums import Sums
from sae_experiments.models.hooks import Site, capture, prefix_of, spliced
from sae_experiments.saes.base import SAE
from sae_experiments.saes.purified.perturb import NoiseModel
from sae_experiments.sampling import spread

#: Rows on which the stability of SAEs from different seeds is compared.
SEED_ROWS = 16_384
#: Decoder cosine above which latents of two SAEs count as the same feature.
MATCH_COSINE = 0.7
#: Fewest matched latents whose stability is correlated.
MIN_MATCHES = 10


class Denoising(NamedTuple):
    """Rise of the cross-entropy under noise at the site, in bits per character."""

    noisy: float | None
    """With the noisy activation."""
    denoised: float | None
    """With the reconstruction of the noisy activation; the SAE's own error is part of it."""


@torch.no_grad()
def denoising(
    ctx: EvalContext, cloud: NoiseModel, eps: float, windows: int, seed: int
) -> Denoising:
    """Rise of the cross-entropy under Gaussian noise, with and without denoising by the SAE.

    Outlier rows that the fit left out get no noise and are not rebuilt.

    Args:
        ctx: The SAE, the language model and the held-out text.
        cloud: Spread of the rows.
        eps: Size of the noise in units of R.
        windows: Held-out windows used, from the first.
        seed: Seed of the noise.

    Returns:
        Both rises; None without a language model, or unless the SAE rebuilds the one site it reads.
    """
    site, lm, store = ctx.read, ctx.lm, ctx.held_out
    if lm is None or lm.model is None or store is None:
        return Denoising(None, None)
    if not isinstance(site, Site) or site != ctx.write:
        return Denoising(None, None)
    if windows < 1 or not len(store.starts) or store.length < 2:
        return Denoising(None, None)
    sae, starts = ctx.sae, store.starts[:windows]
    g = torch.Generator(ctx.device).manual_seed(seed)
    clean = noisy = rebuilt = 0.0
    step = ctx.windows_per_pass(WINDOWS_PER_PASS)
    for begin in range(0, len(starts), step):
        x, y = (t.to(ctx.device) for t in lm.tokens(starts[begin : begin + step]))
        delta = cloud.directions("gaussian", x.numel(), g).mul_(eps * cloud.radius)
        delta = delta.view(*x.shape, -1)

        with capture(lm.model, [site]) as seen, prefix_of(lm.model, [site]) as prefixes:
            clean += _cross_entropy_sum(lm.model, x, y)
        activation = seen[site]
        replaced = ctx.replaced(activation.flatten(0, 1))
        noisy_rows = activation + delta
        denoised = sae(noisy_rows.flatten(0, 1)).view_as(activation)
        with spliced(lm.model, {site: noisy_rows}, replaced, prefixes[-1]):
            noisy += _cross_entropy_sum(lm.model, x, y)
        with spliced(lm.model, {site: denoised}, replaced, prefixes[-1]):
            rebuilt += _cross_entropy_sum(lm.model, x, y)
    # Sums in nats over all characters, as bits per character.
    unit = len(starts) * (store.length - 1) * math.log(2)
    return Denoising((noisy - clean) / unit, (rebuilt - clean) / unit)


def _cross_entropy_sum(model: Any, x: Tensor, y: Tensor) -> float:
    """Summed cross-entropy in nats over all positions but the first of windows (B, T)."""
    logits = logits_of(model, x)[:, 1:].float()
    return float(F.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten(), reduction="sum"))


@torch.no_grad()
def seeds_agree(
    ctx: EvalContext,
    noises: NoiseSource,
    x: Tensor,
    total: Sums,
    eps: float,
    min_fires: int,
    match: int,
) -> dict[str, float | None]:
    """Agreement about which latents are stable between an SAE and its replicas from other seeds.

    Decoder rows are matched one to one (Hungarian), and those of cosine above `MATCH_COSINE` kept.

    Args:
        ctx: The SAE and its replicas.
        noises: Noise for the rows.
        x: Held-out rows, (N, D).
        total: Sums of the SAE over all rows.
        eps: Size of the noise in units of R.
        min_fires: Minimum firings of a latent that counts as alive.
        match: Largest number of latents matched (the cost is cubic in it).

    Returns:
        Means over replicas (None without any) of `seed_rank`, the Spearman correlation of FSS
        between matched latents, and `seed_matched`, the share of the SAE's alive latents matched.
    """
    ranks: list[float] = []
    shares: list[float] = []
    mine = _sample(np.flatnonzero(total.alive(min_fires)), match)
    for replica in ctx.replicas:
        sums = noises.sums("gaussian", x[:SEED_ROWS], eps, replica)
        theirs = _sample(np.flatnonzero(sums.alive(min_fires)), match)
        if len(mine) < 3 or len(theirs) < 3:
            continue
        cosines = (_directions(noises.sae, mine) @ _directions(replica, theirs).t()).cpu().numpy()
        i, j = linear_sum_assignment(-cosines)
        same = cosines[i, j] > MATCH_COSINE
        shares.append(same.sum() / len(mine))
        if same.sum() >= MIN_MATCHES:
            rho: Any = spearmanr(total.fss()[mine[i[same]]], sums.fss()[theirs[j[same]]])
            ranks.append(float(rho.statistic))
    ranks = [rank for rank in ranks if math.isfinite(rank)]
    return {
        "seed_rank": float(np.mean(ranks)) if ranks else None,
        "seed_matched": float(np.mean(shares)) if shares else None,
    }


def _directions(sae: SAE, latents: np.ndarray) -> Tensor:
    """Unit decoder rows of some latents, (n, O)."""
    index = torch.from_numpy(latents).to(sae.W_dec.device)
    return F.normalize(sae.W_dec[index], dim=1)


def _sample(latents: np.ndarray, most: int) -> np.ndarray:
    """At most `most` latents, spread over all of them.

    Nested dictionaries keep latents in the order of their groups, so the first are no sample.
    """
    return latents[spread(len(latents), most)]
