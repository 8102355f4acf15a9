"""Recovery of known features by a dictionary, on data with `ctx.extras["truth"]`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.metrics.codes import NOT_FINITE, nulls, sparse_codes
from sae_experiments.saes.ops import unit_rows
from sae_experiments.saes.types import Codes

INFO = [
    MetricInfo(
        name="truth_mcc",
        title="MCC",
        formula=(
            "sum of |cos| over the best one-to-one matching of live latents and features, "
            "over the smaller number of latents and features"
        ),
        better="up",
    ),
    MetricInfo(
        name="truth_f1",
        title="latent F1",
        formula=(
            "mean over latents of the F1 of their firing as a detector of the feature nearest "
            "by |cos|; a dead latent counts 0 (as SynthSAEBench)"
        ),
        better="up",
    ),
    MetricInfo(
        name="truth_coverage_f1",
        title="feature F1",
        formula="mean over features of the best F1 of a latent's firing",
        better="up",
    ),
    MetricInfo(
        name="truth_uniqueness",
        title="uniqueness",
        formula=(
            "number of features that are some live latent's nearest, over the most there could be"
        ),
        better="up",
    ),
    MetricInfo(
        name="truth_recovered_frac",
        title="features found",
        formula="share of features with a latent of |cos| above the limit",
        better="up",
    ),
    MetricInfo(
        name="truth_mcc_random",
        title="MCC (random)",
        formula="the same with random directions in place of the latents",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="truth_l0",
        title="true L0",
        formula="mean number of features active a row",
        unit="features",
        better="none",
        shown=False,
    ),
]


class Truth(NamedTuple):
    """The features that generated the data."""

    directions: Tensor
    """Direction of each feature, (G, D)."""
    acts: Tensor | Codes
    """Activations of the features on the held-out rows, (N, G), dense or sparse."""

    def active(self, n: int) -> sparse.csr_matrix:
        """1 where a feature is active in the first `n` rows, (n, G)."""
        if isinstance(self.acts, Tensor):
            return sparse.csr_matrix(self.acts[:n].cpu().numpy() != 0, dtype=np.float64)
        values, pattern = self.acts
        crow = pattern.crow[: n + 1].cpu().numpy()
        ones = (values[: crow[-1]] != 0).cpu().numpy().astype(np.float64)
        shape = (n, pattern.n_cols)
        return sparse.csr_matrix((ones, pattern.col[: crow[-1]].cpu().numpy(), crow), shape=shape)


def measure(
    ctx: EvalContext, *, rows: int | None, min_fires: int, found: float, seed: int
) -> Measured:
    """Match decoder rows of live latents with the true features, by direction and by firing.

    Args:
        ctx: Evaluation context; `extras["truth"]` is a `Truth`.
        rows: Number of held-out rows, from the first on; None for all.
        min_fires: Number of rows that a feature must be active on to count.
        found: |cos| above which a feature counts as found.
        seed: Seed of the random reference directions.
    """
    truth: Truth | None = ctx.extras.get("truth")
    if truth is None:
        return nulls(INFO, "the true features are not known")
    codes = sparse_codes(ctx, rows)
    atoms = unit_rows(ctx.sae.W_dec.detach().cpu().double())
    if codes is None or not torch.isfinite(atoms).all():
        return nulls(INFO, NOT_FINITE)
    n = ctx.n_used(rows)
    on = truth.active(n)
    features = np.flatnonzero(np.diff(on.tocsc().indptr) >= min_fires)
    alive = np.flatnonzero(np.diff(codes.tocsc().indptr))
    if not len(features):
        return nulls(INFO, f"no feature fires {min_fires} times")
    if not len(alive):
        return nulls(INFO, "no latent fires")
    directions = unit_rows(truth.directions.cpu().double())[features]
    cosines = (directions @ atoms[alive].t()).abs().numpy()
    nearest = cosines.argmax(0)
    fires = sparse.csr_matrix(codes[:, alive] != 0, dtype=np.float64)
    latent_f1 = nearest_f1(on[:, features], fires, nearest)
    feature_f1 = best_f1(on[:, features], fires)
    # Not the stream that drew the features from the same seed.
    generator = torch.Generator().manual_seed(seed + 0x5EED)
    random = unit_rows(torch.randn(len(alive), atoms.shape[1], generator=generator).double())
    random_cosines = (directions @ random.t()).abs().numpy()
    d_sae = ctx.sae.d_sae
    values: dict[str, float | None] = {
        "truth_mcc": matched(cosines, d_sae),
        "truth_f1": float(latent_f1.sum() / d_sae),
        "truth_coverage_f1": float(feature_f1.mean()),
        "truth_uniqueness": len(np.unique(nearest)) / min(len(alive), len(features)),
        "truth_recovered_frac": float((cosines.max(1) > found).mean()),
        "truth_mcc_random": matched(random_cosines, d_sae),
        "truth_l0": on.nnz / n,
    }
    arrays = {
        "truth_feature": features,
        "truth_feature_f1": feature_f1,
        "truth_feature_cosine": cosines.max(1),
        "truth_feature_density": np.asarray(on.mean(0)).ravel()[features],
    }
    return Measured(values, arrays)


def matched(cosines: np.ndarray, latents: int) -> float:
    """Mean |cos| over the best one-to-one matching of features and live latents.

    Args:
        cosines: |cos| of each feature with each live latent, (G, live latents).
        latents: Number of latents, dead ones included.

    Returns:
        The sum over the matching, divided by the number of pairs that there could be with all
        latents alive.
    """
    total = cosines[linear_sum_assignment(-cosines)].sum()
    return float(total / min(len(cosines), latents))


def nearest_f1(on: sparse.csr_matrix, fires: sparse.csr_matrix, nearest: np.ndarray) -> np.ndarray:
    """F1 of each latent as a detector of one feature.

    Args:
        on: 1 where a feature is active, (N, G).
        fires: 1 where a latent fires, (N, F).
        nearest: The feature that each latent is taken to detect, (F,).

    Returns:
        F1 scores (F,).
    """
    both = np.asarray(on[:, nearest].multiply(fires).sum(0)).ravel()
    total = np.asarray(on.sum(0)).ravel()[nearest] + np.asarray(fires.sum(0)).ravel()
    return 2 * both / np.maximum(total, 1)


def best_f1(on: sparse.csr_matrix, fires: sparse.csr_matrix) -> np.ndarray:
    """Best F1 of any latent as a detector of each feature.

    Args:
        on: 1 where a feature is active, (N, G).
        fires: 1 where a latent fires, (N, F).

    Returns:
        F1 scores (G,).
    """
    both = (on.T @ fires).toarray()
    total = np.asarray(on.sum(0)).T + np.asarray(fires.sum(0))
    return (2 * both / np.maximum(total, 1)).max(1)
