"""Absorption: a specialised latent takes over the direction of a general one, which stays silent.

Follows Chanin et al. 2024 (arXiv 2409.14507) with the thresholds of SAEBench, on concepts of
characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from sklearn.metrics import f1_score

from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.metrics.codes import (
    NOT_FINITE,
    no_text,
    nulls,
    raw_rows,
    read_text,
    sparse_codes,
)
from sae_experiments.metrics.noise import Grouped, noise_over, resampled_means
from sae_experiments.metrics.probing import (
    Sampling,
    Task,
    draw_tasks,
    logistic,
    select,
    sparse_features,
)
from sae_experiments.metrics.text.concepts import bank, label_all

INFO = [
    MetricInfo(
        name="absorption_full",
        title="absorption",
        formula=(
            "share of probe-positive rows with all main latents silent and one other latent "
            "giving 40 % of the probe's projection"
        ),
        better="down",
    ),
    MetricInfo(
        name="absorption_fraction",
        title="absorption (fraction)",
        formula=(
            "mean share of the projection that at most 3 other latents give in place of the "
            "main ones"
        ),
        better="down",
    ),
    MetricInfo(
        name="absorption_probe_f1",
        title="parents' probe F1",
        formula="mean held-out F1 of the parents' logistic probes on the activation",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="absorption_main_recall",
        title="main latents' recall",
        formula="share of probe-positive rows on which a main latent fires",
        better="up",
        shown=False,
    ),
    MetricInfo(
        name="absorption_main_latents",
        title="main latents",
        formula="mean number of latents a parent is split over",
        unit="latents",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="absorption_parents",
        title="parents",
        formula="number of concepts measured",
        unit="",
        better="none",
        shown=False,
    ),
]
#: Names and groups of the concepts that may have been absorbed.
PARENTS = (
    "vowel",
    "consonant",
    "upper case",
    "white space",
    "starts with",
    "in a tag",
    "in a link",
)
#: A latent is silent if its activation is smaller than this.
SILENT = 1e-8
#: Share of the probe's projection that absorbing latents must contribute.
MIN_SHARE = 0.4
#: Cosine with the probe that the latent of full absorption must have.
MIN_COSINE_FULL = 0.025
#: Cosine with the probe that a latent of partial absorption must have.
MIN_COSINE_PARTIAL = 0.1
#: Largest number of latents of partial absorption.
MAX_ABSORBING = 3


@dataclass(frozen=True, kw_only=True)
class Options(Sampling):
    """Options of the metric."""

    rows: int | None
    """Number of held-out rows, from the first on; None for all."""
    strength: float
    """Inverse regularisation strength of the probes."""
    min_f1: float
    """F1 that the probe of a parent must reach."""
    min_gain: float
    """F1 that one more main latent must add."""
    max_main: int
    """Largest number of main latents of a parent."""
    min_parents: int
    """Minimum number of parents for a score."""


class Parent(NamedTuple):
    """Result for one concept; rates are over the true positives of the probe."""

    full: float
    """Rate of full absorption."""
    fraction: float
    """Mean share of the projection that absorbing latents contribute."""
    probe_f1: float
    """Held-out F1 of the probe on the activation."""
    main_recall: float
    """Rate at which a main latent fires."""
    main_latents: int
    """Number of main latents."""


class PositiveRows(NamedTuple):
    """The n test rows of one concept that are true positives of its probe."""

    document: np.ndarray
    """Document of each row, (n,)."""
    full: np.ndarray
    """True for full absorption, (n,)."""
    fraction: np.ndarray
    """Share of the projection that absorbing latents contribute, (n,)."""
    main_recall: np.ndarray
    """True if a main latent fires, (n,)."""


def measure(ctx: EvalContext, **options: Any) -> Measured:
    """Rate at which latents for a concept stay silent because others have absorbed it.

    A concept counts as a parent if a probe for it on the activation reaches `min_f1` on balanced
    held-out rows (answering yes always reaches 0.67). Its main latents are the k that fire most for
    it, with k grown as long as the F1 gains `min_gain`; a latent that is silent for the concept
    cannot be absorbed. An SAE that learned little scores near 0, so the score needs the recall of
    the main latents beside it.

    Args:
        ctx: Evaluation context.
        **options: Fields of `Options`.
    """
    opts = Options(**options)
    text = read_text(ctx, opts.rows)
    if text is None:
        return nulls(INFO, no_text(ctx))
    if ctx.read != ctx.write or ctx.sae.d_in != ctx.sae.d_out:
        return nulls(INFO, "encoder and decoder live in different spaces")
    codes = sparse_codes(ctx, opts.rows)
    x = raw_rows(ctx, len(text.chars))
    if codes is None or not np.isfinite(x).all():
        return nulls(INFO, NOT_FINITE)
    concepts = [c for c in bank(ctx.symbols) if c.name in PARENTS or c.group in PARENTS]
    labels = label_all(concepts, text.chars, text.following, text.breaks)
    drawn = draw_tasks(concepts, labels, text, opts)
    parents: dict[str, Parent] = {}
    positives: list[PositiveRows] = []
    for task in drawn.tasks:
        result = _parent(ctx, task, x, codes, drawn.document, opts)
        if result is not None:
            parents[task.concept.name] = result[0]
            positives.append(result[1])
    if len(parents) < opts.min_parents:
        return nulls(
            INFO,
            f"{len(parents)} parents have a probe with F1 of at least {opts.min_f1} and "
            f"{opts.min_positives} rows: fewer than {opts.min_parents}",
        )
    return _summary(parents, positives, drawn.tested)


def _summary(
    parents: dict[str, Parent], positives: Sequence[PositiveRows], documents: np.ndarray
) -> Measured:
    """Means over parents.

    Args:
        parents: Result of each parent by name.
        positives: Rows of each parent.
        documents: Numbers of all test documents, ascending.
    """
    arrays = {
        f"absorption_{field}": np.array([getattr(parent, field) for parent in parents.values()])
        for field in Parent._fields
    }
    values: dict[str, float | None] = {
        name: float(column.mean()) for name, column in arrays.items()
    }
    values["absorption_parents"] = float(len(parents))
    arrays["absorption_names"] = np.array(list(parents), dtype=str)
    return Measured(values, arrays, noise=_noise(positives, documents))


def _noise(positives: Sequence[PositiveRows], documents: np.ndarray) -> dict[str, float]:
    """Standard errors over resampled test documents, with probes and main latents kept.

    Args:
        positives: Rows of each concept.
        documents: Numbers of all test documents, ascending.
    """
    if len(documents) < 2:
        return {}
    noise = {}
    for field in ("full", "fraction", "main_recall"):
        parts = []
        for rows in positives:
            values = getattr(rows, field).astype(float)
            parts.append(Grouped(values, np.searchsorted(documents, rows.document)))
        noise[f"absorption_{field}"] = noise_over(resampled_means(parts, len(documents)))
    return noise


def _parent(
    ctx: EvalContext,
    task: Task,
    x: np.ndarray,
    codes: sparse.csr_matrix,
    document: np.ndarray,
    opts: Options,
) -> tuple[Parent, PositiveRows] | None:
    """Measure one concept.

    Args:
        ctx: Evaluation context.
        task: The concept with its training and test rows.
        x: Activations (N, D).
        codes: Codes (N, F).
        document: Document of every row, (N,).
        opts: Options of the metric.

    Returns:
        The result and its rows; None if the activation does not represent the concept well enough,
        or if no positive row is left.
    """
    train = x[task.train.rows]
    centre = train.mean(0)
    deviation = np.maximum(train.std(0), 1e-12)
    probe = logistic((train - centre) / deviation, task.train.labels, opts.strength)
    predicted = probe.predict((x[task.test.rows] - centre) / deviation)
    f1 = float(f1_score(task.test.labels, predicted))
    if f1 < opts.min_f1:
        return None
    direction = probe.coef_[0] / deviation
    direction /= np.linalg.norm(direction)
    rows = task.test.rows[task.test.labels & predicted]
    b_dec = ctx.sae.b_dec.detach().cpu().numpy()
    projection = (x[rows] - b_dec).astype(np.float64) @ direction
    kept = projection > 0
    if not kept.any():
        return None
    rows = rows[kept]
    main = main_latents(codes, task, document, opts.strength, opts.min_gain, opts.max_main)
    W_dec = ctx.sae.W_dec.detach()
    atoms = W_dec.cpu().double().numpy()
    cosine = atoms @ direction / np.maximum(np.linalg.norm(atoms, axis=1), 1e-12)
    z = codes[rows].toarray().astype(np.float64)
    with torch.no_grad():
        contribution = ctx.sae.contributions(
            torch.from_numpy(z).to(W_dec), torch.from_numpy(direction).to(W_dec)
        )
    contribution = contribution.cpu().double().numpy()
    full, fraction = absorbed(z, contribution, cosine, projection[kept], main)
    recalled = (np.abs(z[:, main]) > SILENT).any(1)
    parent = Parent(
        full=float(full.mean()),
        fraction=float(fraction.mean()),
        probe_f1=f1,
        main_recall=float(recalled.mean()),
        main_latents=len(main),
    )
    return parent, PositiveRows(document[rows], full, fraction, recalled)


def main_latents(
    codes: sparse.csr_matrix,
    task: Task,
    document: np.ndarray,
    strength: float,
    min_gain: float,
    max_main: int,
) -> np.ndarray:
    """Latents over which a concept is split.

    Latents are added, best first, as long as the F1 of a probe on them grows by more than
    `min_gain` on a held-out quarter of the training documents.

    Args:
        codes: Codes (N, F).
        task: The concept with its training rows.
        document: Document of every row, (N,).
        strength: Inverse regularisation strength of the probe.
        min_gain: F1 that one more latent must add.
        max_main: Largest number of latents.

    Returns:
        Latent indices, best first; at least one.
    """
    rows = task.train.rows
    labels = task.train.labels
    train_codes = codes[rows]
    sample = task.train._replace(rows=np.arange(len(rows)))
    features = sparse_features(sparse.csc_matrix(train_codes))
    order = select(features, sample, max_main, signed=True)
    held = document[rows] % 4 == 0
    n_positive = labels[held].sum()
    n_positive_rest = labels[~held].sum()
    if not (0 < n_positive < held.sum() and 0 < n_positive_rest < (~held).sum()):
        return order[:1]
    z = train_codes[:, order].toarray()
    z = z / np.maximum(z.std(0), 1e-12)
    best = -np.inf
    for k in range(1, len(order) + 1):
        probe = logistic(z[~held, :k], labels[~held], strength)
        score = f1_score(labels[held], probe.predict(z[held, :k]))
        if k > 1 and score - best <= min_gain:
            return order[: k - 1]
        best = score
    return order


def absorbed(
    z: np.ndarray,
    contribution: np.ndarray,
    cosine: np.ndarray,
    projection: np.ndarray,
    main: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Full absorption, and absorption as a fraction, for each row.

    Args:
        z: Codes (n, F).
        contribution: Projection of each latent's contribution on the probe, (n, F).
        cosine: Cosine of each decoder row with the probe, (F,).
        projection: Projection of the activation on the probe, (n,), positive.
        main: Indices of the main latents of the concept.

    Returns:
        Full absorption, bool (n,), and its fraction in 0..1, (n,).
    """
    silent = (np.abs(z[:, main]) < SILENT).all(1)
    top = contribution.argmax(1)
    largest = contribution[np.arange(len(z)), top]
    aligned = cosine[top] >= MIN_COSINE_FULL
    full = silent & aligned & (largest >= MIN_SHARE * projection)
    absorbing = cosine >= MIN_COSINE_PARTIAL
    absorbing[main] = False
    candidates = np.where(absorbing, np.maximum(contribution, 0), 0)
    by_others = -np.sort(-candidates, axis=1)[:, :MAX_ABSORBING].sum(1)
    by_main = contribution[:, main].sum(1)
    share = np.minimum(by_others, projection - by_main)
    total = share + by_main
    partial = np.where(by_main <= 0, 1.0, share / np.where(total > 0, total, 1))
    none = (by_main >= projection) | (by_others < MIN_SHARE * projection)
    return full, np.where(none, 0.0, partial.clip(0, 1))
