"""What the levels of an SAE are to one another: how sparse each is, how they correlate, how much they repeat, who is made of whom."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import NOT_FINITE, sparse_codes
from sae_experiments.metrics.level_paths import levels_of
from sae_experiments.saes import mutual_information
from sae_experiments.saes.base import SAE
from sae_experiments.saes.hierarchical import PHASES, TRACED, Hierarchical


def _info(name: str, title: str, formula: str, unit: str = "", better: Any = "none", shown: bool = False) -> MetricInfo:
    return MetricInfo(name=name, title=title, formula=formula, unit=unit, better=better, shown=shown)


SINGLE = [
    _info("bottom_sparsity", "sparsity below", "1 - L0/m of the bottom level, held-out rows, inference", "", "target", shown=True),
    _info("top_sparsity", "sparsity above", "1 - L0/m of the top level, held-out rows, inference", "", "target", shown=True),
    _info("bottom_phi_rms", "co-activation below", "root mean square of phi over pairs of bottom latents"),
    _info("top_phi_rms", "co-activation above", "root mean square of phi over pairs of top latents"),
    _info("bottom_pearson_rms", "correlation below", "root mean square of Pearson's r of values over pairs of bottom latents"),
    _info("top_pearson_rms", "correlation above", "root mean square of Pearson's r of values over pairs of top latents"),
]
CROSS = [
    _info("cross_phi_rms", "co-activation across", "root mean square of phi over pairs of a top and a bottom latent"),
    _info("cross_pearson_rms", "correlation across", "root mean square of Pearson's r over pairs of a top and a bottom latent"),
    _info(
        "cross_mutual_information_bits", "mutual information", "mean over pairs (top, bottom) of I of their firing, less 1/(2N) nats", "bit", "down",
        shown=True,
    ),
    _info("cross_mutual_information_p99_bits", "mutual information (p99)", "99th percentile of the same", "bit", "down"),
    _info("cross_redundancy", "redundancy", "mean over top latents i of max_j I_ij / min(h_i, h_j)", "", "down", shown=True),
    _info("cross_redundant_frac", "redundant", "share of top latents with max_j I_ij / min(h_i, h_j) > 0.5", "", "down"),
    _info("cross_value_information_bits", "value information", "mean I of values in 9 bins over the 1000 pairs of largest I of firing", "bit", "down"),
    _info("cross_cka", "CKA", "linear centred kernel alignment of the two codes"),
    _info("cross_coherence", "coherence across", "mean over top latents i of max_j cos(t_i, d_j)", "", "down", shown=True),
    _info("cross_coherence_ratio", "coherence across (all)", "d mean_ij cos(t_i, d_j)^2: 1 for random directions", "", "down"),
    _info("cross_fan_in", "fan-in", "mean over top latents of how many bottom latents have r > 0.3 with it", "latents"),
    *(_info(f"cross_explained_{k}", f"explained by {k}", f"mean R2 of a top latent regressed on the {k} bottom latents of largest |r|") for k in (1, 5, 20)),
]  # fmt: skip
OWN = [
    _info("fvu_bottom", "FVU below", "FVU of the bottom's reconstruction (gate 1)", "", "down"),
    _info("fvu_top", "FVU above", "FVU of the top's reconstruction (gate 0)", "", "down"),
    _info("gate_mean", "gate", "mean gate over active bottom latents"),
    _info("gate_open_frac", "gate open", "share of active bottom latents with a gate above one half"),
    _info("gate_spread", "gate spread", "standard deviation of the gate over active bottom latents"),
    *(_info(f"fvu_after_{p}", f"FVU after {p}", f"FVU of the SAE as it was at the end of phase {p}", "", "down") for p in PHASES),
    _info("frozen_identical", "frozen", "1 if every bit of the bottom is the same at the end of phase top as at the end of phase bottom", "", "up"),
    _info("bottom_drift_cosine", "drift", "mean cosine of the bottom's atoms with what they were at the end of their phase", "", "up"),
    _info("tree_spearman", "tree and correlation", "mean over top latents of Spearman's rho of D2 row and r with bottom latents", "", "up"),
]
INFO = [*SINGLE, *CROSS, *OWN]
ONE, PLAIN = "the SAE has one level", "the SAE is not hierarchical"
EDGES = np.linspace(-1, 1, 201)


class Moments(NamedTuple):
    """Sums over N rows for all pairs of latents that fire often enough: of firing and of values (scaled to unit root mean square)."""

    n: int
    alive: np.ndarray
    both: np.ndarray
    products: np.ndarray
    sums: np.ndarray

    @property
    def rate(self) -> np.ndarray:
        return self.both.diagonal() / self.n

    def phi(self) -> np.ndarray:
        """Correlation of firing (A, A)."""
        p = self.rate
        return _ratio(self.both / self.n - np.outer(p, p), p * (1 - p))

    def pearson(self) -> np.ndarray:
        """Correlation of values (A, A)."""
        mean = self.sums / self.n
        return _ratio(self.products / self.n - np.outer(mean, mean), np.maximum(self.products.diagonal() / self.n - mean**2, 0))


def _ratio(covariance: np.ndarray, variance: np.ndarray) -> np.ndarray:
    scale = np.sqrt(np.outer(variance, variance))
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-9).clip(-1, 1)


@torch.no_grad()
def measure(bench: Bench, *, rows: int | None, least: int, pairs: int, map_top: int, map_bottom: int, relatives: int) -> Measured:
    """Statistics over the first ``rows`` held-out rows, of latents that fire at least ``least`` times on them.

    Levels are those of a hierarchical SAE, or the two groups of a nested one (the inner group is the top); an SAE without levels is measured
    as one. ``pairs`` of largest information are looked at by value. Arrays: correlation histograms, the part of the cross-level correlation
    map with the ``map_top`` and ``map_bottom`` latents of strongest correlation, the tree and the record of the fit. ``features``: each
    latent's level, and its ``relatives`` nearest children (bottom latents that a top latent is made of) or parents.
    """
    found = dict.fromkeys((i.name for i in INFO), None)
    why, arrays = {}, {}
    levels, codes = levels_of(bench.sae), sparse_codes(bench, rows)
    if codes is None:
        return Measured(found, why_null=dict.fromkeys(found, NOT_FINITE))
    moments = _moments(codes, least)
    position = {int(j): i for i, j in enumerate(moments.alive)}
    phi, pearson = moments.phi(), moments.pearson()
    inside = {name: np.array([position[j] for j in part.tolist() if j in position], int) for name, part in levels.items()}
    for name, part in levels.items():
        found |= {f"{name}_sparsity": 1 - codes[:, part].nnz / (codes.shape[0] * len(part))} if name != "all" else {}
        here = inside[name]
        for kind, matrix in (("phi", phi), ("pearson", pearson)):
            others = matrix[np.ix_(here, here)][~np.eye(len(here), dtype=bool)]
            arrays[f"levels_{kind}_{name}"] = np.histogram(others, EDGES)[0]
            if len(others) and name != "all":
                found[f"{name}_{kind}_rms"] = float(np.sqrt(np.square(others).mean()))
    features = [{"latent": j, "level": name} for name, part in levels.items() if name != "all" for j in part.tolist()]
    if len(levels) > 1 and all(map(len, inside.values())):
        below, above = inside["bottom"], inside["top"]
        values, more = _cross(bench, codes, moments, phi[np.ix_(above, below)], pearson[np.ix_(above, below)], above, below, pairs)
        found, arrays = found | values, arrays | more | _map(pearson[np.ix_(above, below)], map_top, map_bottom)
    if isinstance(bench.sae, Hierarchical):
        values, more = _own(bench, codes, moments, pearson, inside)
        found, arrays = found | values, arrays | more
        features = _relatives(bench.sae, features, relatives)
    for info in INFO:
        if found[info.name] is None:
            why[info.name] = _why(info.name, levels, bench.sae)
    return Measured(found, arrays | {"levels_edges": EDGES}, why, features=features or None)


def _why(name: str, levels: dict[str, np.ndarray], sae: SAE) -> str:
    if name in {i.name for i in OWN}:
        return PLAIN if not isinstance(sae, Hierarchical) else f"there is no such thing with levels={sae.levels}"
    if name in {i.name for i in CROSS} or name.split("_")[0] not in levels:
        return ONE if len(levels) < 2 else "too few latents fire"
    return "too few latents fire"


def _moments(codes: Any, least: int) -> Moments:
    fires = np.diff(codes.tocsc().indptr)
    alive = np.flatnonzero(fires >= max(least, 1))
    part = codes[:, alive]
    scale = np.sqrt(np.asarray(part.multiply(part).mean(0)).ravel())
    both, products, sums = torch.zeros(len(alive), len(alive)), torch.zeros(len(alive), len(alive)), np.zeros(len(alive))
    for chunk in _chunks(part):
        values = torch.from_numpy(chunk / scale)
        on = (values > 0).float()
        both += on.t() @ on
        products += values.t() @ values
        sums += chunk.sum(0, dtype=np.float64) / scale
    return Moments(codes.shape[0], alive, both.double().numpy(), products.double().numpy(), sums)


def _chunks(codes: Any, size: int = 4096) -> Iterator[np.ndarray]:
    for begin in range(0, codes.shape[0], size):
        yield codes[begin : begin + size].toarray()


def _cross(
    bench: Bench, codes: Any, m: Moments, phi: np.ndarray, pearson: np.ndarray, above: np.ndarray, below: np.ndarray, pairs: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Everything between the levels; matrices are (top, bottom)."""
    p11 = torch.from_numpy(m.both[np.ix_(above, below)] / m.n)
    p, q = torch.from_numpy(m.rate[above]), torch.from_numpy(m.rate[below])
    bits = ((mutual_information.pairwise(p11, p, q) - 1 / (2 * m.n)).clamp_min(0) / math.log(2)).numpy()
    shared = mutual_information.redundancy(p11, p, q, m.n).numpy().max(1)
    rows = torch.nn.functional.normalize(bench.sae.W_dec.detach().float(), dim=1).cpu().numpy()
    cosine = rows[m.alive[above]] @ rows[m.alive[below]].T
    values = {
        "cross_phi_rms": np.sqrt(np.square(phi).mean()), "cross_pearson_rms": np.sqrt(np.square(pearson).mean()),
        "cross_mutual_information_bits": bits.mean(), "cross_mutual_information_p99_bits": np.quantile(bits, 0.99),
        "cross_redundancy": shared.mean(), "cross_redundant_frac": (shared > 0.5).mean(),
        "cross_value_information_bits": _value_information(codes, m, bits, above, below, pairs), "cross_cka": _cka(m, above, below),
        "cross_coherence": cosine.max(1).mean(), "cross_coherence_ratio": rows.shape[1] * np.square(cosine).mean(),
        "cross_fan_in": (pearson > 0.3).sum(1).mean(),
    }  # fmt: skip
    full, order = m.pearson(), np.argsort(-np.abs(pearson), axis=1, kind="stable")
    for k in (1, 5, 20):
        values[f"cross_explained_{k}"] = np.mean([_explained(full, a, below[o[:k]]) for a, o in zip(above, order, strict=True)])
    arrays = {"levels_phi_cross": np.histogram(phi, EDGES)[0], "levels_pearson_cross": np.histogram(pearson, EDGES)[0]}
    arrays |= {"levels_redundancy": shared, "levels_coherence": cosine.max(1), "levels_fan_in": (pearson > 0.3).sum(1)}
    return {k: float(v) for k, v in values.items()}, arrays


def _explained(r: np.ndarray, target: int, by: np.ndarray) -> float:
    """R2 of the least-squares prediction of one latent from others, from correlations alone."""
    return float(r[target, by] @ np.linalg.lstsq(r[np.ix_(by, by)] + 1e-6 * np.eye(len(by)), r[target, by], rcond=None)[0])


def _cka(m: Moments, above: np.ndarray, below: np.ndarray) -> float:
    mean = m.sums / m.n
    c = m.products / m.n - np.outer(mean, mean)
    norms = [np.linalg.norm(c[np.ix_(a, b)]) for a, b in ((above, below), (above, above), (below, below))]
    return norms[0] ** 2 / max(norms[1] * norms[2], 1e-30)


def _value_information(codes: Any, m: Moments, bits: np.ndarray, above: np.ndarray, below: np.ndarray, pairs: int) -> float:
    """Mean over the pairs of largest I of firing of the I of values: zero and eight quantiles of the positive ones; plug-in less its bias."""
    best = np.argsort(-bits, axis=None, kind="stable")[:pairs]
    a, b = (m.alive[part[i]] for part, i in zip((above, below), np.unravel_index(best, bits.shape), strict=True))
    columns, bins = codes.tocsc(), {}
    for j in {*a.tolist(), *b.tolist()}:
        part = slice(columns.indptr[j], columns.indptr[j + 1])
        cuts = np.quantile(columns.data[part], np.arange(1, 8) / 8)
        bins[j] = np.zeros(m.n, np.int64)
        bins[j][columns.indices[part]] = 1 + np.searchsorted(cuts, columns.data[part])
    total = []
    for i, j in zip(a.tolist(), b.tolist(), strict=True):
        joint = np.bincount(9 * bins[i] + bins[j], minlength=81).reshape(9, 9) / m.n
        outside = np.outer(joint.sum(1), joint.sum(0))
        seen = joint > 0
        bias = (np.count_nonzero(joint) - np.count_nonzero(joint.sum(1)) - np.count_nonzero(joint.sum(0)) + 1) / (2 * m.n)
        total.append(max(float((joint[seen] * np.log(joint[seen] / outside[seen])).sum()) - bias, 0.0) / math.log(2))
    return float(np.mean(total))


def _map(pearson: np.ndarray, n_top: int, n_bottom: int) -> dict[str, np.ndarray]:
    """The part of the correlation map where it is strongest; top latents in the order of their nearest bottom latent."""
    above = np.argsort(-np.abs(pearson).max(1), kind="stable")[:n_top]
    below = np.argsort(-np.abs(pearson[above]).max(0), kind="stable")[:n_bottom]
    part = pearson[np.ix_(above, below)]
    columns = np.argsort(np.abs(part).argmax(0), kind="stable")
    part = part[:, columns]
    return {"levels_map": part[np.argsort(np.abs(part).argmax(1), kind="stable")].astype(np.float16)}


def _own(bench: Bench, codes: Any, m: Moments, pearson: np.ndarray, inside: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What only a hierarchical SAE has: its paths, gates, phases and tree."""
    sae: Hierarchical = bench.sae
    paths = {"fvu_bottom": 1.0} | ({"fvu_top": 0.0} if sae.levels != "bottom" else {})
    errors, on, first, second = dict.fromkeys(paths, 0.0), 0, 0.0, 0.0
    opened, squares, total, histogram = 0, 0.0, 0.0, np.zeros(50, np.int64)
    for r in bench.chunks(codes.shape[0]):
        squares, total = squares + float(r.y.double().square().sum()), total + r.y.double().sum(0)
        for name, gate in paths.items():
            errors[name] += float((r.y - sae.decode(r.acts, gate)).square().sum())
        if sae.levels == "both":
            z1, z2 = sae.split(r.acts)
            g = sae.gates(z2)[z1 > 0].double()
            on, first, second, opened = on + g.numel(), first + float(g.sum()), second + float(g.square().sum()), opened + int((g > 0.5).sum())
            histogram += torch.histc(g, 50, 0.0, 1.0).long().cpu().numpy()
    variance = max(squares - float(total.square().sum()) / codes.shape[0], 1e-30)
    found: dict[str, Any] = {k: e / variance for k, e in errors.items()}
    if on:
        mean = first / on
        found |= {"gate_mean": mean, "gate_open_frac": opened / on, "gate_spread": math.sqrt(max(second / on - mean**2, 0.0))}
    arrays = {"levels_gates": histogram, "levels_trace": sae.trace.cpu().numpy(), "levels_trace_names": np.array(TRACED, dtype=str)}
    arrays |= {"levels_targets": 1 - np.array(sae.active) / np.array(sae.widths), "levels_phase_ends": np.cumsum(sae.fractions)}
    found |= _phases(bench, codes.shape[0], variance)
    if sae.levels != "bottom" and all(map(len, inside.values())):
        weights = (sae.top.W_dec * sae.scale).cpu().numpy()[m.alive[inside["top"]] - sae.widths[0]][:, m.alive[inside["bottom"]]]
        r = pearson[np.ix_(inside["top"], inside["bottom"])]
        rho = [spearmanr(w, c).statistic for w, c in zip(weights, r, strict=True)] if r.shape[1] > 2 else []
        found |= {"tree_spearman": float(np.nanmean(rho)) if np.isfinite(rho).any() else None}
    return found, arrays


def _phases(bench: Bench, rows: int, variance: float) -> dict[str, float]:
    """FVU of the SAE as it was at the end of each phase, and what became of the bottom."""
    sae: Hierarchical = bench.sae
    reached = float(np.nanmax(sae.trace[:, 0].cpu().numpy(), initial=0.0))  # a fit that was cut short has not been through all phases
    names = [n for n, start in zip(PHASES, np.cumsum([0.0, *sae.fractions[:-1]]), strict=False) if reached >= start]
    kept, now = {n: sae.weights_after(n) for n in names}, {k: v.clone() for k, v in sae.state_dict().items()}
    found = {}
    for name in names:
        sae.restore(name)
        error = sum(float((r.y - r.recon).square().sum()) for r in bench.chunks(rows))
        found[f"fvu_after_{name}"] = error / variance
        sae.load_state_dict(now)
    if len(names) > 1:
        below = [k for k in kept["bottom"] if k.startswith("bottom.")]
        found["frozen_identical"] = float(all(torch.equal(kept["bottom"][k], kept["top"][k]) for k in below))
        rows_of = [torch.nn.functional.normalize(w.float(), dim=1) for w in (kept["bottom"]["bottom.W_dec"], sae.bottom.W_dec)]
        found["bottom_drift_cosine"] = float((rows_of[0] * rows_of[1]).sum(1).mean())
    return found


def _relatives(sae: Hierarchical, features: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """Children of top latents by the weight s_j D2_ij with which they are written, and the parents these weights give a bottom latent."""
    if sae.levels == "bottom":
        return features
    weights: Tensor = (sae.top.W_dec * sae.scale).cpu()
    m1 = sae.widths[0]
    for name, table, offset in (("children", weights, 0), ("parents", weights.t(), m1)):
        order = table.argsort(dim=1, descending=True)[:, :n]
        owners = features[m1:] if name == "children" else features[:m1]
        for feature, row, of in zip(owners, order.tolist(), table.tolist(), strict=True):
            feature[name] = [[j + offset, float(f"{of[j]:.3g}")] for j in row if of[j] > 0]
    return features
