"""How abstract is a level? The kind of concept its latents detect best, tested against shuffled levels, and companions that need no labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import NO_TEXT, NOT_FINITE, Text, read_text, sparse_codes
from sae_experiments.metrics.levels.paths import levels_of
from sae_experiments.metrics.probing import Sample, Task, tasks_of
from sae_experiments.metrics.text.concepts import LEVELS, bank, label_all
from sae_experiments.metrics.text.ngrams import simulate

NAMES = ("all", "bottom", "top")
KINDS = (*LEVELS, "none")
TITLES = {"all": "", "bottom": " below", "top": " above"}
WORDS = {"all": "all latents", "bottom": "bottom latents", "top": "top latents"}


def _infos() -> list[MetricInfo]:
    found = []
    for name in NAMES:
        t, w = TITLES[name], WORDS[name]
        suffix = "" if name == "all" else f"_{name}"
        found += [
            MetricInfo(
                name=f"semantic_level{suffix}", title=f"semantic level{t}", unit="", better="none", shown=True,
                formula=f"mean over {w} with a concept of the level of the concept they detect best: 1 character, 2 word, 3 structure",
            ),
            *(
                MetricInfo(
                    name=f"semantic_frac_{kind}{suffix}", title=f"{kind} latents{t}", unit="", better="none", shown=False,
                    formula=f"share of {w} " + ("that detect no concept" if kind == "none" else f"whose best concept is of level {kind}"),
                )
                for kind in KINDS
            ),
            MetricInfo(
                name=f"concept_f1{suffix}", title=f"concept F1{t}", unit="", better="up", shown=False,
                formula=f"mean over {w} of the best concept's (F1 - 2/3) / (1/3) on balanced held-out rows",
            ),
            MetricInfo(
                name=f"autocorrelation_length{suffix}", title=f"autocorrelation{t}", unit="characters", better="none", shown=bool(suffix),
                formula=f"mean over {w} of the lag at which the autocorrelation of values falls below 1/e",
            ),
            MetricInfo(
                name=f"char_variance{suffix}", title=f"by character{t}", unit="", better="none", shown=bool(suffix),
                formula=f"mean over {w} of Var(E[z | current character]) / Var z",
            ),
            MetricInfo(
                name=f"suffix_order{suffix}", title=f"suffix order{t}", unit="characters", better="none", shown=False,
                formula=f"mean over predictable {w} of the smallest n with 90 % of the best R2 of a table of the last n characters",
            ),
        ]  # fmt: skip
    for name, words in (("semantic_level", "the semantic level"), ("autocorrelation_length", "the autocorrelation length"),
                        ("char_variance", "the variance by character")):  # fmt: skip
        found += [
            MetricInfo(name=f"{name}_gap", title=f"{name.replace('_', ' ')}: above - below", formula=f"difference of {words}, top less bottom",
                       unit="", better="none", shown=name == "semantic_level"),
            MetricInfo(name=f"{name}_p", title=f"{name.replace('_', ' ')}: p", unit="", better="none", shown=name == "semantic_level",
                       formula=f"share of permutations of the latents' levels with at least this difference of {words}, two-sided"),
        ]  # fmt: skip
    return found


INFO = _infos()


def measure(
    bench: Bench, *, rows: int | None, n_train: int, n_test: int, least: int, skip: int, block: int, test_frac: float, thresholds: int, limit: float,
    fires: int, permutations: int, longest: int, min_count: int, predictable: float, order_rows: int, seed: int,
) -> Measured:  # fmt: skip
    """A latent's level is that of the causal concept it detects best with one threshold, chosen on training documents and scored on others.

    The score is F1 on rows balanced by label (and, for words and structure, matched by character), rescaled so that always saying yes has 0
    and a perfect detector 1; below ``limit`` a latent has no level. The permutation test shuffles which latents are top and which bottom.
    Autocorrelation within windows; ``suffix_order`` on the first ``order_rows`` rows (:mod:`.ngrams`).
    """
    none = {i.name: None for i in INFO}
    text, codes = read_text(bench, rows), sparse_codes(bench, rows)
    if text is None or codes is None:
        return Measured(none, why_null=dict.fromkeys(none, NO_TEXT if text is None else NOT_FINITE))
    codes = codes[: len(text.chars)]
    counts = np.diff(codes.tocsc().indptr)
    alive = counts >= fires
    tasks = _tasks(bench, text, n_train, n_test, least, skip, block, test_frac, seed)
    score = detection(codes, tasks, thresholds) if tasks else np.zeros((0, codes.shape[1]))
    level, best = np.full(codes.shape[1], np.nan), np.full(codes.shape[1], np.nan)
    if tasks:
        which = np.array([LEVELS.index(t.concept.level) for t in tasks])
        best[alive] = score.max(0)[alive]
        level[alive] = np.where(best[alive] > limit, which[score.argmax(0)[alive]] + 1.0, np.nan)
    length = np.where(alive, autocorrelation_lengths(codes, text.length), np.nan)
    share = np.where(alive, variance_by_group(codes, text.chars), np.nan)
    part = slice(0, min(order_rows, len(text.chars)) // text.length * text.length or len(text.chars))
    short = Text(text.chars[part], text.following[part], text.length, text.breaks[text.breaks < part.stop])
    orders = simulate(codes[part], short, longest=longest, least=least, min_count=min_count, block=block)
    order = np.where((np.nan_to_num(orders.best) > predictable) & alive, orders.order, np.nan)
    columns = {"semantic_level": level, "concept_f1": best, "autocorrelation_length": length, "char_variance": share, "suffix_order": order}
    levels = levels_of(bench.sae)
    found, why = dict(none), {}
    for name, members in {"all": np.arange(codes.shape[1]), **levels}.items():
        found |= _summary(columns, members, alive, "" if name == "all" else f"_{name}")
    if len(levels) > 1:
        for name in ("semantic_level", "autocorrelation_length", "char_variance"):
            gap, p = permutation_test(columns[name], levels["top"], levels["bottom"], permutations, seed)
            found |= {f"{name}_gap": gap, f"{name}_p": p}
    for name, value in found.items():
        if value is None:
            lost = name.endswith(("_bottom", "_top", "_gap", "_p")) and not (set(levels) - {"all"} and name.endswith(tuple(f"_{n}" for n in levels)))
            why[name] = "the SAE has one level" if lost and len(levels) < 2 else "no latent has a value"
    arrays = {f"meaning_{name}": values.astype(np.float32) for name, values in columns.items()}
    arrays["meaning_group"] = _numbers(levels, codes.shape[1])
    if tasks:
        named = np.array([t.concept.name for t in tasks], dtype=str)
        arrays["meaning_concept"] = np.where(np.isnan(level), "", named[score.argmax(0)])
    features = [
        {"latent": j, "detects": str(arrays["meaning_concept"][j]), "detects_f1": float(f"{best[j]:.3g}")}
        for j in (np.flatnonzero(~np.isnan(level)).tolist() if tasks else [])
    ]
    return Measured(found, arrays, why, features=features or None)


def _numbers(levels: dict[str, np.ndarray], m: int) -> np.ndarray:
    out = np.zeros(m, np.int8)
    for name, members in levels.items():
        out[members] = NAMES.index(name)
    return out


def _summary(columns: dict[str, np.ndarray], members: np.ndarray, alive: np.ndarray, suffix: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, column in columns.items():
        known = column[members][~np.isnan(column[members])]
        found[f"{name}{suffix}"] = float(known.mean()) if len(known) else None
    levels = columns["semantic_level"][members][alive[members]]
    for i, kind in enumerate(KINDS):
        has = np.isnan(levels) if kind == "none" else levels == i + 1
        found[f"semantic_frac_{kind}{suffix}"] = float(has.mean()) if len(levels) else None
    return found


def _tasks(
    bench: Bench, text: Text, n_train: int, n_test: int, least: int, skip: int, block: int, test_frac: float, seed: int
) -> list[Task]:  # fmt: skip
    concepts = [c for c in bank(bench.symbols) if c.causal]
    labels = label_all(concepts, text.chars, text.following, text.breaks)
    document, usable, chance = text.blocks(block), text.offset >= skip, np.random.default_rng(seed)
    test = chance.random(document[-1] + 1)[document] < test_frac
    return tasks_of(concepts, labels, text.chars, (usable & ~test, usable & test), (n_train, n_test), least, chance)


def detection(codes: sparse.csr_matrix, tasks: Sequence[Task], thresholds: int) -> np.ndarray:
    """For each task and latent (K, m) the held-out score of ``z > t`` (or, for a latent that is off on positives, nothing: at best 0).

    t is 0 or one of ``thresholds`` even quantiles of the latent's positive values on the training rows, the one of largest F1 there.
    """
    return np.stack([_detect(codes, task, thresholds) for task in tasks])


def _detect(codes: sparse.csr_matrix, task: Task, thresholds: int) -> np.ndarray:
    train, test = (_by_label(codes, s) for s in (task.train, task.test))
    fires = np.count_nonzero(train[0], 0) + np.count_nonzero(train[1], 0)
    ordered = np.sort(np.concatenate(train), 0)  # zeros first, so quantiles of the positive part are places counted from the end
    n = len(ordered)
    best, cut = np.full(codes.shape[1], -1.0), np.zeros(codes.shape[1], ordered.dtype)
    for i in range(thresholds + 1):
        place = n - np.ceil(fires * (1 - i / (thresholds + 1))).astype(int)
        t = np.zeros_like(cut) if i == 0 else ordered[place.clip(max=n - 1), np.arange(len(cut))]
        f1 = _f1(train, t)
        better = f1 > best
        best, cut = np.where(better, f1, best), np.where(better, t, cut)
    return np.maximum((_f1(test, cut) - 2 / 3) * 3, 0)


def _by_label(codes: sparse.csr_matrix, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    return codes[sample.rows[sample.labels]].toarray(), codes[sample.rows[~sample.labels]].toarray()


def _f1(values: tuple[np.ndarray, np.ndarray], t: np.ndarray) -> np.ndarray:
    hits, wrong = (np.count_nonzero(v > t, 0) for v in values)
    return 2 * hits / np.maximum(hits + wrong + len(values[0]), 1)


def autocorrelation_lengths(codes: sparse.csr_matrix, length: int, block: int = 128) -> np.ndarray:
    """The lag (m,), between whole numbers by interpolation, at which each latent's autocorrelation within windows falls below 1/e.

    ``r(l) = mean (z_t - m)(z_{t+l} - m) / Var z`` over the pairs within windows, m the mean over all rows; at most ``length - 1``.
    """
    columns, n = codes.tocsc(), codes.shape[0] // length
    out, counts = np.full(codes.shape[1], np.nan), (length - np.arange(length)) * n
    for begin in range(0, codes.shape[1], block):
        z = columns[: n * length, begin : begin + block].toarray().astype(np.float32)
        z -= z.mean(0)
        power = np.zeros((length + 1, z.shape[1]))
        for part in np.array_split(z.reshape(n, length, -1), max(n // 128, 1)):
            power += np.square(np.abs(np.fft.rfft(part, 2 * length, axis=1))).sum(0)
        r = np.fft.irfft(power, 2 * length, axis=0)[:length] / counts[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            r = r / r[0]
        under = r < 1 / np.e
        first = np.where(under.any(0), under.argmax(0), length - 1)
        here = np.arange(z.shape[1])
        upper, lower = r[np.maximum(first - 1, 0), here], r[first, here]
        exact = np.where(under.any(0), first - 1 + (upper - 1 / np.e) / np.maximum(upper - lower, 1e-12), length - 1.0)
        out[begin : begin + block] = np.where(np.isfinite(r).all(0), exact, np.nan)
    return out


def variance_by_group(codes: sparse.csr_matrix, groups: np.ndarray) -> np.ndarray:
    """``Var(E[z | group]) / Var z`` of every latent (m,), less what chance gives: omega squared, not below 0."""
    names, ids = np.unique(groups, return_inverse=True)
    n, k = codes.shape[0], len(names)
    member = sparse.csr_matrix((np.ones(n), (ids, np.arange(n))), shape=(k, n))
    sums, size = np.asarray((member @ codes).todense(), np.float64), np.bincount(ids)[:, None]
    mean = sums.sum(0) / n
    between = (np.square(sums / size - mean) * size).sum(0)
    total = np.asarray(codes.multiply(codes).sum(0), np.float64).ravel() - n * mean**2
    within = (total - between) / max(n - k, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.maximum((between - (k - 1) * within) / (total + within), 0)


def permutation_test(values: np.ndarray, top: np.ndarray, bottom: np.ndarray, draws: int, seed: int) -> tuple[float | None, float | None]:
    """Mean of the top less that of the bottom over latents with a value, and the two-sided p of shuffled levels: (1 + hits) / (1 + draws)."""
    parts: list[Any] = [v[~np.isnan(v)] for v in (values[top], values[bottom])]
    if not len(parts[0]) or not len(parts[1]):
        return None, None
    together, n, chance = np.concatenate(parts), len(parts[0]), np.random.default_rng(seed)
    observed = float(parts[0].mean() - parts[1].mean())
    total, hits = together.sum(), 0
    for _ in range(draws):
        drawn = chance.permutation(together)[:n].sum()
        gap = drawn / n - (total - drawn) / (len(together) - n)
        hits += abs(gap) >= abs(observed) - 1e-12
    return observed, (1 + hits) / (1 + draws)
