"""How far an evaluation would move if other text had been drawn: bootstrap over documents, because neighbouring characters are alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

#: |difference| of two independent evaluations that noise alone exceeds in about one case of twenty: 2 sqrt(2) standard errors.
BELIEVABLE = 2 * math.sqrt(2)


#: Bootstrap samples where a metric has no option for their number.
DRAWS = 200


class Grouped(NamedTuple):
    """Values (n,) with the number of the document that each comes from (n,)."""

    values: np.ndarray
    document: np.ndarray


def smallest_difference(noise: float) -> float:
    """The smallest difference between two values of a metric worth believing, given the standard error of each."""
    return BELIEVABLE * noise


def document_weights(documents: int, draws: int, seed: int) -> np.ndarray:
    """How often each of the documents is drawn in each of ``draws`` bootstrap samples, (draws, documents)."""
    chance = np.random.default_rng([seed, 0xB007])  # a stream of its own: the seed may have chosen the documents
    return chance.multinomial(documents, np.full(documents, 1 / documents), size=draws).astype(np.float64)


def noise_of(sums: Mapping[str, np.ndarray], metric: Callable[[Mapping[str, np.ndarray]], np.ndarray], *, draws: int, seed: int) -> float:
    """Standard error of a metric of sums: ``sums`` holds a sum a document, (documents,); ``metric`` maps resampled totals (draws,) to values."""
    weights = document_weights(len(next(iter(sums.values()))), draws, seed)
    return float(np.std(metric({name: weights @ part for name, part in sums.items()}), ddof=1))


def resampled_means(parts: Sequence[Grouped], documents: int, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """What the mean of each part becomes in ``draws`` bootstrap samples of the documents: the same samples for every part.

    Args:
        parts: one a latent or concept.
        documents: how many documents there are, whether or not they occur in a part.

    Returns:
        Means (draws, parts); NaN where no document of a part was drawn.
    """
    weights = document_weights(documents, draws, seed)
    sums = np.stack([np.bincount(p.document, p.values, documents) for p in parts], axis=1)
    counts = np.stack([np.bincount(p.document, minlength=documents) for p in parts], axis=1)
    total, n = weights @ sums, weights @ counts
    return np.divide(total, n, out=np.full(total.shape, np.nan), where=n > 0)


def noise_over(resampled: np.ndarray) -> float:
    """Standard error of a mean over columns, from what every column becomes in bootstrap samples of the text, (draws, columns).

    The columns are measured on the same text and move together: their mean is taken before its spread over the samples.
    """
    known = ~np.isnan(resampled)
    n = known.sum(1)
    means = np.where(known, resampled, 0).sum(1)[n > 0] / n[n > 0]
    return float(np.std(means, ddof=1)) if len(means) > 1 else 0.0


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half; one half where only one label occurs."""
    return float(_auc(scores, labels, np.ones((1, len(scores))))[0])


def resampled_auc(
    scores: np.ndarray, labels: np.ndarray, documents: np.ndarray, draws: int, seed: int, *, among: np.ndarray | None = None
) -> np.ndarray:
    """The AUC in ``draws`` bootstrap samples of the documents (N,) that the rows come from, or of those ``among`` which they are.

    Only AUCs with the same ``among`` and seed are taken on the same samples of the text, and may be averaged sample by sample.
    """
    among = np.unique(documents if among is None else among)
    return _auc(scores, labels, document_weights(len(among), draws, seed)[:, np.searchsorted(among, documents)])


def _auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) != 0)  # tied scores share one step
    positive, negative = (np.add.reduceat(weights[:, order] * (labels[order] == wanted), first, axis=1) for wanted in (True, False))
    below = np.cumsum(negative, axis=1) - negative / 2
    area, total = (positive * below).sum(1), positive.sum(1) * negative.sum(1)
    return np.divide(area, total, out=np.full(len(area), 0.5), where=total > 0)
