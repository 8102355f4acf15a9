"""Stability over the size of the noise, for every kind of noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.integrate import trapezoid
from torch import Tensor

from sae_experiments.metrics.robustness.noise import NoiseSource
from sae_experiments.metrics.robustness.sums import Sums

#: Measures of a curve: name -> name in `Sums.summary`. The FVU follows from the reconstruction.
FROM_SUMS = {"fss": "fss_pooled", "change": "change", "sci": "sci", "jaccard": "jaccard"}
NAMES = (*FROM_SUMS, "fvu")
#: Firings from which a latent is alive on the rows of a curve.
MIN_FIRES = 10


@dataclass(frozen=True)
class CurveRows:
    """Rows on which curves are measured."""

    x: Tensor
    """Inputs, (N, D)."""
    y: Tensor
    """Targets, (N, O)."""
    clean: Tensor
    """Codes of the inputs, (N, F)."""

    @property
    def variance(self) -> float:
        """Squared distance of the targets from their mean, summed over the rows."""
        return float((self.y - self.y.mean(0)).double().square().sum())


def curve(noises: NoiseSource, kind: str, rows: CurveRows, sizes: Sequence[float]) -> np.ndarray:
    """Measures under one kind of noise.

    Args:
        noises: Noise for the rows.
        kind: The kind of noise.
        rows: The rows.
        sizes: Sizes of the noise in units of R.

    Returns:
        Values (measures, sizes) in the order of `NAMES`; NaN if undefined.
    """
    sae = noises.sae
    variance = rows.variance
    values = np.full((len(NAMES), len(sizes)), np.nan)
    for j, eps in enumerate(sizes):
        perturbed = rows.x + noises.delta(kind, rows.x, 0, eps)
        codes = sae.encode(perturbed)
        sums = Sums(sae.d_sae)
        sums.add(rows.clean, codes)
        summary = sums.summary(sums.alive(MIN_FIRES))
        measures = [summary[name] for name in FROM_SUMS.values()]
        error = float((rows.y - sae.reconstruct(perturbed, codes)).double().square().sum())
        measures.append(error / variance if variance > 0 else None)
        values[:, j] = [math.nan if value is None else value for value in measures]
    return values


def area(sizes: Sequence[float], fss: np.ndarray) -> float | None:
    """Mean of FSS (sizes,) over the logarithm of the sizes above 0 (trapezoids), in [0, 100]."""
    defined = [i for i, size in enumerate(sizes) if size > 0 and math.isfinite(fss[i])]
    if len(defined) < 2:
        return None
    logs = np.log([sizes[i] for i in defined])
    return float(trapezoid(fss[defined], logs) / (logs[-1] - logs[0]))


def size_at_half(sizes: Sequence[float], fss: np.ndarray) -> float | None:
    """First size at which FSS (sizes,) is 50; None if it never is.

    Interpolated along a straight line in log size (in size, from a size of 0).
    """
    for i in range(1, len(sizes)):
        if fss[i] <= 50 < fss[i - 1]:
            share = (fss[i - 1] - 50) / (fss[i - 1] - fss[i])
            if sizes[i - 1] == 0:
                return float(sizes[i] * share)
            log_before, log_after = math.log(sizes[i - 1]), math.log(sizes[i])
            return float(math.exp((1 - share) * log_before + share * log_after))
    return None
