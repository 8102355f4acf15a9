"""Rules for latents: patterns and states that name where a latent fires, tested on other text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.stats import chi2

from sae_experiments.files import rounded
from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.metrics.codes import NO_TEXT, NOT_FINITE, Text, nulls, read_text, sparse_codes
from sae_experiments.metrics.noise import DRAWS, document_weights, noise_over
from sae_experiments.metrics.text.concepts import Concept
from sae_experiments.metrics.text.contexts import visible
from sae_experiments.metrics.text.labels import labelled
from sae_experiments.metrics.text.ngrams import Simulated, simulate
from sae_experiments.metrics.text.patterns import (
    ANY,
    Matcher,
    Pattern,
    elements_of,
    find_rule,
    literal_at,
    pack,
    quality,
    spell,
    token_elements,
    unpack,
)
from sae_experiments.metrics.text.token_concepts import token_classes
from sae_experiments.sampling import evenly_spaced

INFO = [
    MetricInfo(
        name="rule_f1",
        title="rule F1",
        formula="mean over latents of the held-out F1 of the rule for where it fires",
        unit="",
        better="up",
    ),
    MetricInfo(
        name="rule_interpretable_frac",
        title="rule-like",
        formula="share of alive latents whose rule has a held-out F1 of at least one half",
        unit="",
        better="up",
    ),
    MetricInfo(
        name="rule_precision",
        title="rule precision",
        formula="mean held-out precision",
        unit="",
        better="up",
        shown=False,
    ),
    MetricInfo(
        name="rule_recall",
        title="rule recall",
        formula="mean held-out recall",
        unit="",
        better="up",
        shown=False,
    ),
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
        name="concept_phi",
        title="concept match",
        formula="mean over latents of the largest |phi| with a concept",
        unit="",
        better="up",
        shown=False,
    ),
    MetricInfo(
        name="concept_matched_frac",
        title="concept-like",
        formula="share of latents with |phi| > 0.5 for some concept (chance excluded by "
        "Bonferroni)",
        unit="",
        better="up",
        shown=False,
    ),
]
#: Rows per block that is shuffled as one piece, for `rule_f1_null`.
SHUFFLED_BLOCK = 1000
#: |phi| above which a latent counts as matched with a concept.
MATCHED_PHI = 0.5
#: A phi counts if chance exceeds it, for any pair of latent and concept, with this probability.
SIGNIFICANCE = 0.01
#: F1 on other text below which a rule is shown as none: rules of shuffled rows reach as much.
LEAST_F1 = 0.1
#: Columns of `Description.counts`.
HITS, PREDICTED, FIRED = range(3)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the metric."""

    rows: int | None
    """Held-out rows used, from the first (None: all); half to find rules, half to test them."""
    latents: int | None
    """Latents described, evenly spaced among those alive (None: all)."""
    min_fires: int
    """Firings that a latent needs in each half."""
    threshold: float
    """A latent is on above this share of the 99.9 % quantile of its non-zero magnitudes."""
    block: int
    """Windows per document."""
    keep: float
    """Share of its precision that a pattern must keep when one place is widened."""
    most: int
    """Largest number of patterns in a rule."""
    gain: float
    """F1 that one more pattern, or a state, must add."""
    seeds: int
    """Contexts that rules start from: this many of the strongest, and as many of the others."""
    shuffled: int
    """Latents described once more with their blocks shuffled."""
    interpretable: float
    """F1 from which a latent counts as rule-like."""
    longest: int
    """Largest n of the n-gram simulation."""
    min_count: int
    """Occurrences that a suffix needs in the n-gram simulation."""
    seed: int
    """Seed of the sampled contexts and the shuffles."""


class Halves(NamedTuple):
    """The text in two halves: rules are found on one and tested on the other."""

    text: Text
    concepts: list[Concept]
    """Causal concepts; a rule may use them as states."""
    labels: np.ndarray
    """Labels of the concepts, bool (K, N)."""
    train: np.ndarray
    """Rows of the training half."""
    test: np.ndarray
    """Rows of the test half."""
    train_matcher: Matcher
    test_matcher: Matcher
    symbol_elements: dict[int, int]
    """Code point -> number of the element of that one symbol."""
    first: np.ndarray
    """Start of each test document, as an index into `test`."""


class Description(NamedTuple):
    """A latent's rule and its quality on the test half."""

    rule: list[Pattern]
    words: str
    """The rule, spelled for people."""
    precision: float
    recall: float
    f1: float
    lift: float
    """Precision over the rate at which the latent fires."""
    counts: np.ndarray
    """Per test document (documents, 3): hits, rows the rule predicts, rows the latent fires on."""

    @property
    def length(self) -> int:
        """Number of characters, classes and states in the rule."""
        return sum(p.length for p in self.rule)


class ConceptMatch(NamedTuple):
    """Best concept per latent, (m,)."""

    phi: np.ndarray
    """Phi of largest magnitude, with its sign; 0 if chance explains it."""
    concept: np.ndarray
    """Number of that concept."""


def measure(ctx: EvalContext, **options: Any) -> Measured:
    """Quality of rules for latents (N2G, Foote et al. 2023, over characters and classes).

    Rules start from the literal characters at a latent's top contexts and at a sample of its other
    contexts. `features` holds what the feature browser shows: rule, n-gram order and concept of
    each described latent. The latents in `ctx.extras["latents"]` are described as well, but are
    in no average.

    Args:
        ctx: The SAE and its held-out text.
        **options: Fields of `Options`.
    """
    opts = Options(**options)
    text = read_text(ctx, opts.rows, tokens=True)
    codes = sparse_codes(ctx, opts.rows)
    if text is None:
        return nulls(INFO, NO_TEXT)
    if codes is None:
        return nulls(INFO, NOT_FINITE)
    codes = sparse.csr_matrix(codes[: len(text.chars)])
    magnitudes = sparse.csc_matrix(abs(codes))
    halves = _split(ctx, text, opts.block)
    on, limits = binarised(magnitudes, opts.threshold)
    on_train, on_test = on.tocsr()[halves.train], on.tocsr()[halves.test]
    fires = np.minimum(_column_sums(on_train), _column_sums(on_test))
    alive = np.flatnonzero(fires >= opts.min_fires)
    if not len(alive):
        return nulls(INFO, f"no latent fires {opts.min_fires} times in both halves of the text")
    picked = evenly_spaced(alive, opts.latents)
    rng = np.random.default_rng(opts.seed)

    def describe_all(latents: Iterable[int]) -> dict[int, Description]:
        return {
            int(j): describe(halves, _column(on, j) > 0, _column(magnitudes, j), rng, opts)
            for j in latents
        }

    described = describe_all(picked)
    shuffled = []
    for j in _spread(picked, opts.shuffled):
        order = _shuffled_order(len(text.chars), rng)
        firing, values = _column(on, j) > 0, _column(magnitudes, j)
        shuffled.append(describe(halves, firing[order], values[order], rng, opts))
    requested = ctx.extras.get("latents", ())
    more = describe_all(j for j in requested if fires[j] >= opts.min_fires and j not in described)
    match = concept_match(halves, on_test)
    simulated = simulate(
        codes,
        text,
        longest=opts.longest,
        min_fires=opts.min_fires,
        min_count=opts.min_count,
        block=opts.block,
    )
    features = []
    for j, description in (described | more).items():
        concept = halves.concepts[match.concept[j]].name if match.phi[j] else None
        feature = {"latent": j, "threshold": rounded(float(limits[j]), 4)}
        feature |= _rule_feature(description) | _order_feature(simulated, j)
        feature |= {"concept": concept, "phi": rounded(float(match.phi[j]), 4)}
        features.append(feature)
    measured = _report(described, shuffled, match.phi, opts.interpretable)
    measured = measured._replace(features=features)
    if len(halves.first) < 2:
        return measured
    noise = _rule_noise(list(described.values()), opts.interpretable)
    noise |= _concept_noise(halves, on_test, picked)
    return measured._replace(noise=noise)


def _split(ctx: EvalContext, text: Text, block: int) -> Halves:
    """Split the text into documents of even number (training) and odd number (test)."""
    concepts, labels = labelled(ctx, text, causal=True)
    elements = elements_of(ctx.symbols)
    if text.pieces:
        classes, tokens = token_classes(text.pieces), np.unique(text.chars)
        elements = token_elements(classes, tokens, [visible(piece) for piece in text.pieces])
    document = text.blocks(block)
    even = document % 2 == 0
    train, test = np.flatnonzero(even), np.flatnonzero(~even)
    symbol_elements = {}
    for i, element in enumerate(elements):
        if len(element.symbols) == 1 and i != ANY:
            symbol_elements[next(iter(element.symbols))] = i
    return Halves(
        text=text,
        concepts=concepts,
        labels=labels,
        train=train,
        test=test,
        train_matcher=Matcher(elements, text.chars, text.offset, labels, train),
        test_matcher=Matcher(elements, text.chars, text.offset, labels, test),
        symbol_elements=symbol_elements,
        first=np.flatnonzero(np.diff(document[test], prepend=-1)),
    )


def binarised(
    magnitudes: sparse.csc_matrix, threshold: float
) -> tuple[sparse.csc_matrix, np.ndarray]:
    """Binarise latents at a share of their largest values.

    Args:
        magnitudes: Magnitudes of the codes, (N, m).
        threshold: A latent is on above this share of the 99.9 % quantile of its non-zero values.

    Returns:
        Binary codes (N, m), and the limit of each latent (m,).
    """
    columns = np.split(magnitudes.data, magnitudes.indptr[1:-1])
    limits = np.array([threshold * np.quantile(v, 0.999) if len(v) else 0.0 for v in columns])
    is_on = magnitudes.data > np.repeat(limits, np.diff(magnitudes.indptr))
    on = sparse.csc_matrix(
        (is_on.astype(np.float32), magnitudes.indices, magnitudes.indptr),
        shape=magnitudes.get_shape(),
    )
    on.eliminate_zeros()
    return on, limits


def describe(
    halves: Halves, on: np.ndarray, values: np.ndarray, rng: np.random.Generator, opts: Options
) -> Description:
    """Find a rule for a latent on the training half and score it on the test half.

    Args:
        halves: The text.
        on: Rows on which the latent is on, bool (N,).
        values: Its magnitudes, (N,).
        rng: Source of the sampled contexts.
        opts: Options of the metric.
    """
    train_target, test_target = pack(on[halves.train]), pack(on[halves.test])
    active = halves.train[on[halves.train]]
    strongest = active[np.argsort(-values[active], kind="stable")[: opts.seeds]]
    others = active
    if len(active):
        others = rng.choice(active, min(opts.seeds, len(active)), replace=False)
    text = halves.text
    literals = dict.fromkeys(
        literal_at(halves.symbol_elements, text.chars, text.length, int(row))
        for row in (*strongest, *others)
    )
    rule = find_rule(
        halves.train_matcher,
        list(literals),
        train_target,
        keep=opts.keep,
        most=opts.most,
        gain=opts.gain,
    )
    predicted = halves.test_matcher.match_any(rule)
    scored = quality(predicted, test_target)
    bits = np.stack([predicted & test_target, predicted, test_target])  # HITS, PREDICTED, FIRED
    masks = unpack(bits, len(halves.test))
    rate = float(on[halves.test].mean())
    return Description(
        rule=rule,
        words=spell(rule, halves.train_matcher.elements, [c.name for c in halves.concepts]),
        precision=scored.precision,
        recall=scored.recall,
        f1=scored.f1,
        lift=scored.precision / rate if rate else 0.0,
        counts=np.add.reduceat(masks, halves.first, axis=1, dtype=np.int64).T,
    )


def phi_of(n: Any, a: np.ndarray, b: np.ndarray, both: np.ndarray) -> np.ndarray:
    """Phi coefficient of two binary variables; 0 if one of them never varies.

    Args:
        n: Number of rows.
        a: Number of rows on which the first is on.
        b: Number of rows on which the second is on.
        both: Number of rows on which both are on.
    """
    scale = np.sqrt(a * (n - a) * b * (n - b))
    return np.divide(n * both - a * b, scale, out=np.zeros_like(both), where=scale > 0)


def concept_match(halves: Halves, on: sparse.csr_matrix) -> ConceptMatch:
    """Concept of largest |phi| with each latent on the test half.

    Args:
        halves: The text, of T test rows.
        on: Binary codes of the test half, (T, m).
    """
    labels = halves.labels[:, halves.test].astype(np.float64)
    n, m = on.get_shape()
    if not len(labels):
        return ConceptMatch(np.zeros(m), np.zeros(m, np.int64))
    both = (on.T @ labels.T).T
    phi = phi_of(n, labels.sum(1)[:, None], np.asarray(on.sum(0)), both)
    concept = np.abs(phi).argmax(0)
    best = phi[concept, np.arange(m)]
    significant = n * best**2 > chi2.isf(SIGNIFICANCE / phi.size, 1)
    return ConceptMatch(np.where(significant, best, 0.0), concept)


# ------------------------------------------------------------------------------------------- noise


def _rule_noise(described: Sequence[Description], interpretable: float) -> dict[str, float]:
    """Standard errors over resampled test documents, with the rules as they are."""
    counts = np.stack([d.counts for d in described], axis=2)  # (documents, 3, latents)
    weights = document_weights(len(counts), DRAWS, 0)
    hits = weights @ counts[:, HITS]
    predicted = weights @ counts[:, PREDICTED]
    fired = weights @ counts[:, FIRED]
    f1 = 2 * hits / np.maximum(predicted + fired, 1)
    resampled = {
        "rule_f1": f1,
        "rule_interpretable_frac": f1 >= interpretable,
        "rule_precision": hits / np.maximum(predicted, 1),
        "rule_recall": hits / np.maximum(fired, 1),
    }
    return {name: noise_over(values.astype(float)) for name, values in resampled.items()}


def _concept_noise(halves: Halves, on: sparse.csr_matrix, picked: np.ndarray) -> dict[str, float]:
    """Standard errors over resampled test documents of the best match with a concept.

    The best concept is chosen anew in every sample.
    """
    n, m = on.get_shape()
    documents = len(halves.first)
    owner = np.repeat(np.arange(documents), np.diff(halves.first, append=n))
    weights = document_weights(documents, DRAWS, 0)
    total = weights @ np.bincount(owner, minlength=documents)[:, None]
    on = on[:, picked]

    def resampled_firings(among: np.ndarray) -> np.ndarray:
        """Firings (draws, picked) on the rows of the mask `among` (n,)."""
        rows = sparse.csr_matrix((among, (owner, np.arange(n))), shape=(documents, n))
        return weights @ sparse.csr_matrix(rows @ on).toarray()

    fires = resampled_firings(np.ones(n))
    best = np.zeros((DRAWS, len(picked)))
    for label in halves.labels[:, halves.test].astype(float):
        positives = weights @ np.bincount(owner, label, documents)[:, None]
        both = resampled_firings(label)
        best = np.maximum(best, np.abs(phi_of(total, positives, fires, both)))
    limit = chi2.isf(SIGNIFICANCE / max(len(halves.labels) * m, 1), 1)
    best = np.where(total * best**2 > limit, best, 0.0)
    return {
        "concept_phi": noise_over(best),
        "concept_matched_frac": noise_over((best > MATCHED_PHI).astype(float)),
    }


# ---------------------------------------------------------------------------------------- columns


def _column(matrix: sparse.csc_matrix, j: int) -> np.ndarray:
    """Column `j` as a dense array, (N,)."""
    part = slice(matrix.indptr[j], matrix.indptr[j + 1])
    column = np.zeros(matrix.get_shape()[0], dtype=matrix.dtype)
    column[matrix.indices[part]] = matrix.data[part]
    return column


def _column_sums(matrix: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(matrix.sum(0)).ravel()


def _spread(items: Sequence[int] | np.ndarray, n: int) -> list[int]:
    """`n` of the items, evenly spaced: the first latents of a Matryoshka SAE are no sample."""
    if not n:
        return []
    return [items[i * len(items) // n] for i in range(min(n, len(items)))]


def _shuffled_order(n: int, rng: np.random.Generator) -> np.ndarray:
    """Rows (n,) with blocks of `SHUFFLED_BLOCK` rows in random order; what is left over stays."""
    size = SHUFFLED_BLOCK
    blocks = rng.permutation(max(n // size, 1))
    parts = [np.arange(b * size, min((b + 1) * size, n)) for b in blocks]
    return np.concatenate([*parts, np.arange(len(blocks) * size, n)])


# ----------------------------------------------------------------------------------------- results


def _rule_feature(description: Description) -> dict[str, Any]:
    """Entries of a latent's description; a rule that fails on other text is no description."""
    return {
        "rule" if description.f1 >= LEAST_F1 else "weak_rule": description.words,
        "precision": rounded(description.precision, 4),
        "recall": rounded(description.recall, 4),
        "f1": rounded(description.f1, 4),
        "lift": rounded(description.lift, 4),
        "length": description.length,
    }


def _order_feature(simulated: Simulated, j: int) -> dict[str, Any]:
    r2 = float(simulated.best[j])
    return {
        "order": int(simulated.order[j]),
        "r2": None if np.isnan(r2) else rounded(r2, 4),
    }


def _report(
    described: Mapping[int, Description],
    shuffled: Sequence[Description],
    phi: np.ndarray,
    interpretable: float,
) -> Measured:
    """Averages over the described latents, and arrays over all latents (m,)."""
    picked = list(described)
    columns = {
        "precision": np.array([d.precision for d in described.values()]),
        "recall": np.array([d.recall for d in described.values()]),
        "f1": np.array([d.f1 for d in described.values()]),
    }
    matched = np.abs(phi[picked])
    values: dict[str, float | None] = {
        "rule_f1": float(columns["f1"].mean()),
        "rule_interpretable_frac": float((columns["f1"] >= interpretable).mean()),
        "rule_precision": float(columns["precision"].mean()),
        "rule_recall": float(columns["recall"].mean()),
        "rule_length": float(np.mean([d.length for d in described.values()])),
        "rule_f1_null": float(np.mean([d.f1 for d in shuffled])) if shuffled else None,
        "concept_phi": float(matched.mean()),
        "concept_matched_frac": float((matched > MATCHED_PHI).mean()),
    }
    arrays = {}
    for name, column in columns.items():
        arrays[f"rule_{name}"] = np.full(len(phi), np.nan)
        arrays[f"rule_{name}"][picked] = column
    arrays["concept_phi"] = phi
    why = {}
    if not shuffled:
        why["rule_f1_null"] = "no shuffled latents were asked for (shuffled=0)"
    return Measured(values, arrays, why)
