"""Bits that codes need: a sparse code's support and values, and other codes of the activation."""

from __future__ import annotations

import math

import numpy as np
from scipy import sparse
from scipy.special import gammaln

#: Bins are numbered from -MAX_BIN to MAX_BIN; values further out are clipped.
MAX_BIN = 1 << 20
#: Bins of all latents together up to which a table over all of them is made.
MAX_TABLE = 20_000_000


def support_bits(train: sparse.csr_matrix, test: sparse.csr_matrix) -> dict[str, float]:
    """Bits per row to encode which latents are active, under three codes.

    The main code treats latents as independent, with frequencies from `train` and 1/2 added to
    each count. The other two choose L0 latents uniformly, or use the frequencies of `test`.

    Args:
        train: Codes that give the statistics, (n_train, F).
        test: Codes to be sent, (n, F).
    """
    n_train = len(train.indptr) - 1
    n, m = test.get_shape()
    active = np.diff(test.indptr).astype(np.float64)
    log_choices = gammaln(m + 1) - gammaln(active + 1) - gammaln(m - active + 1)
    uniform = float(log_choices.mean() / math.log(2)) + math.log2(m)
    f = np.diff(test.tocsc().indptr) / n
    p = (np.diff(train.tocsc().indptr) + 0.5) / (n_train + 1)
    sometimes = f[(f > 0) & (f < 1)]
    entropies = sometimes * np.log2(sometimes) + (1 - sometimes) * np.log2(1 - sometimes)
    return {
        "code_support_bits": float(-(f * np.log2(p) + (1 - f) * np.log2(1 - p)).sum()),
        "code_support_bits_uniform": uniform,
        "code_support_bits_bernoulli": float(-entropies.sum()),
    }


class Quantiser:
    """Quantises the values of a code at any step, and counts their bits.

    The probability of a bin with `count` of a latent's n training values is

        (count + 1/2) / (n + K/2)

    with K the number of bins between the latent's smallest and largest value. A value is decoded as
    the mean of the training values in its bin, or as the middle of the bin if there are none.

    Args:
        train: Codes that give the statistics, (n_train, F).
        test: Codes to be sent, (n, F).
    """

    def __init__(self, train: sparse.csr_matrix, test: sparse.csr_matrix) -> None:
        self._shape = test.get_shape()
        m = self._shape[1]
        # All entries by latent; the training entries come first in `_latent` and `_values`.
        columns = train.tocsc(), test.tocsc()
        latents = [np.repeat(np.arange(m), np.diff(part.indptr)) for part in columns]
        self._train_values = columns[0].data
        self._train_latent, self._latent = latents
        self._values = columns[1].data
        self._counts = np.bincount(self._train_latent, minlength=m)
        squares = np.bincount(
            self._train_latent, self._train_values.astype(np.float64) ** 2, minlength=m
        )
        rms = np.sqrt(squares / np.maximum(self._counts, 1))
        self._unit = np.where(self._counts > 0, rms, 1.0)
        self._starts = [part.indptr[:-1] for part in columns]
        self._nonempty = [np.diff(part.indptr) > 0 for part in columns]
        # Place of each entry of the decoded code among the entries by latent.
        places = sparse.csc_matrix(
            (np.arange(len(self._values)), columns[1].indices, columns[1].indptr), self._shape
        ).tocsr()
        self._place: np.ndarray = places.data
        self._indices: np.ndarray = places.indices
        self._indptr: np.ndarray = places.indptr

    def at(self, step: float) -> tuple[float, sparse.csr_matrix]:
        """Quantise with bins of `step` root mean squares of each latent.

        Returns:
            Bits per row for the values, and the decoded code (n, F).
        """
        width = self._unit * step
        width[width == 0] = step
        train_bins = _bins(self._train_values, width[self._train_latent])
        bins = _bins(self._values, width[self._latent])
        lowest, alphabet = self._alphabets(train_bins, bins)
        # The bins of all latents in one row, from the lowest of the first to the last.
        first = np.cumsum(alphabet) - alphabet - lowest
        n_bins = int(alphabet.sum())
        train_key, key = train_bins + first[self._train_latent], bins + first[self._latent]
        if n_bins > MAX_TABLE:
            known, keys = np.unique(train_key, return_inverse=True)
            train_key, key = keys, _positions(known, key)
            n_bins = len(known) + 1
        n_values = np.bincount(train_key, minlength=n_bins)
        means = np.bincount(train_key, self._train_values, n_bins) / np.maximum(n_values, 1)
        count = n_values[key]
        probability = (count + 0.5) / (self._counts[self._latent] + alphabet[self._latent] / 2)
        middle = (bins + 0.5) * width[self._latent]
        values = np.where(count > 0, means[key], middle).astype(np.float32)
        bits = max(float(-np.log2(probability).sum() / self._shape[0]), 0.0)
        decoded = sparse.csr_matrix(
            (values[self._place], self._indices, self._indptr), shape=self._shape
        )
        return bits, decoded

    def _alphabets(self, train_bins: np.ndarray, bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lowest bin and number of bins of each latent, (F,) each.

        Sender and receiver agree on the alphabet of a latent: its bins in either half of the rows,
        and the bin of zero.
        """
        lowest = np.zeros(self._shape[1], np.int64)
        highest = np.zeros(self._shape[1], np.int64)
        parts = zip((train_bins, bins), self._starts, self._nonempty, strict=True)
        for some_bins, starts, nonempty in parts:
            if not len(some_bins):
                continue
            at = starts[nonempty]
            lowest[nonempty] = np.minimum(lowest[nonempty], np.minimum.reduceat(some_bins, at))
            highest[nonempty] = np.maximum(highest[nonempty], np.maximum.reduceat(some_bins, at))
        return lowest, highest - lowest + 1


def _positions(known: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Index of each key among sorted ones; the number of these for a key that is not among them."""
    position = np.searchsorted(known, keys)
    hit = known[np.minimum(position, len(known) - 1)] == keys
    return np.where(hit & (position < len(known)), position, len(known))


def _bins(values: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Number of the bin of each value, (n,)."""
    return np.floor(values / width).astype(np.int64).clip(-MAX_BIN, MAX_BIN)


def landmarks(y: np.ndarray, fvu: float, symbols: int) -> dict[str, float | None]:
    """Bits per row that other codes need for the same FVU.

    Args:
        y: Activations (n, O).
        fvu: FVU to match.
        symbols: Number of symbols of the text; 0 without text.

    Returns:
        Bits for Gaussian principal components, for the dense activation and for the character
        itself; the last is None without text.
    """
    bits: dict[str, float | None] = {"code_bits_pca": None, "code_bits_dense": None}
    if 0 < fvu < 1:
        centred = y.astype(np.float64) - y.mean(0, dtype=np.float64)
        spectrum = np.linalg.eigvalsh(centred.T @ centred / len(y)).clip(min=0)
        bits["code_bits_pca"] = water_filling(spectrum, fvu)
        bits["code_bits_dense"] = _dense_bits(centred, fvu)
    bits["code_bits_alphabet"] = math.log2(symbols) if symbols else None
    return bits


def water_filling(spectrum: np.ndarray, fvu: float) -> float:
    """Rate of Gaussian components at a given distortion, by reverse water-filling.

        sum_i 1/2 log2 max(1, lambda_i / theta),  sum_i min(lambda_i, theta) = fvu sum_i lambda_i

    Args:
        spectrum: Variances lambda_i, (O,).
        fvu: Distortion as a share of the variance.

    Returns:
        Bits per row.
    """
    ordered = np.sort(spectrum)
    sum_below = np.concatenate([[0.0], np.cumsum(ordered)[:-1]])
    n_from_here = np.arange(len(ordered), 0, -1)
    levels = (fvu * ordered.sum() - sum_below) / n_from_here
    theta = levels[np.flatnonzero(levels <= ordered)[0]]
    return float(0.5 * np.log2(np.maximum(1, ordered / theta)).sum())


def _dense_bits(centred: np.ndarray, fvu: float) -> float:
    """Entropy of all dimensions after uniform quantisation with one step.

    The error of a dimension is step^2 / 12, or its variance if that is smaller (then it is not
    sent). The step is found by bisection.

    Args:
        centred: Rows minus their mean, (n, O).
        fvu: Distortion as a share of the variance.

    Returns:
        Bits per row.
    """
    target = fvu * float(np.square(centred).sum() / len(centred))
    variances = centred.var(0)
    low = 0.0
    high = float(np.sqrt(12 * variances.max())) + 1e-30
    step = high
    for _ in range(60):
        step = (low + high) / 2
        if np.minimum(step * step / 12, variances).sum() < target:
            low = step
        else:
            high = step
    bits = 0.0
    for column in centred.T[variances > step * step / 12]:
        counts = np.unique(np.round(column / step), return_counts=True)[1]
        p = counts / len(column)
        bits -= float((p * np.log2(p)).sum())
    return bits
