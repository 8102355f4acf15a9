"""Reconstruction error on held-out activations."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.metrics.noise import DRAWS, document_weights
from sae_experiments.saes.outliers import Region
from sae_experiments.saes.types import RESOLUTION

#: The smallest number that is not 0.
TINY = float(np.finfo(np.float64).tiny)
#: Number of rows that tell which rows are ordinary.
FEW = 4096
#: Rows that are resampled together if the rows are not windows of text.
WINDOW = 128

INFO = [
    MetricInfo(
        name="sae_fvu",
        title="FVU",
        formula="sum ||y - yhat||^2 / sum ||y - mean y||^2",
        better="down",
    ),
    MetricInfo(
        name="sae_fvu_ordinary",
        title="FVU of ordinary rows",
        formula="FVU of rows at most 5 times as far from the median row as half of all rows, "
        "or 3 times as far as 95 % of them",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="sae_outlier_frac",
        title="outliers",
        formula="share of the other rows",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="sae_mse",
        title="MSE",
        formula="sum ||y - yhat||^2 / (N d)",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="sae_cosine",
        title="cosine",
        formula="mean y.yhat / (||y|| ||yhat||) over rows that are not zero",
        better="up",
        shown=False,
    ),
    MetricInfo(
        name="sae_l2_ratio",
        title="L2 ratio",
        formula="mean ||yhat|| / ||y|| over rows that are not zero",
        better="none",
        shown=False,
    ),
]


def measure(ctx: EvalContext, *, rows: int | None) -> Measured:
    """Fraction of variance unexplained (FVU), MSE, cosine similarity and norm ratio.

    The FVU is pooled: a ratio of sums over all rows, with the variance about their own mean. It is
    1 for the mean as a constant prediction and 0 for a perfect copy, and null if the rows do not
    vary. A few huge rows, such as the first position of a language model's windows, can make up
    nearly all of the variance, so the ordinary rows also have an FVU of their own, about their own
    mean. Which rows are ordinary is decided as in a fit, which leaves the others out (see
    `saes.outliers`).

    Args:
        ctx: Evaluation context.
        rows: Number of held-out rows, from the first on; None for all.
    """
    n_rows = ctx.n_used(rows)
    sample = ctx.targets(slice(0, min(n_rows, FEW))).to(ctx.device).double()
    # Shifting by the median keeps the one-pass variance exact if the mean is much larger than the
    # spread.
    region = Region.of(sample)
    shift = region.centre
    # Floors are relative to the size of the rows: their unit does not matter.
    size = float(sample.square().sum(1).mean())
    least = max(1e-8 * math.sqrt(size), TINY)
    every_row = _Sums(RESOLUTION**2 * size)
    ordinary = _Sums(RESOLUTION**2 * size)
    length = ctx.held_out.length if ctx.held_out is not None else WINDOW
    windows = _Windows(n_rows, ctx.sae.d_out, length)
    cosine = 0.0
    ratio = 0.0
    n_directed = 0
    for chunk in ctx.chunks(rows):
        y = chunk.y.double()
        recon = chunk.recon.double()
        shifted = y - shift
        residual = y - recon
        is_ordinary = region.contains(y)
        every_row.add(shifted, residual)
        ordinary.add(shifted[is_ordinary], residual[is_ordinary])
        windows.add(shifted, residual)
        norm = y.norm(dim=1)
        recon_norm = recon.norm(dim=1)
        # Rows of zeros have no direction.
        some = ~(norm <= least)
        n_directed += int(some.sum())
        cosines = (y * recon).sum(1) / (norm * recon_norm.clamp_min(least))
        cosine += float(cosines[some].sum())
        ratio += float((recon_norm / norm)[some].sum())
    n = every_row.n
    values = _fvus(every_row, ordinary)
    reasons = _why_null(values, every_row)
    values |= {
        "sae_outlier_frac": 1 - ordinary.n / n,
        "sae_mse": every_row.error / n / ctx.sae.d_out,
        "sae_cosine": cosine / n_directed if n_directed else None,
        "sae_l2_ratio": ratio / n_directed if n_directed else None,
    }
    if not n_directed:
        reasons |= dict.fromkeys(("sae_cosine", "sae_l2_ratio"), "all held-out rows are zeros")
    noise = {} if values["sae_fvu"] is None else {"sae_fvu": windows.fvu_noise()}
    return Measured(values, why_null=reasons, noise=noise)


def _fvus(every_row: _Sums, ordinary: _Sums) -> dict[str, float | None]:
    """FVU of all rows and of the ordinary ones; both None if the first is undefined."""
    fvu = every_row.fvu()
    return {"sae_fvu": fvu, "sae_fvu_ordinary": None if fvu is None else ordinary.fvu()}


def _why_null(fvus: dict[str, float | None], every_row: _Sums) -> dict[str, str]:
    """The reason for each FVU that is None."""
    if not every_row.finite():
        return dict.fromkeys(fvus, "an activation or a reconstruction is not finite")
    if fvus["sae_fvu"] is None:
        return dict.fromkeys(fvus, "the held-out rows do not vary")
    if fvus["sae_fvu_ordinary"] is None:
        return {"sae_fvu_ordinary": "the ordinary held-out rows do not vary"}
    return {}


class _Sums:
    """Squared error and variance of some rows, summed chunk by chunk in float64.

    Args:
        least: Variance per row at or below which rows count as constant.
    """

    def __init__(self, least: float) -> None:
        self.least = least
        self.n = 0
        self.error = 0.0
        self.squares = 0.0
        self.total = torch.zeros(())

    def add(self, y: Tensor, residual: Tensor) -> None:
        """Add rows: targets (B, O), which may be shifted by a constant, and residuals (B, O)."""
        self.n += len(y)
        self.error += float(residual.square().sum())
        self.squares += float(y.square().sum())
        self.total = self.total.to(y) + y.sum(0)

    def variance(self) -> float:
        """Sum of squared distances of the targets from their mean."""
        return self.squares - float(self.total.square().sum()) / max(self.n, 1)

    def finite(self) -> bool:
        """Return true if all targets and residuals were finite."""
        return math.isfinite(self.error) and math.isfinite(self.variance())

    def fvu(self) -> float | None:
        """Fraction of variance unexplained; None if not finite or if the rows do not vary."""
        variance = self.variance()
        if not self.finite() or not variance > self.least * self.n:
            return None
        return self.error / variance


class _Windows:
    """Sums per window, from which the error of the FVU over resampled windows follows."""

    def __init__(self, n_rows: int, d_out: int, length: int) -> None:
        self.n = 0
        self.length = length
        self.row_errors: list[np.ndarray] = []
        self.row_squares: list[np.ndarray] = []
        self.totals = torch.zeros(math.ceil(n_rows / length), d_out, dtype=torch.float64)

    def add(self, y: Tensor, residual: Tensor) -> None:
        """Add the next rows: targets (B, O), which may be shifted, and residuals (B, O)."""
        window = (torch.arange(len(y)) + self.n) // self.length
        self.totals.index_add_(0, window, y.cpu())
        self.row_errors.append(residual.square().sum(1).cpu().numpy())
        self.row_squares.append(y.square().sum(1).cpu().numpy())
        self.n += len(y)

    def fvu_noise(self) -> float:
        """Standard error of the FVU over resampled windows."""
        row_errors = np.concatenate(self.row_errors)
        row_squares = np.concatenate(self.row_squares)
        first = np.arange(0, len(row_errors), self.length)
        weights = document_weights(len(first), DRAWS, 0)
        error = weights @ np.add.reduceat(row_errors, first)
        squares = weights @ np.add.reduceat(row_squares, first)
        n = weights @ np.add.reduceat(np.ones(len(row_errors)), first)
        totals = weights @ self.totals.numpy()
        variance = squares - np.square(totals).sum(1) / n
        return float(np.std(error / np.maximum(variance, 1e-300), ddof=1))
