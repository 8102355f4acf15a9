"""Number of active latents, firing density of each latent, and entropy of its values."""

from __future__ import annotations

import math

import numpy as np
import torch

from sae_experiments import quality_warnings as warned
from sae_experiments.errors import UserError
from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo

INFO = [
    MetricInfo(
        name="sae_l0",
        title="L0",
        formula="mean number of latents with z != 0 a character",
        unit="latents",
        better="target",
    ),
    MetricInfo(
        name="sae_sparsity",
        title="sparsity",
        formula="1 - L0 / d_sae",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="sae_dead_frac",
        title="dead",
        formula="share of latents that never fire on the held-out rows",
        better="down",
    ),
    MetricInfo(
        name="sae_dense_frac",
        title="dense",
        formula="share of latents that fire on more than a tenth of the rows",
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
#: Edges of the histogram of log10 density: bins of width 0.25.
DENSITY_EDGES = np.linspace(-7.0, 0.0, 29)


def measure(ctx: EvalContext, *, rows: int | None, entropy_latents: int) -> Measured:
    """L0, sparsity, dead and dense shares, mean entropy of a latent, and the density histogram.

    Outlier rows that the fit left out do not count: the SAE was not fitted to them. Most latents
    may fire on these few rows, which would hide that they are dead on all others.

    Args:
        ctx: Evaluation context.
        rows: Number of held-out rows, from the first on; None for all.
        entropy_latents: Number of latents, evenly spaced, that the mean entropy is taken over at
            most; bounds the memory.

    Raises:
        UserError: `entropy_latents` is less than 1.
    """
    if entropy_latents < 1:
        raise UserError(f"metric.sparsity.entropy_latents={entropy_latents} must be at least 1")
    stride = max(1, math.ceil(ctx.sae.d_sae / entropy_latents))
    picked = torch.arange(0, ctx.sae.d_sae, stride, device=ctx.device)
    fires = torch.zeros(ctx.sae.d_sae, dtype=torch.int64, device=ctx.device)
    picked_acts = []
    n = 0
    for x, codes in ctx.encoded(rows):
        ordinary = ctx.replaced(x)
        acts = codes if ordinary is None else codes[ordinary]
        fires += (acts != 0).sum(0)
        picked_acts.append(acts[:, picked].cpu())
        n += len(acts)
    density = (fires.double() / n).cpu().numpy()
    alive = density > 0
    columns = torch.cat(picked_acts).t().numpy()
    picked_alive = alive[picked.cpu().numpy()]
    entropies = [latent_entropy(column) for column in columns[picked_alive]]
    l0 = float(density.sum())
    values = {
        "sae_l0": l0,
        "sae_sparsity": float(1 - density.mean()),
        "sae_dead_frac": float((~alive).mean()),
        "sae_dense_frac": float((density > 0.1).mean()),
        "sae_latent_entropy": float(np.mean(entropies)) if entropies else None,
    }
    counts, _ = np.histogram(np.log10(density[alive]).clip(-7, 0), DENSITY_EDGES)
    arrays = {"density": density, "density_hist": counts, "density_edges": DENSITY_EDGES}
    once = int((fires == 1).sum())
    twice = int((fires == 2).sum())
    warnings = warned.of_dead(n, l0, ctx.sae.d_sae, once, twice)
    why_null = {} if entropies else {"sae_latent_entropy": "no latent fires"}
    return Measured(values, arrays, why_null, warnings=tuple(warnings))


def latent_entropy(values: np.ndarray) -> float:
    """Entropy of one latent's values in bits: firing or not, plus the bin of the value if firing.

    With f the firing frequency, n the number of non-zero values, and K non-empty ones of 64 bins
    between the 0.1 % and 99.9 % quantiles of these values,

        H = h2(f) + f * min(H_bins + (K - 1) / (2 n ln 2), 6)

    where the second term in the minimum is the Miller-Madow correction.

    Args:
        values: Values of the latent, (N,). Non-finite ones are left out.

    Returns:
        H in bits; h2(f) if all non-zero values are equal; 0 for empty input.
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
    # In float64: older releases of numpy work out the width of the bins in the type of the values.
    counts = np.histogram(on.astype(np.float64).clip(low, high), BINS, (low, high))[0]
    p = counts[counts > 0] / len(on)
    bias = (len(p) - 1) / (2 * len(on) * math.log(2))
    value_bits = float(-(p * np.log2(p)).sum()) + bias
    return firing + f * min(value_bits, math.log2(BINS))
