"""Absorption: a latent that should fire for a concept stays silent where a more special latent has taken its direction over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from sklearn.metrics import f1_score

from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import (
    NO_TEXT,
    NOT_FINITE,
    nulls,
    raw_rows,
    read_text,
    sparse_codes,
)
from sae_experiments.metrics.noise import Grouped, noise_over, resampled_means
from sae_experiments.metrics.probing import Task, logistic, select, sparse_features, tasks_of
from sae_experiments.metrics.text.concepts import bank, label_all

INFO = [
    MetricInfo(
        name="absorption_full",
        title="absorption",
        formula="share of probe-positive rows with all main latents silent and one other latent giving 40 % of the probe's projection",
        unit="",
        better="down",
    ),
    MetricInfo(
        name="absorption_fraction",
        title="absorption (fraction)",
        formula="mean share of the projection that at most 3 other latents give in place of the main ones",
        unit="",
        better="down",
    ),
    MetricInfo(
        name="absorption_probe_f1",
        title="parents' probe F1",
        formula="mean held-out F1 of the parents' logistic probes on the activation",
        unit="",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="absorption_main_recall",
        title="main latents' recall",
        formula="share of probe-positive rows on which a main latent fires",
        unit="",
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
    MetricInfo(name="absorption_parents", title="parents", formula="number of concepts measured", unit="", better="none", shown=False),
]
PARENTS = ("vowel", "consonant", "upper case", "white space", "starts with", "in a tag", "in a link")


class Parent(NamedTuple):
    """What was found for one concept."""

    full: float
    fraction: float
    probe_f1: float
    main_recall: float
    main_latents: int


class Shown(NamedTuple):
    """A concept's probe-positive rows (n,): their documents, full absorption and its fraction, whether a main latent fires."""

    document: np.ndarray
    full: np.ndarray
    fraction: np.ndarray
    main_recall: np.ndarray


def measure(
    bench: Bench, *, rows: int | None, n_train: int, n_test: int, least: int, skip: int, block: int, test_frac: float, strength: float,
    min_f1: float, min_gain: float, max_main: int, min_parents: int, seed: int,
) -> Measured:  # fmt: skip
    """Chanin et al. 2024 (arXiv 2409.14507), with SAEBench's thresholds, on concepts of characters.

    A parent counts if a probe for it reaches ``min_f1`` on balanced held-out rows (always saying yes has 0.67 there). Its main latents are
    the k that fire most for it (a latent that is silent for it cannot be absorbed), k grown while F1 gains ``min_gain``. An SAE that
    learned little scores near 0: read it beside the recall of the main latents.
    """
    text, codes = read_text(bench, rows), sparse_codes(bench, rows)
    if text is None:
        return nulls(INFO, NO_TEXT)
    if bench.read != bench.write or bench.sae.d_in != bench.sae.d_out:
        return nulls(INFO, "encoder and decoder live in different spaces")
    x = raw_rows(bench, len(text.chars))
    if codes is None or not np.isfinite(x).all():
        return nulls(INFO, NOT_FINITE)
    concepts = [c for c in bank(bench.symbols) if c.name in PARENTS or c.group in PARENTS]
    labels, document = label_all(concepts, text.chars, text.following, text.breaks), text.blocks(block)
    usable, chance = text.offset >= skip, np.random.default_rng(seed)
    test = chance.random(document[-1] + 1)[document] < test_frac
    tasks = tasks_of(concepts, labels, text.chars, (usable & ~test, usable & test), (n_train, n_test), least, chance)
    each = {t.concept.name: p for t in tasks if (p := _parent(bench, t, x, codes, document, strength, min_f1, min_gain, max_main)) is not None}
    found = {name: parent for name, (parent, _) in each.items()}
    if len(found) < min_parents:
        return nulls(INFO, f"{len(found)} parents have a probe with F1 of at least {min_f1} and {least} rows: fewer than {min_parents}")
    columns = {f"absorption_{field}": np.array([getattr(p, field) for p in found.values()]) for field in Parent._fields}
    values = {i.name: float(columns[i.name].mean()) for i in INFO if i.name in columns} | {"absorption_parents": float(len(found))}
    noise = _noise([shown for _, shown in each.values()], np.unique(document[test]))
    return Measured(values, columns | {"absorption_names": np.array(list(found), dtype=str)}, noise=noise)


def _noise(shown: Sequence[Shown], documents: np.ndarray) -> dict[str, float]:
    """Standard errors over resampled test documents, with the probes and the main latents as they are."""
    if len(documents) < 2:
        return {}
    at = [np.searchsorted(documents, s.document) for s in shown]
    parts = {f: [Grouped(getattr(s, f).astype(float), d) for s, d in zip(shown, at, strict=True)] for f in ("full", "fraction", "main_recall")}
    return {f"absorption_{field}": noise_over(resampled_means(part, len(documents))) for field, part in parts.items()}


def _parent(
    bench: Bench,
    task: Task,
    x: np.ndarray,
    codes: sparse.csr_matrix,
    document: np.ndarray,
    strength: float,
    min_f1: float,
    min_gain: float,
    max_main: int,
) -> tuple[Parent, Shown] | None:
    """One concept, and its rows one by one; None where the activation itself does not show the concept well enough, or no positive row is left."""
    centre, spread = x[task.train.rows].mean(0), np.maximum(x[task.train.rows].std(0), 1e-12)
    probe = logistic((x[task.train.rows] - centre) / spread, task.train.labels, strength)
    said = probe.predict((x[task.test.rows] - centre) / spread)
    f1 = float(f1_score(task.test.labels, said))
    if f1 < min_f1:
        return None
    direction = probe.coef_[0] / spread
    direction /= np.linalg.norm(direction)
    main = main_latents(codes, task, document, strength, min_gain, max_main)
    rows = task.test.rows[task.test.labels & said]
    atoms = bench.sae.W_dec.detach().cpu().double().numpy()
    projection = (x[rows] - bench.sae.b_dec.detach().cpu().numpy()).astype(np.float64) @ direction
    kept = projection > 0
    if not kept.any():
        return None
    cosine = atoms @ direction / np.maximum(np.linalg.norm(atoms, axis=1), 1e-12)
    z = codes[rows[kept]].toarray().astype(np.float64)
    like = bench.sae.W_dec.detach()
    with torch.no_grad():
        parts = bench.sae.contributions(torch.from_numpy(z).to(like), torch.from_numpy(direction).to(like))
    full, fraction = absorbed(z, parts.cpu().double().numpy(), cosine, projection[kept], main)
    recalled = (np.abs(z[:, main]) > 1e-8).any(1)
    parent = Parent(float(full.mean()), float(fraction.mean()), f1, float(recalled.mean()), len(main))
    return parent, Shown(document[rows[kept]], full, fraction, recalled)


def main_latents(codes: sparse.csr_matrix, task: Task, document: np.ndarray, strength: float, min_gain: float, max_main: int) -> np.ndarray:
    """The latents a concept is split over: the best k, one more as long as the F1 on a quarter of the training documents gains enough."""
    rows, labels = task.train.rows, task.train.labels
    order = select(sparse_features(codes[rows].tocsc()), task.train._replace(rows=np.arange(len(rows))), max_main, signed=True)
    z, held = codes[rows][:, order].toarray(), document[rows] % 4 == 0
    if not (0 < labels[held].sum() < held.sum() and 0 < labels[~held].sum() < (~held).sum()):
        return order[:1]
    best, k = -np.inf, 0
    z = z / np.maximum(z.std(0), 1e-12)
    while k < len(order):
        score = f1_score(labels[held], logistic(z[~held, : k + 1], labels[~held], strength).predict(z[held, : k + 1]))
        if k and score - best <= min_gain:
            break
        best, k = score, k + 1
    return order[:k]


def absorbed(z: np.ndarray, contribution: np.ndarray, cosine: np.ndarray, projection: np.ndarray, main: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Full absorption (bool) and its fraction for every row: codes and contributions (n, F), cosines (F,), the probe's projection (n,)."""
    other = np.ones(len(cosine), dtype=bool)
    other[main] = False
    silent = (np.abs(z[:, main]) < 1e-8).all(1)
    top = contribution.argmax(1)
    strongest = contribution[np.arange(len(z)), top]
    full = silent & (cosine[top] >= 0.025) & (strongest >= 0.4 * projection)
    candidates = np.where(other & (cosine >= 0.1), np.maximum(contribution, 0), 0)
    a = -np.sort(-candidates, axis=1)[:, :3].sum(1)
    m = contribution[:, main].sum(1)
    share = np.minimum(a, projection - m)
    partial = np.where(m <= 0, 1.0, share / np.where(share + m > 0, share + m, 1))
    return full, np.where((m >= projection) | (a < 0.4 * projection), 0.0, partial.clip(0, 1))
