"""Sampling error of metrics, by bootstrap over documents.

Neighbouring characters are alike, so whole documents (or windows) are resampled, not rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

#: Bootstrap samples where a metric has no option for their number.
DRAWS = 200


class Grouped(NamedTuple):
    """Values with the document that each of them comes from."""

    values: np.ndarray
    """Values, (n,)."""
    document: np.ndarray
    """Document number of each value, (n,)."""


def document_weights(documents: int, draws: int, seed: int) -> np.ndarray:
    """Multiplicity of each document in each of `draws` bootstrap samples, (draws, documents)."""
    # A separate random stream: the same seed may have selected the documents.
    rng = np.random.default_rng([seed, 0xB007])
    share = np.full(documents, 1 / documents)
    return rng.multinomial(documents, share, size=draws).astype(np.float64)


def noise_of(
    sums: Mapping[str, np.ndarray],
    metric: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> float:
    """Standard error of a metric that is a function of sums over documents.

    Bootstrap samples in which the metric is undefined (NaN) are left out.

    Args:
        sums: Per quantity, its sum within each document, (documents,).
        metric: Maps the totals of the bootstrap samples, (draws,) per quantity, to values (draws,).
        draws: Number of bootstrap samples.
        seed: Seed of the samples.

    Returns:
        The standard error; NaN if the metric is defined in fewer than two samples.
    """
    documents = len(next(iter(sums.values())))
    weights = document_weights(documents, draws, seed)
    totals = {name: weights @ part for name, part in sums.items()}
    values = metric(totals)
    defined = values[~np.isnan(values)]
    return float(np.std(defined, ddof=1)) if len(defined) > 1 else math.nan


def resampled_means(
    parts: Sequence[Grouped], documents: int, *, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Mean of each part in bootstrap samples of the documents, the same samples for every part.

    Args:
        parts: One per latent or concept.
        documents: Number of documents, including those that no part has values from.
        draws: Number of bootstrap samples.
        seed: Seed of the samples.

    Returns:
        Means (draws, parts); NaN if a sample has no document of the part.
    """
    weights = document_weights(documents, draws, seed)
    sums = np.stack([np.bincount(p.document, p.values, documents) for p in parts], axis=1)
    counts = np.stack([np.bincount(p.document, minlength=documents) for p in parts], axis=1)
    total = weights @ sums
    n = weights @ counts
    return np.divide(total, n, out=np.full(total.shape, np.nan), where=n > 0)


def noise_over(resampled: np.ndarray) -> float:
    """Standard error of the mean over columns.

    The columns are measured on the same text and vary together, so their mean is taken within
    each bootstrap sample, before the standard deviation over the samples.

    Args:
        resampled: Value of each column in each bootstrap sample, (draws, columns); NaN if unknown.

    Returns:
        The standard error; 0 with fewer than two usable samples.
    """
    known = ~np.isnan(resampled)
    n = known.sum(1)
    means = np.where(known, resampled, 0).sum(1)[n > 0] / n[n > 0]
    return float(np.std(means, ddof=1)) if len(means) > 1 else 0.0


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half; 1/2 if only one label occurs."""
    return float(_weighted_auc(scores, labels, np.ones((1, len(scores))))[0])


def resampled_auc(
    scores: np.ndarray,
    labels: np.ndarray,
    documents: np.ndarray,
    draws: int,
    seed: int,
    *,
    among: np.ndarray | None = None,
) -> np.ndarray:
    """AUC in bootstrap samples of the documents.

    AUCs with the same `among` and seed are taken on the same samples of the text; only these may
    be averaged sample by sample.

    Args:
        scores: Score of each row, (N,).
        labels: Label of each row, (N,) bool.
        documents: Document number of each row, (N,).
        draws: Number of bootstrap samples.
        seed: Seed of the samples.
        among: Numbers of all documents to sample from; None for those that occur.

    Returns:
        AUCs (draws,).
    """
    among = np.unique(documents if among is None else among)
    weights = document_weights(len(among), draws, seed)
    return _weighted_auc(scores, labels, weights[:, np.searchsorted(among, documents)])


def _weighted_auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC (draws,) for each row of weights (draws, N)."""
    order = np.argsort(scores, kind="stable")
    # Rows with tied scores are one step of the curve.
    step_starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) != 0)
    is_positive = labels[order].astype(bool)
    weights = weights[:, order]
    positive = np.add.reduceat(weights * is_positive, step_starts, axis=1)
    negative = np.add.reduceat(weights * ~is_positive, step_starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    area = (positive * below).sum(1)
    pairs = positive.sum(1) * negative.sum(1)
    return np.divide(area, pairs, out=np.full(len(area), 0.5), where=pairs > 0)
