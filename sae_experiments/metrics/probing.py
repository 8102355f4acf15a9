"""k-sparse probes on the concept bank (Gurnee et al. 2023), with ceilings and floors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from sae_experiments.metric_info import Better
from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.metrics.codes import (
    NO_TEXT,
    NOT_FINITE,
    Text,
    nulls,
    random_sae,
    raw_rows,
    read_text,
    sparse_codes,
)
from sae_experiments.metrics.noise import auc, resampled_auc
from sae_experiments.metrics.text.concepts import LEVELS, Concept
from sae_experiments.metrics.text.labels import labelled

KS = ("1", "2", "5", "16", "all")
FAMILIES = (*LEVELS, "predictive")
#: Features that probes read: source -> (words, better).
SOURCES: dict[str, tuple[str, Better]] = {
    "sae": ("latents", "up"),
    "random": ("latents of a random SAE of the same size and L0", "none"),
    "pca": ("principal components", "none"),
    "raw": ("dimensions of the activation", "none"),
}
#: Rows on which the threshold of the random SAE is set.
CALIBRATION_ROWS = 1 << 14


def _metric_name(source: str, family: str, k: int | str) -> str:
    if source == "sae":
        return f"probe_auc_{family}_k{k}"
    return f"probe_{source}_{family}_k{k}"


def _info(source: str, family: str, k: str) -> MetricInfo:
    words, better = SOURCES[source]
    title = f"probe {family} k={k}"
    if source != "sae":
        title += f" ({source})"
    return MetricInfo(
        name=_metric_name(source, family, k),
        title=title,
        formula=f"mean over {family} concepts of the held-out AUC of a logistic probe on "
        f"{k} {words}",
        unit="",
        better=better,
        shown=source == "sae" and k in ("1", "5") and family in LEVELS,
    )


INFO = [_info(source, family, k) for source in SOURCES for k in KS for family in FAMILIES]


# ------------------------------------------------------------------------------------------- tasks


class Sample(NamedTuple):
    """Rows of one probe and their labels, half of them positive."""

    rows: np.ndarray
    """Row numbers, (n,)."""
    labels: np.ndarray
    """True for positive rows, (n,)."""


@dataclass(frozen=True)
class Task:
    """A concept with training and test rows from different documents."""

    concept: Concept
    """The concept to probe for."""
    train: Sample
    """Rows that the probe is fitted to."""
    test: Sample
    """Rows that the probe is evaluated on."""

    @property
    def family(self) -> str:
        """The level of a causal concept, or `predictive`."""
        return self.concept.level if self.concept.causal else "predictive"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sizes of the samples of a task, and the split of the text into documents."""

    n_train: int
    """Largest number of training rows per concept, half of them positive."""
    n_test: int
    """Largest number of test rows per concept."""
    min_positives: int
    """Concepts with fewer positives or fewer matching negatives are left out."""
    skip: int
    """Characters skipped at the start of a window, where the model has little context."""
    block: int
    """Windows per document; documents are disjoint between training and test."""
    test_frac: float
    """Share of the documents that are for testing."""
    seed: int
    """Seed of the split and the samples."""


class TaskSet(NamedTuple):
    """Tasks, and the documents they are sampled from."""

    tasks: list[Task]
    document: np.ndarray
    """Document of every row, (N,)."""
    tested: np.ndarray
    """Documents that test rows may come from."""


def draw_tasks(
    concepts: Sequence[Concept], labels: np.ndarray, text: Text, sampling: Sampling
) -> TaskSet:
    """Split the documents into training and test ones, and sample rows for every concept.

    Args:
        concepts: K concepts.
        labels: Their labels, bool (K, N).
        text: The text of the rows.
        sampling: Sizes and split.
    """
    document = text.blocks(sampling.block)
    usable = text.offset >= sampling.skip
    rng = np.random.default_rng(sampling.seed)
    test = rng.random(document[-1] + 1)[document] < sampling.test_frac
    parts = (usable & ~test, usable & test)
    sizes = (sampling.n_train, sampling.n_test)
    tasks = tasks_of(concepts, labels, text.chars, parts, sizes, sampling.min_positives, rng)
    return TaskSet(tasks, document, np.unique(document[test]))


def tasks_of(
    concepts: Sequence[Concept],
    labels: np.ndarray,
    chars: np.ndarray,
    parts: tuple[np.ndarray, np.ndarray],
    sizes: tuple[int, int],
    min_positives: int,
    rng: np.random.Generator,
) -> list[Task]:
    """Tasks of the concepts that occur often enough.

    Args:
        concepts: K concepts.
        labels: Their labels, bool (K, N).
        chars: Code points of the rows, (N,).
        parts: Masks (N,) of the rows for training and for testing.
        sizes: Largest numbers of rows for training and for testing.
        min_positives: Positives, and matching negatives, that a concept needs in both parts.
        rng: Source of the samples.
    """
    tasks = []
    for concept, label in zip(concepts, labels, strict=True):
        matched_chars = chars if concept.matched else None
        train, test = (
            balanced(label, matched_chars, part, size, rng)
            for part, size in zip(parts, sizes, strict=True)
        )
        if min(train.labels.sum(), test.labels.sum()) >= min_positives:
            tasks.append(Task(concept, train, test))
    return tasks


def balanced(
    label: np.ndarray,
    chars: np.ndarray | None,
    usable: np.ndarray,
    n: int,
    rng: np.random.Generator,
) -> Sample:
    """Sample rows of which half are positive.

    Args:
        label: Labels, bool (N,).
        chars: Code points (N,): the negatives get exactly as many of each character as the
            positives. None: negatives may have any character.
        usable: Mask of the rows to sample from, (N,).
        n: Largest number of rows.
        rng: Source of the sample.
    """
    groups = [usable]
    if chars is not None:
        groups = [usable & (chars == c) for c in np.unique(chars[label & usable])]
    pairs = []
    for group in groups:
        positives = rng.permutation(np.flatnonzero(group & label))
        negatives = rng.permutation(np.flatnonzero(group & ~label))
        size = min(len(positives), len(negatives))
        pairs.append(np.stack([positives[:size], negatives[:size]]))
    rows = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), np.int64)
    rows = rows[:, rng.permutation(rows.shape[1])[: n // 2]]
    return Sample(rows.reshape(-1), np.repeat([True, False], rows.shape[1]))


# ---------------------------------------------------------------------------------------- features


class Features(NamedTuple):
    """F features of N rows, accessible by row."""

    rows: Callable[[np.ndarray], Any]
    """Maps row numbers (n,) to features (n, F), dense or sparse."""
    columns: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Maps row numbers (n,) and feature numbers (k,) to dense features (n, k)."""
    scale: np.ndarray
    """Scale of each feature (F,), by which differences of means are divided."""


def sparse_features(codes: sparse.csc_matrix) -> Features:
    """Latents (N, F); the scale of a latent is its mean non-zero value."""
    by_row = codes.tocsr()
    counts = np.diff(codes.indptr)
    scale = np.asarray(abs(codes).sum(0)).ravel() / np.maximum(counts, 1)
    return Features(
        rows=lambda rows: by_row[rows],
        columns=lambda rows, features: by_row[rows][:, features].toarray(),
        scale=np.where(counts > 0, scale, np.inf),
    )


def dense_features(x: np.ndarray) -> Features:
    """Dimensions (N, D); the scale of a dimension is its standard deviation."""
    deviation = x.std(0, dtype=np.float64)
    return Features(
        rows=lambda rows: x[rows],
        columns=lambda rows, features: x[np.ix_(rows, features)],
        scale=np.where(deviation > 0, deviation, np.inf),
    )


def principal(x: np.ndarray) -> np.ndarray:
    """Rows (N, D) in the basis of their principal components, largest first."""
    centred = x - x.mean(0, dtype=np.float64).astype(x.dtype)
    components = np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
    return centred @ components.astype(x.dtype)


def select(features: Features, sample: Sample, k: int | str, *, signed: bool = False) -> np.ndarray:
    """The `k` features whose scaled means differ most between positives and negatives.

    Args:
        features: The features.
        sample: Rows and labels.
        k: Number of features, or "all".
        signed: Rank by how much larger a feature is on positives, instead of by the size of the
            difference.

    Returns:
        Feature numbers, best first ("all": in their order).
    """
    if k == "all":
        return np.arange(len(features.scale))
    positives = np.asarray(features.rows(sample.rows[sample.labels]).mean(0)).ravel()
    negatives = np.asarray(features.rows(sample.rows[~sample.labels]).mean(0)).ravel()
    difference = (positives - negatives) / features.scale
    rank = difference if signed else np.abs(difference)
    return np.argsort(-rank, kind="stable")[: int(k)]


# ------------------------------------------------------------------------------------------ probes


class Score(NamedTuple):
    """Score of a probe on its test rows; accuracy and F1 are at probability one half."""

    auc: float
    accuracy: float
    f1: float
    resampled: np.ndarray
    """AUC in bootstrap samples of the test documents, (draws,)."""


@dataclass(frozen=True)
class Fitter:
    """Fits and scores logistic probes."""

    document: np.ndarray
    """Document of every row, (N,)."""
    strengths: Sequence[float]
    """Inverse regularisation strengths, compared on a quarter of the training documents."""
    bootstrap: int
    """Bootstrap samples of the documents per probe."""
    seed: int
    """Seed of the bootstrap samples."""
    tested: np.ndarray
    """Documents that test rows may come from."""

    def all(self, tasks: Iterable[Task], features: Features, k: int | str) -> list[Score]:
        """Score a probe on `k` features for every task."""
        return [self.one(task, features, k) for task in tasks]

    def one(self, task: Task, features: Features, k: int | str) -> Score:
        """Score a probe on `k` features, chosen on the training rows of a task."""
        chosen = select(features, task.train, k)
        train = features.columns(task.train.rows, chosen).astype(np.float64)
        test = features.columns(task.test.rows, chosen).astype(np.float64)
        centre, deviation = train.mean(0), train.std(0)
        scale = np.where(deviation > 0, deviation, 1)
        held_out = self.document[task.train.rows] % 4 == 0
        probe = self.fitted((train - centre) / scale, task.train.labels, held_out)
        score = probe.decision_function((test - centre) / scale)
        labels = task.test.labels
        predicted = score > 0
        hits = int((predicted & labels).sum())
        documents = self.document[task.test.rows]
        return Score(
            auc=auc(score, labels),
            accuracy=float((predicted == labels).mean()),
            f1=2 * hits / max(int(predicted.sum() + labels.sum()), 1),
            resampled=resampled_auc(
                score, labels, documents, self.bootstrap, self.seed, among=self.tested
            ),
        )

    def fitted(self, x: np.ndarray, y: np.ndarray, held_out: np.ndarray) -> LogisticRegression:
        """Fit a probe, at the strength that does best on held-out training rows.

        Args:
            x: Standardised features, (n, k).
            y: Labels, bool (n,).
            held_out: Mask of the rows on which strengths are compared, (n,).
        """
        strength = self.strengths[0]
        if len(self.strengths) > 1 and x.shape[1] > 1 and _both_labels_in_both(y, held_out):
            scores = {}
            for c in self.strengths:
                probe = logistic(x[~held_out], y[~held_out], c)
                scores[c] = auc(probe.decision_function(x[held_out]), y[held_out])
            strength = max(scores, key=scores.__getitem__)
        return logistic(x, y, strength)


def _both_labels_in_both(y: np.ndarray, part: np.ndarray) -> bool:
    """True if both labels occur inside and outside of a part of the rows."""
    counts = (y[part].sum(), (~y[part]).sum(), y[~part].sum(), (~y[~part]).sum())
    return min(counts) > 0


def logistic(x: np.ndarray, y: np.ndarray, strength: float) -> LogisticRegression:
    """Fit a logistic probe.

    Newton's method is several times faster than L-BFGS as long as the Hessian is small.

    Args:
        x: Features, (n, k).
        y: Labels, bool (n,).
        strength: Inverse regularisation strength.
    """
    solver = "newton-cholesky" if x.shape[1] <= 512 else "lbfgs"
    with warnings.catch_warnings():
        # Separable classes have no finite optimum without a limit on the iterations.
        warnings.simplefilter("ignore")
        return LogisticRegression(C=strength, max_iter=100, solver=solver).fit(x, y)


# ------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True, kw_only=True)
class Options(Sampling):
    """Options of the metric."""

    rows: int | None
    """Held-out rows used, from the first (None: all)."""
    k: Sequence[int | str]
    """Numbers of latents that a probe reads; "all" for every one of them."""
    floors: Sequence[int | str]
    """k of the baselines: a random SAE, principal components and single dimensions."""
    ceilings: Sequence[int | str]
    """k of the activation's dimensions ("all": the whole activation)."""
    strengths: Sequence[float]
    """Inverse regularisation strengths, compared on training documents."""
    bootstrap: int
    """Bootstrap samples of the documents for the noise."""


def measure(ctx: EvalContext, **options: Any) -> Measured:
    """AUC of sparse probes per concept family, for latents and baselines.

    Latents are chosen on training documents by |mean over positives - mean over negatives| over
    their mean non-zero value (as sae-probes does). Negatives have the same characters as the
    positives, except for concepts about the character itself. Concepts of one group count as one in
    the mean over a family.

    Args:
        ctx: The SAE and its held-out text.
        **options: Fields of `Options`.
    """
    opts = Options(**options)
    text = read_text(ctx, opts.rows, tokens=True)
    codes = sparse_codes(ctx, opts.rows)
    names = {_metric_name("sae", family, k) for family in FAMILIES for k in opts.k}
    infos = [i for i in INFO if i.name in names]
    if text is None:
        return nulls(infos, NO_TEXT)
    x = raw_rows(ctx, len(text.chars))
    if codes is None or not np.isfinite(x).all():
        return nulls(infos, NOT_FINITE)
    concepts, labels = labelled(ctx, text)
    drawn = draw_tasks(concepts, labels, text, opts)
    fitter = Fitter(drawn.document, opts.strengths, opts.bootstrap, opts.seed, drawn.tested)
    latents = sparse_features(codes.tocsc()[: len(text.chars)])
    dimensions = dense_features(x)
    scores: dict[tuple[str, str], list[Score]] = {}
    for k in opts.k:
        scores["sae", str(k)] = fitter.all(drawn.tasks, latents, k)
    if opts.floors:
        l0 = codes.nnz / codes.get_shape()[0]
        baselines = {
            "random": _random_latents(ctx, len(text.chars), l0, opts.seed),
            "pca": dense_features(principal(x)),
            "raw": dimensions,
        }
        for source, features in baselines.items():
            for k in opts.floors:
                scores[source, str(k)] = fitter.all(drawn.tasks, features, k)
    for k in opts.ceilings:
        scores["raw", str(k)] = fitter.all(drawn.tasks, dimensions, k)
    return _report(drawn.tasks, scores)


def _random_latents(ctx: EvalContext, rows: int, l0: float, seed: int) -> Features:
    sae = random_sae(ctx, l0, rows=CALIBRATION_ROWS, seed=seed)
    # The activations are finite, and so are the codes of a random SAE.
    codes = cast("sparse.csr_matrix", sparse_codes(ctx, rows, sae))
    return sparse_features(sparse.csc_matrix(codes))


def _report(tasks: Sequence[Task], scores: Mapping[tuple[str, str], list[Score]]) -> Measured:
    values: dict[str, float | None] = {}
    why: dict[str, str] = {}
    noise: dict[str, float] = {}
    arrays: dict[str, np.ndarray] = {}
    for (source, k), by_task in scores.items():
        for family in FAMILIES:
            name = _metric_name(source, family, k)
            groups = _by_group(tasks, by_task, family)
            if not groups:
                values[name] = None
                why[name] = f"no {family} concept applies to this text and occurs often enough"
                continue
            values[name] = float(np.mean([np.mean([s.auc for s in group]) for group in groups]))
            resampled = [np.mean([s.resampled for s in group], axis=0) for group in groups]
            noise[name] = float(np.mean(resampled, axis=0).std(ddof=1))
        for part in ("auc", "accuracy", "f1"):
            arrays[f"probe_{source}_k{k}_{part}"] = np.array([getattr(s, part) for s in by_task])
    arrays["probe_concepts"] = np.array([t.concept.name for t in tasks], dtype=str)
    arrays["probe_families"] = np.array([t.family for t in tasks], dtype=str)
    return Measured(values, arrays, why, noise)


def _by_group(tasks: Sequence[Task], scores: Sequence[Score], family: str) -> list[list[Score]]:
    """Scores of the tasks of one family, grouped by the group of their concepts."""
    groups: dict[str, list[Score]] = {}
    for task, score in zip(tasks, scores, strict=True):
        if task.family == family:
            groups.setdefault(task.concept.group, []).append(score)
    return list(groups.values())
