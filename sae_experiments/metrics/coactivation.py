"""Which latents fire together: phi of firing and Pearson correlation of values over all pairs, in memory for a block of latents at a time."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import NOT_FINITE, nulls, sparse_codes

INFO = [
    MetricInfo(name="coact_phi_rms", title="co-activation", formula="root mean square of phi_ij over pairs of latents", unit="", better="none"),
    MetricInfo(
        name="coact_pearson_rms",
        title="correlation",
        formula="root mean square of Pearson's r of values over pairs of latents",
        unit="",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="coact_strong_frac", title="strong pairs", formula="share of pairs with |phi| above the limit", unit="", better="none", shown=False
    ),
    MetricInfo(
        name="coact_partner_phi",
        title="strongest partner",
        formula="mean over latents of their largest |phi| with another",
        unit="",
        better="none",
        shown=False,
    ),
    MetricInfo(
        name="coact_contained_frac",
        title="contained",
        formula="share of latents i with a parent j: n_ij / n_i > 0.9 and n_j > 3 n_i",
        unit="",
        better="none",
        shown=False,
    ),
]
EDGES = np.linspace(-1, 1, 201)


def measure(bench: Bench, *, rows: int | None, least: int, block: int, partners: int, strong: float, contained: float, larger: float) -> Measured:
    """Statistics over ordered pairs of the latents that fire at least ``least`` times on the first ``rows`` rows.

    ``phi_ij = (n n_ij - n_i n_j) / sqrt(n_i (n - n_i) n_j (n - n_j))``, 0 where a factor is 0. Arrays have a row a latent, -1 or NaN where
    it fires too rarely: its ``partners`` of largest |phi|, their phi, log PMI and its parent.
    """
    codes = sparse_codes(bench, rows)
    if codes is None:
        return nulls(INFO, NOT_FINITE)
    n, m = codes.shape
    fires = np.diff(codes.tocsc().indptr)
    alive = np.flatnonzero(fires >= least)
    if len(alive) < 2:
        return nulls(INFO, f"{len(alive)} latents fire at least {least} times on {n} rows")
    values = codes.tocsc()[:, alive].astype(np.float64)
    on = sparse.csc_matrix((np.ones_like(values.data), values.indices, values.indptr), shape=values.shape)
    values = values @ sparse.diags(1 / np.sqrt(np.asarray(values.multiply(values).mean(0)).ravel()))
    top = min(partners, len(alive) - 1)
    found = {
        "coact_partners": np.full((m, top), -1, np.int32), "coact_partner_phi": np.full((m, top), np.nan),
        "coact_partner_pmi": np.full((m, top), np.nan), "coact_parent": np.full(m, -1, np.int32), "coact_containment": np.full(m, np.nan),
    }  # fmt: skip
    histograms, squares, over = {"phi": np.zeros(200, np.int64), "pearson": np.zeros(200, np.int64)}, {"phi": 0.0, "pearson": 0.0}, 0
    count, sums = fires[alive].astype(np.float64), np.asarray(values.sum(0)).ravel()
    for begin in range(0, len(alive), block):
        here = np.arange(begin, min(begin + block, len(alive)))
        both = (on[:, here].T @ on).toarray()
        phi = _correlation(n, both, count[here], count, count[here], count)
        products = (values[:, here].T @ values).toarray()
        pearson = _correlation(n, products, sums[here], sums, np.full(len(here), float(n)), np.full(len(alive), float(n)))
        for name, matrix in (("phi", phi), ("pearson", pearson)):
            others = matrix[np.arange(len(alive)) != here[:, None]]
            histograms[name] += np.histogram(others, EDGES)[0]
            squares[name] += float(np.square(others).sum())
        over += int((np.abs(phi[np.arange(len(alive)) != here[:, None]]) > strong).sum())
        phi[np.arange(len(here)), here] = both[np.arange(len(here)), here] = 0
        for name, rows_of in _relations(n, phi, both, count, here, top, larger, contained).items():
            is_index = name in ("coact_partners", "coact_parent")
            found[name][alive[here]] = np.where(rows_of >= 0, alive[rows_of], -1) if is_index else rows_of
    pairs = len(alive) * (len(alive) - 1)
    values_of = {
        "coact_phi_rms": np.sqrt(squares["phi"] / pairs), "coact_pearson_rms": np.sqrt(squares["pearson"] / pairs),
        "coact_strong_frac": over / pairs, "coact_partner_phi": np.abs(found["coact_partner_phi"][alive, 0]).mean(),
        "coact_contained_frac": (found["coact_parent"][alive] >= 0).mean(),
    }  # fmt: skip
    arrays = found | {f"coact_{name}_hist": h for name, h in histograms.items()} | {"coact_edges": EDGES}
    return Measured({k: float(v) for k, v in values_of.items()}, arrays)


def _relations(
    n: int, phi: np.ndarray, both: np.ndarray, count: np.ndarray, here: np.ndarray, top: int, larger: float, contained: float
) -> dict[str, np.ndarray]:
    """Strongest partners and the parent of the latents ``here``, from phi and joint counts (len(here), n_alive) with an empty diagonal."""
    order = np.argsort(-np.abs(phi), axis=1, kind="stable")[:, :top]
    pmi = np.log((np.take_along_axis(both, order, 1) + 0.5) * n / (count[here, None] * count[order]))
    inside = np.where(count > larger * count[here, None], both / count[here, None], 0)
    parent = inside.argmax(1)
    share = inside[np.arange(len(here)), parent]
    return {
        "coact_partners": order, "coact_partner_phi": np.take_along_axis(phi, order, 1), "coact_partner_pmi": pmi,
        "coact_parent": np.where(share > contained, parent, -1), "coact_containment": share,
    }  # fmt: skip


def _correlation(n: int, products: np.ndarray, si: np.ndarray, sj: np.ndarray, sii: np.ndarray, sjj: np.ndarray) -> np.ndarray:
    """``(n s_ij - s_i s_j) / sqrt((n s_ii - s_i^2)(n s_jj - s_j^2))`` from sums over n rows; 0 where a factor vanishes."""
    spread = [np.sqrt(np.maximum(n * squares - total**2, 0)) for total, squares in ((si, sii), (sj, sjj))]
    scale = spread[0][:, None] * spread[1]
    return np.divide(n * products - si[:, None] * sj, scale, out=np.zeros_like(products), where=scale > 1e-9 * n * n).clip(-1, 1)
