"""Bits that codes need: a sparse code's support and values, and other codes of the activation."""

from __future__ import annotations

import math

import numpy as np
from scipy import sparse
from scipy.special import gammaln

#: Bins are numbered from -MAX_BIN to MAX_BIN; values further out are clipped.
MAX_BIN = 1 << 20


def support_bits(train: sparse.csr_matrix, test: sparse.csr_matrix) -> dict[str, float]:
    """Bits per row for which latents are active, by three codes.

    The code that counts uses frequencies from `train`, with 1/2 added to each count. The others
    are a uniform choice of L0 latents, and independent latents with frequencies from `test`.

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


def quantised(
    train: sparse.csr_matrix, test: sparse.csr_matrix, step: float
) -> tuple[float, sparse.csr_matrix]:
    """Quantise the values of a code, and count their bits.

    The probability of a bin with `count` of a latent's n training values is

        (count + 1/2) / (n + K/2)

    with K the number of bins between the latent's smallest and largest value. A value is decoded as
    the mean of the training values in its bin, or as the middle of the bin if there are none.

    Args:
        train: Codes that give the statistics, (n_train, F).
        test: Codes to be sent, (n, F).
        step: Bin width in root mean squares of each latent.

    Returns:
        Bits per row for the values, and the decoded code (n, F).
    """
    n_test, m = test.get_shape()
    train_columns = train.tocsc()
    test_columns = test.tocsc()
    train_latent = np.repeat(np.arange(m), np.diff(train_columns.indptr))
    latent = np.repeat(np.arange(m), np.diff(test_columns.indptr))
    counts = np.bincount(train_latent, minlength=m)
    squares = np.bincount(train_latent, train_columns.data.astype(np.float64) ** 2, m)
    width = np.where(counts > 0, np.sqrt(squares / np.maximum(counts, 1)), 1.0) * step
    width[width == 0] = step
    train_bins = _bins(train_columns.data, width[train_latent])
    bins = _bins(test_columns.data, width[latent])
    # Sender and receiver agree on the alphabet of a latent: its bins in either half of the rows.
    lowest = np.zeros(m, np.int64)
    highest = np.zeros(m, np.int64)
    for some_bins, their_latent in ((train_bins, train_latent), (bins, latent)):
        np.minimum.at(lowest, their_latent, some_bins)
        np.maximum.at(highest, their_latent, some_bins)
    alphabet = highest - lowest + 1
    known, inverse, n_values = np.unique(
        _keys(train_latent, train_bins), return_inverse=True, return_counts=True
    )
    means = np.bincount(inverse, train_columns.data, len(known)) / np.maximum(n_values, 1)
    # A last entry that no key is equal to, so that every search ends inside the arrays.
    known = np.append(known, np.iinfo(np.int64).max)
    n_values = np.append(n_values, 0)
    means = np.append(means, 0.0)
    keys = _keys(latent, bins)
    position = np.searchsorted(known, keys)
    hit = known[position] == keys
    count = np.where(hit, n_values[position], 0)
    probability = (count + 0.5) / (counts[latent] + alphabet[latent] / 2)
    middle = (bins + 0.5) * width[latent]
    values = np.where(hit, means[position], middle).astype(np.float32)
    decoded = sparse.csc_matrix(
        (values, test_columns.indices, test_columns.indptr), shape=(n_test, m)
    )
    bits = max(float(-np.log2(probability).sum() / n_test), 0.0)
    return bits, sparse.csr_matrix(decoded)


def _bins(values: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Number of the bin of each value, (n,)."""
    return np.floor(values / width).astype(np.int64).clip(-MAX_BIN, MAX_BIN)


def _keys(latent: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """One number for each pair of latent and bin, (n,)."""
    return latent * (4 * MAX_BIN) + (bins + MAX_BIN)


def landmarks(y: np.ndarray, fvu: float, symbols: int) -> dict[str, float | None]:
    """Bits per row that other codes need for the same FVU.

    Args:
        y: Activations (n, O).
        fvu: FVU to match.
        symbols: Number of symbols of the text; 0 without text.

    Returns:
        Bits for Gaussian principal components, for the dense activation and for the character
        itself; None if there is none.
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
        centred: Rows less their mean, (n, O).
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
