"""Co-activation of latents: phi of firing and Pearson correlation of values over all pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.metrics.codes import NOT_FINITE, nulls, sparse_codes

INFO = [
    MetricInfo(
        name="coact_phi_rms",
        title="co-activation",
        formula="root mean square of phi_ij over pairs of latents",
        better="none",
    ),
    MetricInfo(
        name="coact_pearson_rms",
        title="correlation",
        formula="root mean square of Pearson's r of values over pairs of latents",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="coact_strong_frac",
        title="strong pairs",
        formula="share of pairs with |phi| above the limit",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="coact_partner_phi",
        title="strongest partner",
        formula="mean over latents of their largest |phi| with another",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="coact_contained_frac",
        title="contained",
        formula="share of latents i with a parent j: n_ij / n_i > 0.9 and n_j > 3 n_i",
        better="none",
        shown=False,
    ),
]
#: Bin edges of the histograms of phi and of Pearson's r.
BIN_EDGES = np.linspace(-1, 1, 201)
#: Arrays that hold latents.
LATENT_ARRAYS = ("coact_partners", "coact_parent")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the metric."""

    rows: int | None
    """Number of held-out rows, from the first on; None for all."""
    min_fires: int
    """Number of rows that a latent must fire on to count."""
    block: int
    """Latents compared with all others at a time; bounds the memory."""
    partners: int
    """Number of partners kept per latent."""
    strong: float
    """|phi| above which a pair is strong."""
    contained: float
    """Share of a latent's firings at which its parent must fire too."""
    larger: float
    """Factor by which a parent must fire more often."""


def measure(ctx: EvalContext, **options: Any) -> Measured:
    """Statistics over ordered pairs of latents.

    With n rows, of which latent i fires on n_i and both i and j on n_ij,

        phi_ij = (n n_ij - n_i n_j) / sqrt(n_i (n - n_i) n_j (n - n_j))

    or 0 if a factor of the denominator is 0. The arrays have one entry per latent: its partners of
    largest |phi|, their phi and log PMI, and its parent; -1 or NaN if it fires too rarely.

    Args:
        ctx: Evaluation context.
        **options: Fields of `Options`.
    """
    opts = Options(**options)
    codes = sparse_codes(ctx, opts.rows)
    if codes is None:
        return nulls(INFO, NOT_FINITE)
    n = ctx.n_used(opts.rows)
    columns = codes.tocsc()
    alive = np.flatnonzero(np.diff(columns.indptr) >= opts.min_fires)
    if len(alive) < 2:
        return nulls(INFO, f"{len(alive)} latents fire at least {opts.min_fires} times on {n} rows")
    pairs = _Pairs(n, columns[:, alive])
    phi = _CorrelationSums(opts.strong)
    pearson = _CorrelationSums(opts.strong)
    blocks = []
    for begin in range(0, len(alive), opts.block):
        here = np.arange(begin, min(begin + opts.block, len(alive)))
        blocks.append(_block(pairs, here, phi, pearson, opts))
    relations = {name: np.concatenate([part[name] for part in blocks]) for name in blocks[0]}
    n_pairs = len(alive) * (len(alive) - 1)
    values = {
        "coact_phi_rms": np.sqrt(phi.squares / n_pairs),
        "coact_pearson_rms": np.sqrt(pearson.squares / n_pairs),
        "coact_strong_frac": phi.strong / n_pairs,
        "coact_partner_phi": np.abs(relations["coact_partner_phi"][:, 0]).mean(),
        "coact_contained_frac": (relations["coact_parent"] >= 0).mean(),
    }
    arrays = {
        name: _for_all_latents(name, relation, alive, ctx.sae.d_sae)
        for name, relation in relations.items()
    }
    arrays["coact_phi_hist"] = phi.histogram
    arrays["coact_pearson_hist"] = pearson.histogram
    arrays["coact_edges"] = BIN_EDGES
    return Measured({name: float(value) for name, value in values.items()}, arrays)


class _CorrelationSums:
    """Sums of a correlation over pairs: histogram, squares, and number of strong pairs."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.histogram = np.zeros(len(BIN_EDGES) - 1, np.int64)
        self.squares = 0.0
        self.strong = 0

    def add(self, correlations: np.ndarray) -> None:
        """Add some pairs."""
        self.histogram += np.histogram(correlations, BIN_EDGES)[0]
        self.squares += float(np.square(correlations).sum())
        self.strong += int((np.abs(correlations) > self.limit).sum())


class _Pairs:
    """Correlations of some latents with all m latents, from their codes.

    Args:
        n: Number of rows.
        codes: Codes of the m latents, (n, m).
    """

    def __init__(self, n: int, codes: sparse.csc_matrix) -> None:
        values = sparse.csc_matrix(codes, dtype=np.float64)
        self.n = n
        self.on = sparse.csc_matrix(
            (np.ones_like(values.data), values.indices, values.indptr), shape=values.shape
        )
        self.count = np.diff(codes.indptr).astype(np.float64)
        mean_squares = np.asarray(values.multiply(values).mean(0)).ravel()
        self.scaled = values @ sparse.diags(1 / np.sqrt(mean_squares))
        self.sums = np.asarray(self.scaled.sum(0)).ravel()

    def both(self, here: np.ndarray) -> np.ndarray:
        """Number of rows on which latents `here` and each latent both fire, (len(here), m)."""
        return (self.on[:, here].T @ self.on).toarray()

    def phi(self, here: np.ndarray, both: np.ndarray) -> np.ndarray:
        """Phi coefficient of firing, (len(here), m), from the joint counts."""
        count = self.count
        return _correlation(self.n, both, count[here], count, count[here], count)

    def pearson(self, here: np.ndarray) -> np.ndarray:
        """Pearson correlation of values, (len(here), m)."""
        products = (self.scaled[:, here].T @ self.scaled).toarray()
        squares = np.full(len(self.sums), float(self.n))
        return _correlation(self.n, products, self.sums[here], self.sums, squares[here], squares)


def _correlation(
    n: int,
    products: np.ndarray,
    sum_i: np.ndarray,
    sum_j: np.ndarray,
    squares_i: np.ndarray,
    squares_j: np.ndarray,
) -> np.ndarray:
    """Correlation from sums over n rows; 0 if a variable does not vary.

        (n s_ij - s_i s_j) / sqrt((n s_ii - s_i^2) (n s_jj - s_j^2))

    Args:
        n: Number of rows.
        products: Sums of products s_ij, (I, J).
        sum_i: Sums s_i, (I,).
        sum_j: Sums s_j, (J,).
        squares_i: Sums of squares s_ii, (I,).
        squares_j: Sums of squares s_jj, (J,).
    """
    deviation_i = np.sqrt(np.maximum(n * squares_i - sum_i**2, 0))
    deviation_j = np.sqrt(np.maximum(n * squares_j - sum_j**2, 0))
    scale = deviation_i[:, None] * deviation_j
    covariance = n * products - sum_i[:, None] * sum_j
    varies = scale > 1e-9 * n * n
    return np.divide(covariance, scale, out=np.zeros_like(products), where=varies).clip(-1, 1)


def _block(
    pairs: _Pairs,
    here: np.ndarray,
    phi_sums: _CorrelationSums,
    pearson_sums: _CorrelationSums,
    opts: Options,
) -> dict[str, np.ndarray]:
    """Add the pairs of latents `here` to the sums, and find their partners and parents."""
    count = pairs.count
    both = pairs.both(here)
    phi = pairs.phi(here, both)
    other = np.arange(len(count)) != here[:, None]
    phi_sums.add(phi[other])
    pearson_sums.add(pairs.pearson(here)[other])
    phi[~other] = 0
    both[~other] = 0
    top = min(opts.partners, len(count) - 1)
    partners = _partners(pairs.n, phi, both, count, here, top)
    return partners | _parents(both, count, here, opts.larger, opts.contained)


def _partners(
    n: int, phi: np.ndarray, both: np.ndarray, count: np.ndarray, here: np.ndarray, top: int
) -> dict[str, np.ndarray]:
    """The `top` partners of largest |phi| of the latents `here`.

    Args:
        n: Number of rows.
        phi: Phi with every latent, (len(here), m), 0 with itself.
        both: Joint counts with every latent, (len(here), m), 0 with itself.
        count: Number of rows on which each latent fires, (m,).
        here: Positions of the latents.
        top: Number of partners.
    """
    order = np.argsort(-np.abs(phi), axis=1, kind="stable")[:, :top]
    joint = np.take_along_axis(both, order, 1)
    return {
        "coact_partners": order,
        "coact_partner_phi": np.take_along_axis(phi, order, 1),
        "coact_partner_pmi": np.log((joint + 0.5) * n / (count[here, None] * count[order])),
    }


def _parents(
    both: np.ndarray, count: np.ndarray, here: np.ndarray, larger: float, contained: float
) -> dict[str, np.ndarray]:
    """The latent that most contains each of the latents `here`, -1 if none does, and its share.

    Args:
        both: Joint counts with every latent, (len(here), m), 0 with itself.
        count: Number of rows on which each latent fires, (m,).
        here: Positions of the latents.
        larger: Factor by which a parent must fire more often.
        contained: Share of a latent's firings at which its parent must fire too.
    """
    share = np.where(count > larger * count[here, None], both / count[here, None], 0)
    parent = share.argmax(1)
    largest = share[np.arange(len(here)), parent]
    return {
        "coact_parent": np.where(largest > contained, parent, -1),
        "coact_containment": largest,
    }


def _for_all_latents(
    name: str, relation: np.ndarray, alive: np.ndarray, n_latents: int
) -> np.ndarray:
    """One entry per latent instead of per alive latent: -1 or NaN for the others."""
    shape = (n_latents, *relation.shape[1:])
    if name not in LATENT_ARRAYS:
        of_all = np.full(shape, np.nan)
        of_all[alive] = relation
        return of_all
    of_all = np.full(shape, -1, np.int32)
    of_all[alive] = np.where(relation >= 0, alive[relation], -1)
    return of_all
