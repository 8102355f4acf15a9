"""What a latent fires on, in words a program can check: rules of patterns and states, tested on text they were not made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.stats import chi2

from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import NO_TEXT, NOT_FINITE, Text, nulls, read_text, sparse_codes
from sae_experiments.metrics.noise import DRAWS, document_weights, noise_over
from sae_experiments.metrics.text.concepts import Concept, bank, label_all
from sae_experiments.metrics.text.ngrams import Simulated, simulate
from sae_experiments.metrics.text.patterns import Matcher, Pattern, elements_of, find_rule, literal_at, pack, quality, spell, unpack

INFO = [
    MetricInfo(name="rule_f1", title="rule F1", formula="mean over latents of the held-out F1 of the rule for where it fires", unit="", better="up"),
    MetricInfo(
        name="rule_interpretable_frac",
        title="rule-like",
        formula="share of alive latents whose rule has a held-out F1 of at least one half",
        unit="",
        better="up",
    ),
    MetricInfo(name="rule_precision", title="rule precision", formula="mean held-out precision", unit="", better="up", shown=False),
    MetricInfo(name="rule_recall", title="rule recall", formula="mean held-out recall", unit="", better="up", shown=False),
    MetricInfo(
        name="rule_length",
        title="rule length",
        formula="mean number of characters, classes and states in a rule",
        unit="",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="rule_f1_null",
        title="rule F1 (shuffled)",
        formula="the same for latents whose blocks of 1000 rows were shuffled",
        unit="",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="concept_phi", title="concept match", formula="mean over latents of the largest |phi| with a concept", unit="", better="up", shown=False
    ),
    MetricInfo(
        name="concept_matched_frac",
        title="concept-like",
        formula="share of latents with |phi| > 0.5 for some concept (chance excluded by Bonferroni)",
        unit="",
        better="up",
        shown=False,
    ),
]


class World(NamedTuple):
    """The text in two halves, as bits: rules are made on one and tested on the other."""

    text: Text
    concepts: list[Concept]
    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray
    matchers: tuple[Matcher, Matcher]
    index: dict[int, int]
    first: np.ndarray  # where each document begins in ``test``


class Described(NamedTuple):
    """One latent's rule and how good it is on the test half; ``counts`` (documents, 3): hits, rows the rule names, rows where it fires."""

    rule: list[Pattern]
    words: str
    precision: float
    recall: float
    f1: float
    lift: float
    counts: np.ndarray


def measure(
    bench: Bench, *, rows: int | None, latents: int | None, least: int, threshold: float, block: int, keep: float, most: int, gain: float, seeds: int,
    shuffled: int, interpretable: float, longest: int, min_count: int, seed: int,
) -> Measured:  # fmt: skip
    """Rules (N2G, Foote et al. 2023, over characters and classes) for at most ``latents`` latents that fire ``least`` times in each half.

    A latent counts as on above ``threshold`` times the 99.9 % quantile of its non-zero magnitudes. Rules start from the literal characters
    at its top contexts and at a sample of its others. ``features`` holds what the browser shows: rule, n-gram order, concept.
    """
    text, codes = read_text(bench, rows), sparse_codes(bench, rows)
    if text is None:
        return nulls(INFO, NO_TEXT)
    if codes is None:
        return nulls(INFO, NOT_FINITE)
    z = abs(codes[: len(text.chars)].tocsc())
    world = _world(bench, text, block)
    on, limits = binarised(z, threshold)
    fires = np.minimum(*(np.asarray(on.tocsr()[part].sum(0)).ravel() for part in (world.train, world.test)))
    alive = np.flatnonzero(fires >= least)
    if not len(alive):
        return nulls(INFO, f"no latent fires {least} times in both halves of the text")
    picked = alive if latents is None else alive[np.unique(np.linspace(0, len(alive) - 1, min(latents, len(alive))).round().astype(int))]
    chance, options = np.random.default_rng(seed), {"keep": keep, "most": most, "gain": gain}
    found = {int(j): describe(world, _column(on, j) > 0, _column(z, j), seeds, chance, options) for j in picked}
    null = [describe(world, *_shuffled(_column(on, j) > 0, _column(z, j), chance), seeds, chance, options) for j in _spread(picked, shuffled)]
    asked = [j for j in bench.extras.get("latents", ()) if fires[j] >= least and j not in found]  # described as well, in no average
    more = {int(j): describe(world, _column(on, j) > 0, _column(z, j), seeds, chance, options) for j in asked}
    on_test = on.tocsr()[world.test]
    phi, match = concept_match(world, on_test)
    simulated = simulate(codes[: len(text.chars)], text, longest=longest, least=least, min_count=min_count, block=block)
    features = [_feature(world, j, d, z, float(limits[j]), simulated, phi, match) for j, d in (found | more).items()]
    measured = _report(found, null, phi, picked, interpretable, world, features, codes.shape[1])
    if len(world.first) < 2:
        return measured
    noise = _noise_of_rules(list(found.values()), interpretable) | _noise_of_concepts(world, on_test, picked)
    return measured._replace(noise=noise)


def _noise_of_rules(found: Sequence[Described], interpretable: float) -> dict[str, float]:
    """Standard errors over resampled test documents, with the rules as they are."""
    counts = np.stack([d.counts for d in found], axis=2)  # (documents, 3, latents)
    weights = document_weights(len(counts), DRAWS, 0)
    hits, said, wanted = (weights @ counts[:, i] for i in range(3))
    f1 = 2 * hits / np.maximum(said + wanted, 1)
    drawn = {"f1": f1, "interpretable_frac": f1 >= interpretable, "precision": hits / np.maximum(said, 1), "recall": hits / np.maximum(wanted, 1)}
    return {f"rule_{name}": noise_over(values.astype(float)) for name, values in drawn.items()}


def _noise_of_concepts(world: World, on: sparse.csr_matrix, picked: np.ndarray) -> dict[str, float]:
    """Standard errors over resampled test documents of the best match with a concept, which is chosen anew in every sample."""
    n, documents = on.shape[0], len(world.first)
    owner = np.repeat(np.arange(documents), np.diff(world.first, append=n))
    weights = document_weights(documents, DRAWS, 0)
    limit, on = chi2.isf(0.01 / max(len(world.labels) * on.shape[1], 1), 1), on[:, picked]
    total = weights @ np.bincount(owner, minlength=documents)[:, None]
    best = np.zeros((DRAWS, len(picked)))
    by_document = lambda rows: sparse.csr_matrix((rows, (owner, np.arange(n))), shape=(documents, n))  # noqa: E731
    fires = weights @ (by_document(np.ones(n)) @ on).toarray()
    for label in world.labels[:, world.test].astype(float):
        group = by_document(label)
        both, there = weights @ (group @ on).toarray(), weights @ np.asarray(group.sum(1))
        best = np.maximum(best, np.abs(phi_of(total, there, fires, both)))
    best = np.where(total * best**2 > limit, best, 0.0)
    return {"concept_phi": noise_over(best), "concept_matched_frac": noise_over((best > 0.5).astype(float))}


def phi_of(n: Any, a: np.ndarray, b: np.ndarray, both: np.ndarray) -> np.ndarray:
    """Phi of two binary variables of ``n`` rows from how often each (``a``, ``b``) and both are on; 0 where one never or always is."""
    scale = np.sqrt(a * (n - a) * b * (n - b))
    return np.divide(n * both - a * b, scale, out=np.zeros_like(both), where=scale > 0)


def _world(bench: Bench, text: Text, block: int) -> World:
    concepts = [c for c in bank(bench.symbols) if c.causal]
    labels = label_all(concepts, text.chars, text.following, text.breaks)
    elements = elements_of(bench.symbols)
    document = text.blocks(block)
    even = document % 2 == 0
    train, test = np.flatnonzero(even), np.flatnonzero(~even)
    matchers = tuple(Matcher(elements, text.chars, text.offset, labels, part) for part in (train, test))
    index = {next(iter(e.symbols)): i for i, e in enumerate(elements) if len(e.symbols) == 1 and i}
    first = np.flatnonzero(np.diff(document[test], prepend=-1))
    return World(text, concepts, labels, train, test, matchers, index, first)


def binarised(z: sparse.csc_matrix, threshold: float) -> tuple[sparse.csc_matrix, np.ndarray]:
    """Where latents are on, as ones (N, m), and the limits (m,) that decide it."""
    limits = np.array([threshold * np.quantile(v, 0.999) if len(v) else 0.0 for v in np.split(z.data, z.indptr[1:-1])])
    on = sparse.csc_matrix(((z.data > np.repeat(limits, np.diff(z.indptr))).astype(np.float32), z.indices, z.indptr), shape=z.shape)
    on.eliminate_zeros()
    return on, limits


def describe(world: World, on: np.ndarray, values: np.ndarray, seeds: int, chance: np.random.Generator, options: dict[str, Any]) -> Described:
    """The rule for a latent that is ``on`` at some rows (N,) with ``values`` (N,)."""
    targets = [pack(on[part]) for part in (world.train, world.test)]
    active = world.train[on[world.train]]
    strongest = active[np.argsort(-values[active], kind="stable")[:seeds]]
    others = chance.choice(active, min(seeds, len(active)), replace=False) if len(active) else active
    literals = dict.fromkeys(literal_at(world.index, world.text.chars, world.text.length, int(r)) for r in (*strongest, *others))
    rule = find_rule(world.matchers[0], list(literals), targets[0], **options)
    said = world.matchers[1].match_any(rule)
    got = quality(said, targets[1])
    masks = unpack(np.stack([said & targets[1], said, targets[1]]), len(world.test))
    counts = np.add.reduceat(masks, world.first, axis=1, dtype=np.int64).T
    base = float(on[world.test].mean())
    words = spell(rule, world.matchers[0].elements, [c.name for c in world.concepts])
    return Described(rule, words, *got, got.precision / base if base else 0.0, counts)


def _shuffled(on: np.ndarray, values: np.ndarray, chance: np.random.Generator, size: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    pieces = chance.permutation(max(len(on) // size, 1))
    order = np.concatenate([np.arange(p * size, min((p + 1) * size, len(on))) for p in pieces] + [np.arange(len(pieces) * size, len(on))])
    return on[order], values[order]


def _column(matrix: sparse.csc_matrix, j: int) -> np.ndarray:
    part = slice(matrix.indptr[j], matrix.indptr[j + 1])
    out = np.zeros(matrix.shape[0], dtype=matrix.dtype)
    out[matrix.indices[part]] = matrix.data[part]
    return out


def concept_match(world: World, on: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """For each latent the phi (signed) and the number of the concept of largest |phi| on the test half; phi is 0 where chance explains it."""
    labels = world.labels[:, world.test].astype(np.float64)
    n, m = on.shape
    if not len(labels):
        return np.zeros(m), np.zeros(m, np.int64)
    both = (on.T @ labels.T).T
    phi = phi_of(n, labels.sum(1)[:, None], np.asarray(on.sum(0)), both)
    match = np.abs(phi).argmax(0)
    best = phi[match, np.arange(m)]
    return np.where(n * best**2 > chi2.isf(0.01 / phi.size, 1), best, 0.0), match


def _feature(
    world: World, j: int, d: Described, z: sparse.csc_matrix, limit: float, simulated: Simulated, phi: np.ndarray, match: np.ndarray
) -> dict[str, Any]:
    r2 = simulated.best[j]
    return {
        "latent": j, "threshold": _digits(limit), "rule": d.words, "precision": _digits(d.precision), "recall": _digits(d.recall),
        "f1": _digits(d.f1), "lift": _digits(d.lift), "length": sum(p.length for p in d.rule), "order": int(simulated.order[j]),
        "r2": None if np.isnan(r2) else _digits(float(r2)), "concept": world.concepts[match[j]].name if phi[j] else None, "phi": _digits(float(phi[j])),
    }  # fmt: skip


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _spread(items: Sequence[int], n: int) -> list[int]:
    """``n`` of the items, evenly spaced: the first latents of a Matryoshka SAE are nothing like the others."""
    return [items[i * len(items) // n] for i in range(min(n, len(items)))] if n else []


def _report(
    found: dict[int, Described], shuffled: list[Described], phi: np.ndarray, picked: np.ndarray, interpretable: float, world: World,
    features: list[dict[str, Any]], m: int,
) -> Measured:  # fmt: skip
    columns = {name: np.array([getattr(d, name) for d in found.values()]) for name in ("precision", "recall", "f1")}
    matched = np.abs(phi[picked])
    values: dict[str, float | None] = {
        "rule_f1": float(columns["f1"].mean()),
        "rule_interpretable_frac": float((columns["f1"] >= interpretable).mean()),
        "rule_precision": float(columns["precision"].mean()),
        "rule_recall": float(columns["recall"].mean()),
        "rule_length": float(np.mean([sum(p.length for p in d.rule) for d in found.values()])),
        "rule_f1_null": float(np.mean([d.f1 for d in shuffled])) if shuffled else None,
        "concept_phi": float(matched.mean()),
        "concept_matched_frac": float((matched > 0.5).mean()),
    }
    arrays = {f"rule_{k}": np.full(m, np.nan) for k in columns}
    for name, column in columns.items():
        arrays[f"rule_{name}"][picked] = column
    why = {} if shuffled else {"rule_f1_null": "no shuffled latents were asked for (shuffled=0)"}
    return Measured(values, arrays | {"concept_phi": phi}, why, features=features)
