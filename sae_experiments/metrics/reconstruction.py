"""How well the SAE rebuilds held-out activations."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.noise import document_weights

FAR = 5.0  # times the median distance from the median: rows beyond are outliers
FEW = 4096  # rows that tell which are ordinary
WINDOW = 128  # rows that are resampled together where there are no windows of text

INFO = [
    MetricInfo(name="sae_fvu", title="FVU", formula="sum ||y - yhat||^2 / sum ||y - mean y||^2", unit="", better="down"),
    MetricInfo(
        name="sae_fvu_ordinary",
        title="FVU of ordinary rows",
        formula="FVU of the rows at most 5 times as far from the median as half of them are",
        unit="",
        better="down",
        shown=False,
    ),
    MetricInfo(name="sae_outlier_frac", title="outliers", formula="share of the other rows", unit="", better="none", shown=False),
    MetricInfo(name="sae_mse", title="MSE", formula="sum ||y - yhat||^2 / (N d)", unit="", better="down", shown=False),
    MetricInfo(name="sae_cosine", title="cosine", formula="mean y.yhat / (||y|| ||yhat||)", unit="", better="up", shown=False),
    MetricInfo(name="sae_l2_ratio", title="L2 ratio", formula="mean ||yhat|| / ||y||", unit="", better="none", shown=False),
]


def measure(bench: Bench, *, rows: int | None) -> Measured:
    """Fraction of variance unexplained (pooled: a ratio of sums over all rows about their own mean), MSE, cosine and norm ratio.

    FVU is 1 for a constant prediction of the mean and 0 for a perfect copy; it is null where the rows do not vary. A few huge rows, such as
    a language model's first position, can be nearly all of the variance: the ordinary rows have an FVU of their own, about their own mean.
    """
    n = error = cosine = ratio = squares = 0.0
    total, ordinary = None, Sums()
    few = bench.targets(min(rows or bench.n_rows, bench.n_rows, FEW)).double()
    shift = few.median(0).values  # keeps the one-pass variance exact where the mean is much larger than the spread
    limit = FAR**2 * (few - shift).square().sum(1).median()
    parts: list[tuple[np.ndarray, np.ndarray]] = []  # per row: squared error and shifted squares; per chunk: shifted sums of its windows
    length = bench.held_out.length if bench.held_out is not None else WINDOW
    sums = torch.zeros(-(-min(rows or bench.n_rows, bench.n_rows) // length), bench.sae.d_out, dtype=torch.float64)
    for r in bench.chunks(rows):
        y, yhat = r.y.double(), r.recon.double()
        total = (y - shift).sum(0) if total is None else total + (y - shift).sum(0)
        squares += float((y - shift).square().sum())
        error += float((y - yhat).square().sum())
        window = (torch.arange(len(y)) + int(n)) // length
        sums.index_add_(0, window, (y - shift).cpu())
        ordinary.add(y - shift, y - yhat, (y - shift).square().sum(1) <= limit)
        parts.append(((y - yhat).square().sum(1).cpu().numpy(), (y - shift).square().sum(1).cpu().numpy()))
        norm, norm_hat = y.norm(dim=1), yhat.norm(dim=1)
        cosine += float(((y * yhat).sum(1) / (norm.clamp_min(1e-8) * norm_hat.clamp_min(1e-8))).sum())
        ratio += float((norm_hat / norm.clamp_min(1e-8)).sum())
        n += len(y)
    variance = squares - float(total.square().sum()) / n
    finite = math.isfinite(error) and math.isfinite(variance)
    constant = finite and not variance > 1e-12 * n
    values = {
        "sae_fvu": error / variance if finite and not constant else None,
        "sae_fvu_ordinary": ordinary.fvu() if finite and not constant else None,
        "sae_outlier_frac": 1 - ordinary.n / n,
        "sae_mse": error / n / len(total),
        "sae_cosine": cosine / n,
        "sae_l2_ratio": ratio / n,
    }
    noise = {} if values["sae_fvu"] is None else {"sae_fvu": _noise(parts, sums.numpy(), length)}
    reason = "the held-out rows do not vary" if constant else "an activation or a reconstruction is not finite"
    why = {name: reason for name in ("sae_fvu", "sae_fvu_ordinary") if values[name] is None}
    if finite and not constant and "sae_fvu_ordinary" in why:
        why["sae_fvu_ordinary"] = "the ordinary held-out rows do not vary"
    return Measured(values, why_null=why, noise=noise)


class Sums:
    """Squared error and variance of some of the rows, summed chunk by chunk."""

    def __init__(self) -> None:
        self.n, self.error, self.squares, self.total = 0, 0.0, 0.0, torch.zeros(())

    def add(self, y: Tensor, residual: Tensor, some: Tensor) -> None:
        """Add the rows (B, O) where ``some`` (B,) holds; y may be shifted by a constant."""
        y, residual = y[some], residual[some]
        self.n += len(y)
        self.error += float(residual.square().sum())
        self.squares += float(y.square().sum())
        self.total = self.total.to(y) + y.sum(0)

    def fvu(self) -> float | None:
        """The fraction of variance unexplained; None where the rows do not vary."""
        variance = self.squares - float(self.total.square().sum()) / max(self.n, 1)
        return self.error / variance if variance > 1e-12 * self.n else None


def _noise(parts: list[tuple[np.ndarray, np.ndarray]], sums: np.ndarray, length: int) -> float:
    """Standard error of FVU over resampled windows."""
    error, squares = (np.concatenate(p) for p in zip(*parts, strict=True))
    first = np.arange(0, len(error), length)
    weights = document_weights(len(first), 200, 0)
    counts = np.add.reduceat(np.ones(len(error)), first)
    drawn = [weights @ column for column in (np.add.reduceat(error, first), np.add.reduceat(squares, first), counts, sums)]
    variance = drawn[1] - np.square(drawn[3]).sum(1) / drawn[2]
    return float(np.std(drawn[0] / np.maximum(variance, 1e-300), ddof=1))
