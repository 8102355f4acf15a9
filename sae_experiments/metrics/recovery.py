"""How much of a known truth a dictionary holds: only where ``bench.extras["truth"]`` says what it is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import NOT_FINITE, nulls, sparse_codes
from sae_experiments.metrics.geometry import unit

INFO = [
    MetricInfo(
        name="truth_mcc",
        title="MCC",
        formula="sum of |cos| over the best one-to-one matching of live latents and features, over the smaller number of latents and features",
        unit="",
        better="up",
    ),
    MetricInfo(
        name="truth_f1",
        title="latent F1",
        formula="mean over latents of the F1 of their firing as a detector of the feature nearest by |cos|; a dead latent counts 0 (as SynthSAEBench)",
        unit="",
        better="up",
    ),
    MetricInfo(name="truth_coverage_f1", title="feature F1", formula="mean over features of the best F1 of a latent's firing", unit="", better="up"),
    MetricInfo(
        name="truth_uniqueness",
        title="uniqueness",
        formula="number of features that are some live latent's nearest, over the most there could be",
        unit="",
        better="up",
    ),
    MetricInfo(
        name="truth_recovered_frac", title="features found", formula="share of features with a latent of |cos| above the limit", unit="", better="up"
    ),
    MetricInfo(
        name="truth_mcc_random",
        title="MCC (random)",
        formula="the same with random directions in place of the latents",
        unit="",
        better="none",
        shown=False,
    ),
    MetricInfo(name="truth_l0", title="true L0", formula="mean number of features active a row", unit="features", better="none", shown=False),
]


class Truth(NamedTuple):
    """Feature directions (G, D) and the features' activations on the held-out rows (N, G)."""

    directions: Tensor
    acts: Tensor


def measure(bench: Bench, *, rows: int | None, least: int, found: float, seed: int) -> Measured:
    """Matching of decoder rows of live latents with the features that fire at least ``least`` times on the held-out rows."""
    truth: Truth | None = bench.extras.get("truth")
    if truth is None:
        return nulls(INFO, "the true features are not known")
    codes = sparse_codes(bench, rows)
    atoms = unit(bench.sae.W_dec.detach().cpu())
    if codes is None or not torch.isfinite(atoms).all():
        return nulls(INFO, NOT_FINITE)
    on = sparse.csr_matrix(truth.acts[: codes.shape[0]].cpu().numpy() != 0).astype(np.float64)
    real, alive = np.flatnonzero(np.diff(on.tocsc().indptr) >= least), np.flatnonzero(np.diff(codes.tocsc().indptr))
    if not len(real) or not len(alive):
        return nulls(INFO, f"no feature fires {least} times" if not len(real) else "no latent fires")
    cosines = (unit(truth.directions.cpu())[real] @ atoms[alive].t()).abs().numpy()
    fires = (codes[:, alive] != 0).astype(np.float64)
    own = nearest_f1(on[:, real], fires, cosines.argmax(0))
    random = unit(torch.randn(len(alive), atoms.shape[1], generator=torch.Generator().manual_seed(seed + 0x5EED)))
    f1 = best_f1(on[:, real], fires)
    values = {
        "truth_mcc": matched(cosines, bench.sae.d_sae),
        "truth_f1": float(own.sum() / bench.sae.d_sae),
        "truth_coverage_f1": float(f1.mean()),
        "truth_uniqueness": len(np.unique(cosines.argmax(0))) / min(len(alive), len(real)),
        "truth_recovered_frac": float((cosines.max(1) > found).mean()),
        "truth_mcc_random": matched((unit(truth.directions.cpu())[real] @ random.t()).abs().numpy(), bench.sae.d_sae),
        "truth_l0": on.nnz / on.shape[0],
    }
    arrays = {"truth_feature": real, "truth_feature_f1": f1, "truth_feature_cosine": cosines.max(1), "truth_feature_density": on.mean(0).A1[real]}
    return Measured(values, arrays)


def matched(cosines: np.ndarray, latents: int) -> float:
    """|cos| (G, live latents) in the best one-to-one matching, averaged over as many pairs as there could be with all ``latents`` alive."""
    return float(cosines[linear_sum_assignment(-cosines)].sum() / min(len(cosines), latents))


def nearest_f1(on: sparse.csr_matrix, fires: sparse.csr_matrix, nearest: np.ndarray) -> np.ndarray:
    """For every latent (column of ``fires``, (N, F)) its F1 as a detector of feature ``nearest[latent]`` (columns of ``on``, (N, G))."""
    both = np.asarray(on[:, nearest].multiply(fires).sum(0)).ravel()
    total = np.asarray(on.sum(0)).ravel()[nearest] + np.asarray(fires.sum(0)).ravel()
    return 2 * both / np.maximum(total, 1)


def best_f1(on: sparse.csr_matrix, fires: sparse.csr_matrix) -> np.ndarray:
    """For every feature (column of ``on``, (N, G)) the best F1 of a latent (column of ``fires``, (N, F)) as a detector of it."""
    both = (on.T @ fires).toarray()
    total = np.asarray(on.sum(0)).T + np.asarray(fires.sum(0))
    return (2 * both / np.maximum(total, 1)).max(1)
