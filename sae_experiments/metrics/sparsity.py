"""How many latents are active, how often each one is, and what their values carry."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sae_experiments import quality_warnings as warned
from sae_experiments.errors import UserError
from sae_experiments.metrics.base import Bench, Measured, MetricInfo

INFO = [
    MetricInfo(name="sae_l0", title="L0", formula="mean number of latents with z != 0 a character", unit="latents", better="target"),
    MetricInfo(name="sae_sparsity", title="sparsity", formula="1 - L0 / d_sae", unit="", better="none", shown=False),
    MetricInfo(name="sae_dead_frac", title="dead", formula="share of latents that never fire on the held-out rows", unit="", better="down"),
    MetricInfo(
        name="sae_dense_frac",
        title="dense",
        formula="share of latents that fire on more than a tenth of the rows",
        unit="",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="sae_latent_entropy",
        title="latent entropy",
        formula="mean over alive latents of h2(f) + f H(64 bins of its positive values)",
        unit="bit",
        better="none",
        shown=False,
    ),
]

BINS = 64
DENSITY_EDGES = np.linspace(-7.0, 0.0, 29)  # log10 density, bins of width 0.25


def measure(bench: Bench, *, rows: int | None, entropy_latents: int) -> Measured:
    """L0, sparsity, dead and dense shares, the histogram of log10 densities and the mean entropy of a latent.

    The entropy is taken over at most ``entropy_latents`` latents, evenly spaced, to bound memory.
    """
    if entropy_latents < 1:
        raise UserError(f"metric.sparsity.entropy_latents={entropy_latents} must be at least 1")
    fires: Tensor | None = None
    kept, n = [], 0
    picked = torch.arange(0, bench.sae.d_sae, max(1, math.ceil(bench.sae.d_sae / entropy_latents)), device=bench.device)
    for r in bench.chunks(rows):
        now = (r.acts != 0).sum(0)
        fires = now if fires is None else fires + now
        kept.append(r.acts[:, picked].cpu())
        n += len(r.acts)
    density = (fires.double() / n).cpu().numpy()
    alive = density > 0
    columns = torch.cat(kept).t()
    entropies = [latent_entropy(c.numpy()) for c, a in zip(columns, alive[picked.cpu().numpy()], strict=True) if a]
    values = {
        "sae_l0": float(density.sum()),
        "sae_sparsity": float(1 - density.mean()),
        "sae_dead_frac": float((~alive).mean()),
        "sae_dense_frac": float((density > 0.1).mean()),
        "sae_latent_entropy": float(np.mean(entropies)) if entropies else None,
    }
    counts, _ = np.histogram(np.log10(density[alive]).clip(-7, 0), DENSITY_EDGES)
    arrays = {"density": density, "density_hist": counts, "density_edges": DENSITY_EDGES}
    once, twice = (int((fires == i).sum()) for i in (1, 2))
    warnings = warned.of_dead(n, values["sae_l0"], bench.sae.d_sae, once, twice)
    why = {} if entropies else {"sae_latent_entropy": "no latent fires"}
    return Measured(values, arrays, why, warnings=tuple(warnings))


def latent_entropy(values: np.ndarray) -> float:
    """Entropy in bits of one latent's values (N,): whether it fires, plus which of 64 bins its value falls in where it does.

    ``h2(f) + f (H_bins + (K - 1)/(2 n ln 2))`` with K non-empty bins between the 0.1 % and 99.9 % quantiles of the n non-zero values
    (Miller-Madow), capped at 6 bits. Non-finite values are left out; constant or empty input has entropy 0 beyond h2.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0
    on = values[values != 0]
    f = len(on) / len(values)
    firing = -sum(p * math.log2(p) for p in (f, 1 - f) if p > 0)
    if not len(on):
        return firing
    low, high = np.quantile(on, [0.001, 0.999])
    if not high - low > 1e-12 * max(1.0, abs(high)):
        return firing
    counts = np.histogram(on.clip(low, high), BINS, (low, high))[0]
    p = counts[counts > 0] / len(on)
    value_bits = float(-(p * np.log2(p)).sum()) + (len(p) - 1) / (2 * len(on) * math.log(2))
    return firing + f * min(value_bits, math.log2(BINS))
