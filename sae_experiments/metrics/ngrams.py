"""Can a table of the last n characters say how strongly a latent fires? Simulation scores without a language model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import NO_TEXT, NOT_FINITE, Text, nulls, read_text, sparse_codes

INFO = [
    MetricInfo(
        name="ngram_r2",
        title="n-gram R2",
        formula="mean over latents of the best held-out R2 of its value predicted from the last n characters",
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
    """For each latent (m,): ``r2`` (m, n) by order, NaN where it fires too rarely; Pearson's r at the best order; order, 0 where none helps."""

    r2: np.ndarray
    score: np.ndarray
    order: np.ndarray

    @property
    def best(self) -> np.ndarray:
        return np.where(np.isnan(self.r2[:, 0]), np.nan, np.nan_to_num(self.r2, nan=-np.inf).max(1).clip(min=0))


def measure(bench: Bench, *, rows: int | None, longest: int, least: int, min_count: int, predictable: float, block: int) -> Measured:
    """``T_n[last n characters] = mean z_j`` on every second document, R2 and Pearson's r on the others, for n up to ``longest``.

    A suffix seen fewer than ``min_count`` times backs off to the one a character shorter; so does one that begins before the window. The
    statistic is that of Bills et al. 2023, the simulator being a table. Latents that fire fewer than ``least`` times in a half are left out.
    """
    text, codes = read_text(bench, rows), sparse_codes(bench, rows)
    if text is None:
        return nulls(INFO, NO_TEXT)
    if codes is None:
        return nulls(INFO, NOT_FINITE)
    codes = codes[: len(text.chars)]
    found = simulate(codes, text, longest=longest, least=least, min_count=min_count, block=block)
    used = ~np.isnan(found.r2[:, 0])
    if not used.any():
        return nulls(INFO, f"no latent fires {least} times in both halves of the text")
    best, good = found.best[used], found.order[used][found.best[used] > predictable]
    values = {
        "ngram_r2": float(best.mean()),
        "ngram_score": float(found.score[used].mean()),
        "ngram_order": float(good.mean()) if len(good) else None,
        "ngram_predictable_frac": float((best > predictable).mean()),
    }
    why = {} if len(good) else {"ngram_order": f"no latent has an R2 above {predictable}"}
    return Measured(values, {"ngram_r2": found.r2, "ngram_score": found.score, "ngram_order": found.order}, why)


def simulate(codes: sparse.csr_matrix, text: Text, *, longest: int, least: int, min_count: int, block: int) -> Simulated:
    """Tables from the documents of even number, tested on those of odd number."""
    train = text.blocks(block) % 2 == 0
    z = codes.astype(np.float64)
    parts = z[train], z[~train]
    m, n = z.shape[1], parts[1].shape[0]
    r2, score = np.full((m, longest), np.nan), np.full((m, longest), 0.0)
    fires = np.minimum(*(np.diff(p.tocsc().indptr) for p in parts))
    used = fires >= least
    if not n or not used.any():
        return Simulated(r2, np.full(m, np.nan), np.zeros(m, np.int64))
    total, squares = (np.asarray(p.sum(0)).ravel() for p in (parts[1], parts[1].multiply(parts[1])))
    variance = squares - total**2 / n
    tables = [sparse.csr_matrix(parts[0].mean(0))]
    group, offset = np.zeros(n, np.int64), 1
    for order, (ids, known) in enumerate(suffixes(text, longest)):
        counts = np.bincount(ids[train & known], minlength=ids.max() + 1)
        tables.append(_sums(ids[train], np.where((train & known)[train], 1.0, 0.0), parts[0], len(counts), counts))
        usable = (known & (counts[ids] >= min_count))[~train]
        group = np.where(usable, offset + ids[~train], group)
        offset += len(counts)
        predicted, actual = sparse.vstack(tables).tocsr(), _sums(group, np.ones(n), parts[1], offset, None)
        rows = np.bincount(group, minlength=offset).astype(np.float64)
        cross = np.asarray(predicted.multiply(actual).sum(0)).ravel()
        mean = np.asarray(predicted.T @ rows).ravel()
        power = np.asarray(predicted.multiply(predicted).T @ rows).ravel()
        spread = np.maximum(power - mean**2 / n, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            r2[:, order] = np.where(used & (variance > 0), 1 - (squares - 2 * cross + power) / variance, np.nan)
            score[:, order] = np.nan_to_num((cross - mean * total / n) / np.sqrt(spread * variance), posinf=0, neginf=0)
    best = np.nan_to_num(r2, nan=-np.inf).max(1)
    order = np.where(best > 0, (r2 >= 0.9 * best[:, None]).argmax(1) + 1, 0)
    at_best = score[np.arange(m), np.nan_to_num(r2, nan=-np.inf).argmax(1)]
    return Simulated(r2, np.where(np.isnan(r2[:, 0]), np.nan, at_best), order)


def suffixes(text: Text, longest: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For n = 1..longest: a number for the last n characters of every row, and where the window holds that many."""
    found, ids, offset = [], np.zeros(len(text.chars), np.int64), text.offset
    symbols = np.unique(text.chars, return_inverse=True)[1].astype(np.int64)
    for n in range(longest):
        before = np.zeros_like(symbols)
        before[n:] = symbols[: len(symbols) - n]
        ids = np.unique(ids * (symbols.max() + 1) + before, return_inverse=True)[1]
        found.append((ids, offset >= n))
    return found


def _sums(group: np.ndarray, weight: np.ndarray, z: sparse.csr_matrix, n_groups: int, counts: np.ndarray | None) -> sparse.csr_matrix:
    """Sum of the rows of ``z`` in each group, weighted; means where ``counts`` are given."""
    weight = weight if counts is None else weight / np.maximum(counts[group], 1)
    return sparse.csr_matrix((weight, (group, np.arange(len(group)))), shape=(n_groups, len(group))) @ z
