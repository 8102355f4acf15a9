"""Abstraction of each level: the kind of concept that its latents detect best.

The difference between levels is tested against shuffled levels. Measures that need no labels stand
beside it: autocorrelation, variance explained by the current character, n-gram order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from sae_experiments.metric_info import Better
from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.metrics.codes import NOT_FINITE, Text, no_text, nulls, read_text, sparse_codes
from sae_experiments.metrics.levels.paths import ONE_LEVEL, levels_of
from sae_experiments.metrics.probing import Sample, Sampling, Task, draw_tasks
from sae_experiments.metrics.text.concepts import LEVELS, bank, label_all
from sae_experiments.metrics.text.ngrams import simulate

#: Groups of latents that are averaged over. Their numbers are stored as `meaning_group`.
GROUPS = ("all", "bottom", "top")
#: Kinds of concept; "none" for a latent that detects no concept.
KINDS = (*LEVELS, "none")
#: Metrics whose difference between top and bottom is tested: name -> its words in a formula.
TESTED = {
    "semantic_level": "the semantic level",
    "autocorrelation_length": "the autocorrelation length",
    "char_variance": "the variance by character",
}
#: F1 of a detector that is always on, on rows of which half are positive.
F1_ALWAYS_ON = 2 / 3

_TITLES = {"all": "", "bottom": " below", "top": " above"}
_WORDS = {"all": "all latents", "bottom": "bottom latents", "top": "top latents"}


def _suffix(group: str) -> str:
    return "" if group == "all" else f"_{group}"


def _group_infos(group: str) -> list[MetricInfo]:
    """Metrics that are averages over one group of latents."""
    words = _WORDS[group]

    def info(
        name: str,
        title: str,
        formula: str,
        unit: str = "",
        better: Better = "none",
        shown: bool = False,
    ) -> MetricInfo:
        return MetricInfo(
            name=name + _suffix(group),
            title=title + _TITLES[group],
            formula=formula,
            unit=unit,
            better=better,
            shown=shown,
        )

    infos = [
        info(
            "semantic_level",
            "semantic level",
            f"mean over {words} with a concept of the level of the concept they detect best: "
            "1 character, 2 word, 3 structure",
            shown=True,
        )
    ]
    for kind in KINDS:
        share = f"share of {words} whose best concept is of level {kind}"
        if kind == "none":
            share = f"share of {words} that detect no concept"
        infos.append(info(f"semantic_frac_{kind}", f"{kind} latents", share))
    infos += [
        info(
            "concept_f1",
            "concept F1",
            f"mean over {words} of the best concept's (F1 - 2/3) / (1/3) on balanced held-out rows",
            better="up",
        ),
        info(
            "autocorrelation_length",
            "autocorrelation",
            f"mean over {words} of the lag at which the autocorrelation of values falls below 1/e",
            unit="characters",
            shown=group != "all",
        ),
        info(
            "char_variance",
            "by character",
            f"mean over {words} of Var(E[z | current character]) / Var z",
            shown=group != "all",
        ),
        info(
            "suffix_order",
            "suffix order",
            f"mean over predictable {words} of the smallest n with 90 % of the best R2 of a table "
            "of the last n characters",
            unit="characters",
        ),
    ]
    return infos


def _test_infos(name: str, words: str) -> list[MetricInfo]:
    """Difference between the levels of one metric, and its p value."""
    title = name.replace("_", " ")
    shown = name == "semantic_level"
    return [
        MetricInfo(
            name=f"{name}_gap",
            title=f"{title}: above - below",
            formula=f"difference of {words}, top less bottom",
            unit="",
            better="none",
            shown=shown,
        ),
        MetricInfo(
            name=f"{name}_p",
            title=f"{title}: p",
            formula="share of permutations of the latents' levels with at least this difference of "
            f"{words}, two-sided",
            unit="",
            better="none",
            shown=shown,
        ),
    ]


INFO = [info for group in GROUPS for info in _group_infos(group)]
INFO += [info for name, words in TESTED.items() for info in _test_infos(name, words)]


@dataclass(frozen=True, kw_only=True)
class Options(Sampling):
    """Options of the metric."""

    rows: int | None
    """Held-out rows used, from the first (None: all)."""
    thresholds: int
    """Quantiles of a latent's values tried as threshold beside 0."""
    limit: float
    """Score (0: always on, 1: perfect) above which a latent has a level."""
    fires: int
    """Latents with fewer firings have no level."""
    permutations: int
    """Shuffles of the levels in the test."""
    longest: int
    """Characters that a table of `suffix_order` may read."""
    min_count: int
    """A suffix with fewer occurrences is shortened."""
    predictable: float
    """R2 above which a latent has an n-gram order."""
    order_rows: int
    """Rows that `suffix_order` is measured on."""


class Detection(NamedTuple):
    """Best concept per latent, (m,)."""

    level: np.ndarray
    """1 character, 2 word, 3 structure; NaN without a concept."""
    score: np.ndarray
    """Score of the best concept; NaN for a latent that fires too rarely."""
    concept: np.ndarray
    """Name of the concept; empty without one."""


def measure(ctx: EvalContext, **options: Any) -> Measured:
    """Semantic level of the latents, per level of the SAE.

    A latent has the level of the causal concept that it detects best with one threshold, chosen on
    training documents and scored on others. The score is F1 on rows balanced by label (and, for
    words and structure, matched by character), rescaled so that a detector that is always on has 0
    and a perfect one 1. The permutation test shuffles which latents are top and which bottom.
    The autocorrelation is within windows. `suffix_order` is that of `ngrams`.

    Args:
        ctx: The SAE and its held-out text.
        **options: Fields of `Options`.
    """
    opts = Options(**options)
    text, codes = read_text(ctx, opts.rows), sparse_codes(ctx, opts.rows)
    if text is None:
        return nulls(INFO, no_text(ctx))
    if codes is None:
        return nulls(INFO, NOT_FINITE)
    codes = sparse.csr_matrix(codes[: len(text.chars)])
    alive = np.diff(codes.tocsc().indptr) >= opts.fires
    tasks = _causal_tasks(ctx, text, opts)
    detected = _detect_concepts(codes, tasks, alive, opts)
    lengths = autocorrelation_lengths(codes, text.length)
    shares = variance_by_group(codes, text.chars)
    columns = {
        "semantic_level": detected.level,
        "concept_f1": detected.score,
        "autocorrelation_length": np.where(alive, lengths, np.nan),
        "char_variance": np.where(alive, shares, np.nan),
        "suffix_order": np.where(alive, _suffix_orders(codes, text, opts), np.nan),
    }
    levels = levels_of(ctx.sae)
    values: dict[str, float | None] = dict.fromkeys(i.name for i in INFO)
    for group, members in {"all": np.arange(len(alive)), **levels}.items():
        values |= _summary(columns, members, alive, _suffix(group))
    if len(levels) > 1:
        for name in TESTED:
            gap, p = permutation_test(
                columns[name], levels["top"], levels["bottom"], opts.permutations, opts.seed
            )
            values |= {f"{name}_gap": gap, f"{name}_p": p}
    why = {name: _why_null(name, levels) for name, value in values.items() if value is None}
    arrays = {f"meaning_{name}": column.astype(np.float32) for name, column in columns.items()}
    arrays["meaning_group"] = _group_numbers(levels, len(alive))
    if tasks:
        arrays["meaning_concept"] = detected.concept
    return Measured(values, arrays, why, features=_features(detected) or None)


def _causal_tasks(ctx: EvalContext, text: Text, sampling: Sampling) -> list[Task]:
    concepts = [c for c in bank(ctx.symbols) if c.causal]
    labels = label_all(concepts, text.chars, text.following, text.breaks)
    return draw_tasks(concepts, labels, text, sampling).tasks


def _detect_concepts(
    codes: sparse.csr_matrix, tasks: Sequence[Task], alive: np.ndarray, opts: Options
) -> Detection:
    level = np.full(len(alive), np.nan)
    best = np.full(len(alive), np.nan)
    if not tasks:
        return Detection(level, best, np.full(len(alive), ""))
    score = detection(codes, tasks, opts.thresholds)
    best_task = score.argmax(0)
    task_level = np.array([LEVELS.index(t.concept.level) + 1.0 for t in tasks])
    task_name = np.array([t.concept.name for t in tasks], dtype=str)
    best[alive] = score.max(0)[alive]
    detects = np.nan_to_num(best, nan=-np.inf) > opts.limit
    level[detects] = task_level[best_task[detects]]
    return Detection(level, best, np.where(detects, task_name[best_task], ""))


def _suffix_orders(codes: sparse.csr_matrix, text: Text, opts: Options) -> np.ndarray:
    """n-gram order of each latent (m,), on the first `order_rows` rows; NaN if unpredictable."""
    n_rows = len(text.chars)
    n = min(opts.order_rows, n_rows) // text.length * text.length or n_rows
    breaks = text.breaks[text.breaks < n]
    part = Text(text.chars[:n], text.following[:n], text.length, breaks)
    simulated = simulate(
        codes[:n],
        part,
        longest=opts.longest,
        min_fires=opts.min_positives,
        min_count=opts.min_count,
        block=opts.block,
    )
    predictable = np.nan_to_num(simulated.best) > opts.predictable
    return np.where(predictable, simulated.order, np.nan)


def _summary(
    columns: Mapping[str, np.ndarray], members: np.ndarray, alive: np.ndarray, suffix: str
) -> dict[str, float | None]:
    """Means of the columns (m,) over `members`, and shares of the kinds of concept."""
    values: dict[str, float | None] = {}
    for name, column in columns.items():
        known = column[members][~np.isnan(column[members])]
        values[f"{name}{suffix}"] = float(known.mean()) if len(known) else None
    level = columns["semantic_level"][members][alive[members]]
    for i, kind in enumerate(KINDS):
        of_kind = np.isnan(level) if kind == "none" else level == i + 1
        values[f"semantic_frac_{kind}{suffix}"] = float(of_kind.mean()) if len(level) else None
    return values


def _why_null(name: str, levels: Mapping[str, np.ndarray]) -> str:
    needs_levels = name.endswith(("_bottom", "_top", "_gap", "_p"))
    has_level = name.endswith(tuple(f"_{level}" for level in levels))
    if len(levels) < 2 and needs_levels and not has_level:
        return ONE_LEVEL
    return "no latent has a value"


def _group_numbers(levels: Mapping[str, np.ndarray], n_latents: int) -> np.ndarray:
    """Number of each latent's level in `GROUPS`, int8 (m,)."""
    numbers = np.zeros(n_latents, np.int8)
    for level, members in levels.items():
        numbers[members] = GROUPS.index(level)
    return numbers


def _features(detected: Detection) -> list[dict[str, Any]]:
    return [
        {
            "latent": j,
            "detects": str(detected.concept[j]),
            "detects_f1": float(f"{detected.score[j]:.3g}"),
        }
        for j in np.flatnonzero(~np.isnan(detected.level)).tolist()
    ]


# --------------------------------------------------------------------------------------- detection


def detection(codes: sparse.csr_matrix, tasks: Sequence[Task], thresholds: int) -> np.ndarray:
    """Score of every latent as a detector `z > t` of every concept, on the test rows.

    A latent that is off on positives scores 0. The threshold t is 0 or one of evenly spaced
    quantiles of the latent's positive values on the training rows, the one of largest F1 there.

    Args:
        codes: Codes, (N, m).
        tasks: K tasks.
        thresholds: Number of quantiles.

    Returns:
        Scores from 0 (always on) to 1, (K, m).
    """
    return np.stack([_task_scores(codes, task, thresholds) for task in tasks])


def _task_scores(codes: sparse.csr_matrix, task: Task, thresholds: int) -> np.ndarray:
    train = _by_label(codes, task.train)
    test = _by_label(codes, task.test)
    fires = np.count_nonzero(train[0], 0) + np.count_nonzero(train[1], 0)
    # Zeros come first, so a quantile of the positive values is a place counted from the end.
    ordered = np.sort(np.concatenate(train), 0)
    n, n_latents = ordered.shape
    threshold = np.zeros(n_latents, ordered.dtype)
    best_threshold = threshold
    best_f1 = _f1_above(train, threshold)
    for i in range(1, thresholds + 1):
        place = n - np.ceil(fires * (1 - i / (thresholds + 1))).astype(int)
        threshold = ordered[place.clip(max=n - 1), np.arange(n_latents)]
        f1 = _f1_above(train, threshold)
        better = f1 > best_f1
        best_f1 = np.where(better, f1, best_f1)
        best_threshold = np.where(better, threshold, best_threshold)
    test_f1 = _f1_above(test, best_threshold)
    return np.maximum((test_f1 - F1_ALWAYS_ON) * 3, 0)


def _by_label(codes: sparse.csr_matrix, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Dense codes of the positive and of the negative rows of a sample."""
    positives = codes[sample.rows[sample.labels]].toarray()
    negatives = codes[sample.rows[~sample.labels]].toarray()
    return positives, negatives


def _f1_above(values: tuple[np.ndarray, np.ndarray], threshold: np.ndarray) -> np.ndarray:
    """F1 (m,) of `value > threshold` (m,) on the values (n, m) of positives and negatives."""
    positives, negatives = values
    hits = np.count_nonzero(positives > threshold, 0)
    false_alarms = np.count_nonzero(negatives > threshold, 0)
    return 2 * hits / np.maximum(hits + false_alarms + len(positives), 1)


# ------------------------------------------------------------------------- measures without labels


def autocorrelation_lengths(codes: sparse.csr_matrix, length: int, block: int = 128) -> np.ndarray:
    """Lag at which each latent's autocorrelation within windows falls below 1/e.

    `r(l) = mean (z_t - m)(z_{t+l} - m) / Var z` over the pairs within windows, with m the mean over
    all rows. The lag is interpolated between whole numbers.

    Args:
        codes: Codes of whole windows, (N, m).
        length: Rows per window.
        block: Latents at a time.

    Returns:
        Lags (m,), at most `length - 1`; NaN for a latent without variance.
    """
    columns = codes.tocsc()
    n_rows, n_latents = codes.get_shape()
    n = n_rows // length
    lengths = np.full(n_latents, np.nan)
    counts = (length - np.arange(length)) * n
    for begin in range(0, n_latents, block):
        z = columns[: n * length, begin : begin + block].toarray().astype(np.float32)
        z -= z.mean(0)
        power = np.zeros((length + 1, z.shape[1]))
        for part in np.array_split(z.reshape(n, length, -1), max(n // 128, 1)):
            power += np.square(np.abs(np.fft.rfft(part, 2 * length, axis=1))).sum(0)
        r = np.fft.irfft(power, 2 * length, axis=0)[:length] / counts[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            r = r / r[0]
        lengths[begin : begin + block] = _lag_below(r, 1 / np.e)
    return lengths


def _lag_below(r: np.ndarray, level: float) -> np.ndarray:
    """First lag, interpolated, at which columns of `r` (length, m) fall below `level`.

    The largest lag for a column that never does, NaN for a column that is not finite.
    """
    last = len(r) - 1
    under = r < level
    falls = under.any(0)
    first = np.where(falls, under.argmax(0), last)
    column = np.arange(r.shape[1])
    upper = r[np.maximum(first - 1, 0), column]
    lower = r[first, column]
    interpolated = first - 1 + (upper - level) / np.maximum(upper - lower, 1e-12)
    lag = np.where(falls, interpolated, float(last))
    return np.where(np.isfinite(r).all(0), lag, np.nan)


def variance_by_group(codes: sparse.csr_matrix, groups: np.ndarray) -> np.ndarray:
    """Share of each latent's variance between groups of rows: `Var(E[z | group]) / Var z`.

    The estimate is omega squared, which subtracts the share that chance gives, and at least 0.

    Args:
        codes: Codes, (N, m).
        groups: Group of each row, (N,).

    Returns:
        Shares (m,); NaN for a latent without variance.
    """
    names, ids = np.unique(groups, return_inverse=True)
    n, k = len(ids), len(names)
    membership = sparse.csr_matrix((np.ones(n), (ids, np.arange(n))), shape=(k, n))
    sums = sparse.csr_matrix(membership @ codes).toarray()
    size = np.bincount(ids)[:, None]
    mean = sums.sum(0) / n
    squares = np.asarray(codes.multiply(codes).sum(0), np.float64).ravel()
    total = squares - n * mean**2
    between = (np.square(sums / size - mean) * size).sum(0)
    within = (total - between) / max(n - k, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.maximum((between - (k - 1) * within) / (total + within), 0)


def permutation_test(
    values: np.ndarray, top: np.ndarray, bottom: np.ndarray, draws: int, seed: int
) -> tuple[float | None, float | None]:
    """Test the difference between the means of top and bottom latents.

    Args:
        values: A value per latent (m,), NaN for none.
        top: Indices of the top latents.
        bottom: Indices of the bottom latents.
        draws: Number of shuffles of the levels.
        seed: Seed of the shuffles.

    Returns:
        Mean of the top less that of the bottom, and its two-sided p, (1 + hits) / (1 + draws).
        None if a level has no latent with a value.
    """
    above = values[top][~np.isnan(values[top])]
    below = values[bottom][~np.isnan(values[bottom])]
    if not len(above) or not len(below):
        return None, None
    pooled = np.concatenate([above, below])
    rng = np.random.default_rng(seed)
    observed = float(above.mean() - below.mean())
    total = pooled.sum()
    hits = 0
    for _ in range(draws):
        drawn = rng.permutation(pooled)[: len(above)].sum()
        gap = drawn / len(above) - (total - drawn) / len(below)
        hits += abs(gap) >= abs(observed) - 1e-12
    return observed, (1 + hits) / (1 + draws)
