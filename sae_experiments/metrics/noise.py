"""How far an evaluation would move if other text had been drawn: bootstrap over documents, because neighbouring characters are alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

#: |difference| of two independent evaluations that noise alone exceeds in about one case of twenty: 2 sqrt(2) standard errors.
BELIEVABLE = 2 * math.sqrt(2)


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


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half; one half where only one label occurs."""
    return float(_auc(scores, labels, np.ones((1, len(scores))))[0])


def resampled_auc(scores: np.ndarray, labels: np.ndarray, documents: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """The AUC in ``draws`` bootstrap samples of the documents (N,) that the rows come from. The same draws for the same documents and seed."""
    present, which = np.unique(documents, return_inverse=True)
    return _auc(scores, labels, document_weights(len(present), draws, seed)[:, which])


def _auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) != 0)  # tied scores share one step
    positive, negative = (np.add.reduceat(weights[:, order] * (labels[order] == wanted), first, axis=1) for wanted in (True, False))
    below = np.cumsum(negative, axis=1) - negative / 2
    area, total = (positive * below).sum(1), positive.sum(1) * negative.sum(1)
    return np.divide(area, total, out=np.full(len(area), 0.5), where=total > 0)
