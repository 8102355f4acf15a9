"""n-gram simulation: predict a latent's activation from a table of the last n characters.

The simulation score of Bills et al. (2023) without a language model.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.metrics.codes import NO_TEXT, NOT_FINITE, Text, nulls, read_text, sparse_codes

INFO = [
    MetricInfo(
        name="ngram_r2",
        title="n-gram R2",
        formula="mean over latents of the best held-out R2 of its value predicted from the last "
        "n characters",
        unit="",
        better="up",
    ),
    MetricInfo(
        name="ngram_score",
        title="n-gram score",
        formula="mean over latents of Pearson's r of value and prediction at the best n",
        unit="",
        better="up",
        shown=False,
    ),
    MetricInfo(
        name="ngram_order",
        title="n-gram order",
        formula="mean over predictable latents of the smallest n with 90 % of the best R2",
        unit="characters",
        better="none",
    ),
    MetricInfo(
        name="ngram_predictable_frac",
        title="n-gram predictable",
        formula="share of latents with a best R2 above the limit",
        unit="",
        better="up",
        shown=False,
    ),
]


class Simulated(NamedTuple):
    """Simulation of m latents by tables of the last n characters.

    Attributes:
        r2: Held-out R2 by order (m, longest); NaN for latents that fire too rarely.
        score: Pearson's r of value and prediction at the best order, (m,).
        order: Smallest n with 90 % of the best R2, (m,); 0 if no order helps.
    """

    r2: np.ndarray
    score: np.ndarray
    order: np.ndarray

    @property
    def best(self) -> np.ndarray:
        """Best R2 over orders, at least 0, (m,); NaN for latents that fire too rarely."""
        best = _best_r2(self.r2).clip(min=0)
        return np.where(np.isnan(self.r2[:, 0]), np.nan, best)


def measure(
    ctx: EvalContext,
    *,
    rows: int | None,
    longest: int,
    min_fires: int,
    min_count: int,
    predictable: float,
    block: int,
) -> Measured:
    """Simulate latents by tables from every second document, scored on the other documents.

    The prediction is `T_n[last n characters] = mean z_j`, for n up to `longest`. A suffix with
    fewer than `min_count` occurrences backs off to the suffix that is one character shorter; so
    does a suffix that begins before the window. The statistic is that of Bills et al. (2023); the
    simulator is a table.

    Args:
        ctx: The SAE and its held-out text.
        rows: Held-out rows used (None: all); half of them fill the tables.
        longest: Largest n, in characters.
        min_fires: Firings that a latent needs in each half.
        min_count: Occurrences that a suffix needs.
        predictable: R2 above which a latent counts as predictable.
        block: Windows per document.
    """
    text, codes = read_text(ctx, rows, tokens=True), sparse_codes(ctx, rows)
    if text is None:
        return nulls(INFO, NO_TEXT)
    if codes is None:
        return nulls(INFO, NOT_FINITE)
    codes = codes[: len(text.chars)]
    simulated = simulate(
        codes, text, longest=longest, min_fires=min_fires, min_count=min_count, block=block
    )
    used = ~np.isnan(simulated.r2[:, 0])
    if not used.any():
        return nulls(INFO, f"no latent fires {min_fires} times in both halves of the text")
    best = simulated.best[used]
    orders = simulated.order[used][best > predictable]
    values = {
        "ngram_r2": float(best.mean()),
        "ngram_score": float(simulated.score[used].mean()),
        "ngram_order": float(orders.mean()) if len(orders) else None,
        "ngram_predictable_frac": float((best > predictable).mean()),
    }
    arrays = {
        "ngram_r2": simulated.r2,
        "ngram_score": simulated.score,
        "ngram_order": simulated.order,
    }
    why_null = {}
    if not len(orders):
        why_null["ngram_order"] = f"no latent has an R2 above {predictable}"
    return Measured(values, arrays, why_null)


def simulate(
    codes: sparse.csr_matrix,
    text: Text,
    *,
    longest: int,
    min_fires: int,
    min_count: int,
    block: int,
) -> Simulated:
    """Fill tables from the documents of even number and score them on those of odd number.

    Args:
        codes: Codes of the rows of `text`, (N, m).
        text: The text.
        longest: Largest number of characters.
        min_fires: Firings that a latent needs in each half.
        min_count: Occurrences that a suffix needs.
        block: Windows per document.
    """
    in_train = text.blocks(block) % 2 == 0
    codes = sparse.csr_matrix(codes, dtype=np.float64)
    train, test = codes[in_train], codes[~in_train]
    n_test = int(np.count_nonzero(~in_train))
    fires = np.minimum(np.diff(train.tocsc().indptr), np.diff(test.tocsc().indptr))
    used = fires >= min_fires
    n_latents = len(fires)
    r2 = np.full((n_latents, longest), np.nan)
    score = np.full((n_latents, longest), 0.0)
    if not n_test or not used.any():
        return Simulated(r2, np.full(n_latents, np.nan), np.zeros(n_latents, np.int64))
    targets = _Targets.of(test, n_test)
    # Tables are stacked: row 0 holds the means over all rows (order 0), then come the suffixes of
    # length 1, 2, ... `entry` is the row of the stack that predicts each test row.
    tables = [sparse.csr_matrix(train.mean(0))]
    entry = np.zeros(n_test, np.int64)
    n_entries = 1
    for i, (ids, known) in enumerate(suffixes(text, longest)):
        train_ids, train_known = ids[in_train], known[in_train]
        counts = np.bincount(train_ids[train_known], minlength=ids.max() + 1)
        tables.append(_group_means(train, train_ids, train_known, counts))
        usable = known & (counts[ids] >= min_count)
        entry = np.where(usable[~in_train], n_entries + ids[~in_train], entry)
        n_entries += len(counts)
        predictions = sparse.csr_matrix(sparse.vstack(tables))
        fit = _score_tables(predictions, n_entries, entry, targets)
        r2[:, i] = np.where(used & (targets.variance > 0), fit.r2, np.nan)
        score[:, i] = fit.pearson
    best = _best_r2(r2)
    order = np.where(best > 0, (r2 >= 0.9 * best[:, None]).argmax(1) + 1, 0)
    best_column = np.nan_to_num(r2, nan=-np.inf).argmax(1)
    best_score = score[np.arange(n_latents), best_column]
    return Simulated(r2, np.where(np.isnan(r2[:, 0]), np.nan, best_score), order)


def suffixes(text: Text, longest: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Number the last n characters of every row, for n = 1 to `longest`.

    Returns:
        For each n a number per row that equal suffixes share (N,), and a mask (N,) of the rows
        whose window holds that many characters.
    """
    numbered = []
    symbols = np.unique(text.chars, return_inverse=True)[1].astype(np.int64)
    ids = np.zeros(len(symbols), np.int64)
    offset = text.offset
    for n in range(longest):
        before = np.zeros_like(symbols)
        before[n:] = symbols[: len(symbols) - n]
        ids = np.unique(ids * (symbols.max() + 1) + before, return_inverse=True)[1]
        numbered.append((ids, offset >= n))
    return numbered


class _Targets(NamedTuple):
    """Values to predict (n, m), with their sums, sums of squares and squared deviations (m,)."""

    values: sparse.csr_matrix
    sums: np.ndarray
    squares: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, values: sparse.csr_matrix, n: int) -> _Targets:
        """Targets and their statistics from values (n, m)."""
        sums = np.asarray(values.sum(0)).ravel()
        squares = np.asarray(values.multiply(values).sum(0)).ravel()
        return cls(values, sums, squares, squares - sums**2 / n)


class _Fit(NamedTuple):
    """R2 and Pearson's r per latent (m,)."""

    r2: np.ndarray
    pearson: np.ndarray


def _score_tables(
    predictions: sparse.csr_matrix, n_groups: int, entry: np.ndarray, targets: _Targets
) -> _Fit:
    """Score predictions that are constant within groups of rows.

    Args:
        predictions: Prediction of each group, (G, m).
        n_groups: Number of groups, G.
        entry: Group of each row, (n,).
        targets: Values to predict.
    """
    n = len(entry)
    target_sums = _group_sums(targets.values, entry, np.ones(n), n_groups)
    group_sizes = np.bincount(entry, minlength=n_groups).astype(np.float64)
    cross = np.asarray(predictions.multiply(target_sums).sum(0)).ravel()
    predicted_sum = np.asarray(predictions.T @ group_sizes).ravel()
    predicted_squares = np.asarray(predictions.multiply(predictions).T @ group_sizes).ravel()
    predicted_variance = np.maximum(predicted_squares - predicted_sum**2 / n, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r2 = 1 - (targets.squares - 2 * cross + predicted_squares) / targets.variance
        covariance = cross - predicted_sum * targets.sums / n
        pearson = covariance / np.sqrt(predicted_variance * targets.variance)
    return _Fit(r2, np.nan_to_num(pearson, posinf=0, neginf=0))


def _group_sums(
    values: sparse.csr_matrix, group: np.ndarray, weight: np.ndarray, n_groups: int
) -> sparse.csr_matrix:
    """Weighted sums (n_groups, m) of the rows of `values` (n, m) in each group."""
    n = len(group)
    membership = sparse.csr_matrix((weight, (group, np.arange(n))), shape=(n_groups, n))
    return membership @ values


def _group_means(
    values: sparse.csr_matrix, group: np.ndarray, included: np.ndarray, counts: np.ndarray
) -> sparse.csr_matrix:
    """Means (G, m) over the `included` rows (n,) of each group; `counts` (G,) is their number."""
    weight = np.where(included, 1.0, 0.0) / np.maximum(counts[group], 1)
    return _group_sums(values, group, weight, len(counts))


def _best_r2(r2: np.ndarray) -> np.ndarray:
    """Largest R2 per latent (m,); -inf for rows of NaN."""
    return np.nan_to_num(r2, nan=-np.inf).max(1)
