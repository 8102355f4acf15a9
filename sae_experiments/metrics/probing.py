"""Can a concept be read off a few latents? k-sparse probes (Gurnee et al. 2023) on the concept bank, with ceilings and floors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import NO_TEXT, NOT_FINITE, nulls, random_sae, raw_rows, read_text, sparse_codes
from sae_experiments.metrics.noise import auc, resampled_auc
from sae_experiments.metrics.text.concepts import LEVELS, Concept, bank, label_all

KS = ("1", "2", "5", "16", "all")
FAMILIES = (*LEVELS, "predictive")
SOURCES = {
    "sae": ("latents", "up"),
    "random": ("latents of a random SAE of the same size and L0", "none"),
    "pca": ("principal components", "none"),
    "raw": ("dimensions of the activation", "none"),
}


def _name(source: str, family: str, k: str) -> str:
    return f"probe_auc_{family}_k{k}" if source == "sae" else f"probe_{source}_{family}_k{k}"


INFO = [
    MetricInfo(
        name=_name(source, family, k),
        title=f"probe {family} k={k}" + ("" if source == "sae" else f" ({source})"),
        formula=f"mean over {family} concepts of the held-out AUC of a logistic probe on {'all' if k == 'all' else k} {words}",
        unit="",
        better=better,
        shown=source == "sae" and k in ("1", "5") and family in LEVELS,
    )
    for source, (words, better) in SOURCES.items()
    for k in KS
    for family in FAMILIES
]


class Sample(NamedTuple):
    """Rows of one probe and their labels, balanced."""

    rows: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Task:
    """A concept with its training and test rows, from different documents."""

    concept: Concept
    train: Sample
    test: Sample

    @property
    def family(self) -> str:
        return self.concept.level if self.concept.causal else "predictive"


class Score(NamedTuple):
    """A probe on the test rows. ``threshold``ed at probability one half for accuracy and F1; ``noise`` of the AUC over documents."""

    auc: float
    accuracy: float
    f1: float
    resampled: np.ndarray


def measure(
    bench: Bench, *, rows: int | None, k: Sequence[int | str], floors: Sequence[int | str], ceilings: Sequence[int | str], n_train: int, n_test: int,
    least: int, skip: int, block: int, test_frac: float, strengths: Sequence[float], bootstrap: int, seed: int,
) -> Measured:  # fmt: skip
    """Scores of each level: AUC of the concepts in it (concepts of one group count as one), for ``k`` latents and their baselines.

    Latents are chosen on training documents by |mean over positives - mean over negatives| over their mean non-zero value (sae-probes).
    Negatives have the same characters as the positives, except for concepts that are about the character itself. ``floors``: k for the
    random SAE, PCA and single dimensions; ``ceilings``: k for all dimensions of the activation ("all"). ``block`` windows are a document;
    the first ``skip`` characters of a window are left out (the model has read nothing yet). A concept needs ``least`` rows of each label.
    """
    text, codes = read_text(bench, rows), sparse_codes(bench, rows)
    infos = [i for i in INFO if i.name in {_name("sae", f, str(n)) for f in FAMILIES for n in k}]
    if text is None:
        return nulls(infos, NO_TEXT)
    x = raw_rows(bench, len(text.chars))
    if codes is None or not np.isfinite(x).all():
        return nulls(infos, NOT_FINITE)
    concepts = bank(bench.symbols)
    labels = label_all(concepts, text.chars, text.following, text.breaks)
    document = text.blocks(block)
    usable, chance = text.offset >= skip, np.random.default_rng(seed)
    test = chance.random(document[-1] + 1)[document] < test_frac
    sizes = (n_train, n_test)
    tasks = tasks_of(concepts, labels, text.chars, (usable & ~test, usable & test), sizes, least, chance)
    fit = Fitter(document, strengths, bootstrap, seed, np.unique(document[test]))
    values = sparse_features(codes.tocsc()[: len(text.chars)])
    found = {("sae", str(n)): fit.all(tasks, values, n) for n in k}
    if floors:
        random = sparse_codes(bench, len(text.chars), random_sae(bench, codes.nnz / codes.shape[0], rows=1 << 14, seed=seed))
        for source, features in (("random", sparse_features(random.tocsc())), ("pca", dense_features(principal(x))), ("raw", dense_features(x))):
            found |= {(source, str(n)): fit.all(tasks, features, n) for n in floors}
    found |= {("raw", str(n)): fit.all(tasks, dense_features(x), n) for n in ceilings}
    return _report(tasks, found)


def tasks_of(
    concepts: Sequence[Concept],
    labels: np.ndarray,
    chars: np.ndarray,
    parts: tuple[np.ndarray, np.ndarray],
    sizes: tuple[int, int],
    least: int,
    chance: np.random.Generator,
) -> list[Task]:
    """The concepts that have at least ``least`` positives and as many fitting negatives in both parts."""
    found = []
    for concept, label in zip(concepts, labels, strict=True):
        drawn = [balanced(label, chars if concept.matched else None, part, n, chance) for part, n in zip(parts, sizes, strict=True)]
        if min(int(s.labels.sum()) for s in drawn) >= least:
            found.append(Task(concept, *drawn))
    return found


def balanced(label: np.ndarray, chars: np.ndarray | None, usable: np.ndarray, n: int, chance: np.random.Generator) -> Sample:
    """At most ``n`` rows, half positive; with ``chars`` the negatives have exactly as many of each character as the positives."""
    groups = [usable] if chars is None else [usable & (chars == c) for c in np.unique(chars[label & usable])]
    pairs = []
    for group in groups:
        both = [chance.permutation(np.flatnonzero(group & (label == wanted))) for wanted in (True, False)]
        least = min(map(len, both))
        pairs.append(np.stack([rows[:least] for rows in both]))
    rows = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), np.int64)
    rows = rows[:, chance.permutation(rows.shape[1])[: n // 2]]
    return Sample(rows.reshape(-1), np.repeat([True, False], rows.shape[1]))


class Features(NamedTuple):
    """Numbers to probe: rows (n, F) by index, scales (F,) that differences of means are divided by."""

    rows: Callable[[np.ndarray], Any]
    columns: Callable[[np.ndarray, np.ndarray], np.ndarray]
    scale: np.ndarray


def sparse_features(codes: sparse.csc_matrix) -> Features:
    """Latents; a latent's scale is its mean non-zero value."""
    by_row, counts = codes.tocsr(), np.diff(codes.indptr)
    scale = np.asarray(abs(codes).sum(0)).ravel() / np.maximum(counts, 1)
    return Features(lambda i: by_row[i], lambda i, j: by_row[i][:, j].toarray(), np.where(counts > 0, scale, np.inf))


def dense_features(x: np.ndarray) -> Features:
    """Dimensions; a dimension's scale is its standard deviation."""
    spread = x.std(0, dtype=np.float64)
    return Features(lambda i: x[i], lambda i, j: x[np.ix_(i, j)], np.where(spread > 0, spread, np.inf))


def principal(x: np.ndarray) -> np.ndarray:
    """The rows in the basis of their principal components, largest first."""
    centred = x - x.mean(0, dtype=np.float64).astype(x.dtype)
    return centred @ np.linalg.eigh(centred.T @ centred)[1][:, ::-1].astype(x.dtype)


@dataclass(frozen=True)
class Fitter:
    """Fits probes. ``strengths`` are inverse regularisation strengths, chosen between on a quarter of the training documents."""

    document: np.ndarray
    strengths: Sequence[float]
    bootstrap: int
    seed: int
    tested: np.ndarray  # documents that test rows may come from

    def all(self, tasks: Iterable[Task], features: Features, k: int | str) -> list[Score]:
        return [self.one(task, features, k) for task in tasks]

    def one(self, task: Task, features: Features, k: int | str) -> Score:
        chosen = select(features, task.train, k)
        train, test = (features.columns(s.rows, chosen).astype(np.float64) for s in (task.train, task.test))
        centre, spread = train.mean(0), train.std(0)
        train, test = ((v - centre) / np.where(spread > 0, spread, 1) for v in (train, test))
        probe = self.fitted(train, task.train.labels, self.document[task.train.rows] % 4 == 0)
        score, y = probe.decision_function(test), task.test.labels
        said = score > 0
        hits = int((said & y).sum())
        f1 = 2 * hits / max(int(said.sum() + y.sum()), 1)
        resampled = resampled_auc(score, y, self.document[task.test.rows], self.bootstrap, self.seed, among=self.tested)
        return Score(auc(score, y), float((said == y).mean()), f1, resampled)

    def fitted(self, x: np.ndarray, y: np.ndarray, held: np.ndarray) -> LogisticRegression:
        strength = self.strengths[0]
        if len(self.strengths) > 1 and x.shape[1] > 1 and min(y[held].sum(), (~y[held]).sum(), y[~held].sum(), (~y[~held]).sum()) > 0:
            tried = {c: auc(logistic(x[~held], y[~held], c).decision_function(x[held]), y[held]) for c in self.strengths}
            strength = max(tried, key=tried.__getitem__)
        return logistic(x, y, strength)


def logistic(x: np.ndarray, y: np.ndarray, strength: float) -> LogisticRegression:
    """A logistic probe; Newton's method is several times faster than L-BFGS as long as the Hessian is small."""
    solver = "newton-cholesky" if x.shape[1] <= 512 else "lbfgs"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # separable classes have no finite optimum without a limit on the iterations
        return LogisticRegression(C=strength, max_iter=100, solver=solver).fit(x, y)


def select(features: Features, sample: Sample, k: int | str, *, signed: bool = False) -> np.ndarray:
    """The ``k`` features (or "all") whose scaled means over positives and negatives differ most; ``signed``: that are larger on positives."""
    if k == "all":
        return np.arange(len(features.scale))
    means = [np.asarray(features.rows(sample.rows[sample.labels == wanted]).mean(0)).ravel() for wanted in (True, False)]
    difference = (means[0] - means[1]) / features.scale
    return np.argsort(-difference if signed else -np.abs(difference), kind="stable")[: int(k)]


def _report(tasks: Sequence[Task], found: dict[tuple[str, str], list[Score]]) -> Measured:
    values: dict[str, float | None] = {}
    why, noise, arrays = {}, {}, {}
    for (source, k), scores in found.items():
        for family in FAMILIES:
            name, groups = _name(source, family, k), {}
            for task, score in zip(tasks, scores, strict=True):
                if task.family == family:
                    groups.setdefault(task.concept.group, []).append(score)
            if not groups:
                values[name], why[name] = None, f"no {family} concept applies to this text and occurs often enough"
                continue
            values[name] = float(np.mean([np.mean([s.auc for s in g]) for g in groups.values()]))
            noise[name] = float(np.mean([np.mean([s.resampled for s in g], axis=0) for g in groups.values()], axis=0).std(ddof=1))
        for part in ("auc", "accuracy", "f1"):
            arrays[f"probe_{source}_k{k}_{part}"] = np.array([getattr(s, part) for s in scores])
    arrays["probe_concepts"] = np.array([t.concept.name for t in tasks], dtype=str)
    arrays["probe_families"] = np.array([t.family for t in tasks], dtype=str)
    return Measured(values, arrays, why, noise)
