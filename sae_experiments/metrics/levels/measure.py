"""Statistics of the levels of an SAE: sparsity, correlation, redundancy and composition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.stats import spearmanr
from torch import Tensor

from sae_experiments.metric_info import Better
from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.metrics.codes import NOT_FINITE, nulls, sparse_codes
from sae_experiments.metrics.levels.paths import ONE_LEVEL, levels_of
from sae_experiments.saes.base import SAE
from sae_experiments.saes.hierarchical.redundancy import pairwise, redundancy
from sae_experiments.saes.hierarchical.sae import PHASES, TRACED, Hierarchical

#: Numbers of bottom latents that a top latent is regressed on.
REGRESSORS = (1, 5, 20)
#: Pearson correlation above which a bottom latent counts to the fan-in of a top latent.
FAN_IN_MIN_R = 0.3
NOT_HIERARCHICAL = "the SAE is not hierarchical"
TOO_FEW = "too few latents fire"
#: Bin edges of the histograms of correlations.
BIN_EDGES = np.linspace(-1, 1, 201)
GATE_BINS = 50
CHUNK = 4096


def _info(
    name: str,
    title: str,
    formula: str,
    unit: str = "",
    better: Better = "none",
    shown: bool = False,
) -> MetricInfo:
    return MetricInfo(
        name=name, title=title, formula=formula, unit=unit, better=better, shown=shown
    )


#: Metrics of one level.
SINGLE = [
    _info(
        "bottom_sparsity",
        "sparsity below",
        "1 - L0/m of the bottom level, held-out rows, inference",
        better="target",
        shown=True,
    ),
    _info(
        "top_sparsity",
        "sparsity above",
        "1 - L0/m of the top level, held-out rows, inference",
        better="target",
        shown=True,
    ),
    _info(
        "bottom_phi_rms",
        "co-activation below",
        "root mean square of phi over pairs of bottom latents",
    ),
    _info(
        "top_phi_rms",
        "co-activation above",
        "root mean square of phi over pairs of top latents",
    ),
    _info(
        "bottom_pearson_rms",
        "correlation below",
        "root mean square of Pearson's r of values over pairs of bottom latents",
    ),
    _info(
        "top_pearson_rms",
        "correlation above",
        "root mean square of Pearson's r of values over pairs of top latents",
    ),
]
#: Metrics between the two levels.
CROSS = [
    _info(
        "cross_phi_rms",
        "co-activation across",
        "root mean square of phi over pairs of a top and a bottom latent",
    ),
    _info(
        "cross_pearson_rms",
        "correlation across",
        "root mean square of Pearson's r over pairs of a top and a bottom latent",
    ),
    _info(
        "cross_mutual_information_bits",
        "mutual information",
        "mean over pairs (top, bottom) of I of their firing, less 1/(2N) nats",
        unit="bit",
        better="down",
        shown=True,
    ),
    _info(
        "cross_mutual_information_p99_bits",
        "mutual information (p99)",
        "99th percentile of the same",
        unit="bit",
        better="down",
    ),
    _info(
        "cross_redundancy",
        "redundancy",
        "mean over top latents i of max_j I_ij / min(h_i, h_j)",
        better="down",
        shown=True,
    ),
    _info(
        "cross_redundant_frac",
        "redundant",
        "share of top latents with max_j I_ij / min(h_i, h_j) > 0.5",
        better="down",
    ),
    _info(
        "cross_value_information_bits",
        "value information",
        "mean I of values in 9 bins over the 1000 pairs of largest I of firing",
        unit="bit",
        better="down",
    ),
    _info(
        "cross_cka",
        "CKA",
        "linear centred kernel alignment of the two codes",
    ),
    _info(
        "cross_coherence",
        "coherence across",
        "mean over top latents i of max_j cos(t_i, d_j)",
        better="down",
        shown=True,
    ),
    _info(
        "cross_coherence_ratio",
        "coherence across (all)",
        "d mean_ij cos(t_i, d_j)^2: 1 for random directions",
        better="down",
    ),
    _info(
        "cross_fan_in",
        "fan-in",
        "mean over top latents of how many bottom latents have r > 0.3 with it",
        unit="latents",
    ),
    *(
        _info(
            f"cross_explained_{k}",
            f"explained by {k}",
            f"mean R2 of a top latent regressed on the {k} bottom latents of largest |r|",
        )
        for k in REGRESSORS
    ),
]
#: Metrics of hierarchical SAEs alone.
HIERARCHICAL = [
    _info(
        "fvu_bottom",
        "FVU below",
        "FVU of the bottom's reconstruction (gate 1)",
        better="down",
    ),
    _info(
        "fvu_top",
        "FVU above",
        "FVU of the top's reconstruction (gate 0)",
        better="down",
    ),
    _info(
        "gate_mean",
        "gate",
        "mean gate over active bottom latents",
    ),
    _info(
        "gate_open_frac",
        "gate open",
        "share of active bottom latents with a gate above one half",
    ),
    _info(
        "gate_spread",
        "gate spread",
        "standard deviation of the gate over active bottom latents",
    ),
    *(
        _info(
            f"fvu_after_{phase}",
            f"FVU after {phase}",
            f"FVU of the SAE as it was at the end of phase {phase}",
            better="down",
        )
        for phase in PHASES
    ),
    _info(
        "frozen_identical",
        "frozen",
        "1 if every bit of the bottom is the same at the end of phase top as at the end of "
        "phase bottom",
        better="up",
    ),
    _info(
        "bottom_drift_cosine",
        "drift",
        "mean cosine of the bottom's atoms with what they were at the end of their phase",
        better="up",
    ),
    _info(
        "tree_spearman",
        "tree and correlation",
        "mean over top latents of Spearman's rho of D2 row and r with bottom latents",
        better="up",
    ),
]
INFO = [*SINGLE, *CROSS, *HIERARCHICAL]

Values = dict[str, Any]
Arrays = dict[str, np.ndarray]


class PairSums(NamedTuple):
    """Sums over N rows for all pairs of the A latents that fire often enough.

    Values are scaled to unit root mean square.
    """

    n: int
    """Number of rows, N."""
    alive: np.ndarray
    """Indices of the latents, (A,), ascending."""
    both: np.ndarray
    """Number of rows on which both latents fire, (A, A)."""
    products: np.ndarray
    """Sum of the products of values, (A, A)."""
    sums: np.ndarray
    """Sum of values, (A,)."""

    @property
    def rate(self) -> np.ndarray:
        """Firing rate of each latent, (A,)."""
        return self.both.diagonal() / self.n

    def phi(self) -> np.ndarray:
        """Correlation of firing, (A, A)."""
        p = self.rate
        return _correlation(self.both / self.n - np.outer(p, p), p * (1 - p))

    def covariance(self) -> np.ndarray:
        """Covariance of values, (A, A)."""
        mean = self.sums / self.n
        return self.products / self.n - np.outer(mean, mean)

    def pearson(self) -> np.ndarray:
        """Correlation of values, (A, A)."""
        mean = self.sums / self.n
        variance = np.maximum(self.products.diagonal() / self.n - mean**2, 0)
        return _correlation(self.covariance(), variance)


def _correlation(covariance: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Correlations (A, A); 0 for a latent without variance."""
    scale = np.sqrt(np.outer(variance, variance))
    zeros = np.zeros_like(covariance)
    return np.divide(covariance, scale, out=zeros, where=scale > 1e-9).clip(-1, 1)


@dataclass(frozen=True)
class LevelPairs:
    """Pairs of a top latent (T of them) and a bottom latent (B of them), all alive."""

    sums: PairSums
    """Sums over the rows."""
    above: np.ndarray
    """Indices of the top latents into `sums.alive`, (T,)."""
    below: np.ndarray
    """Indices of the bottom latents into `sums.alive`, (B,)."""
    pearson_all: np.ndarray
    """Correlation of values of all alive latents, (A, A)."""
    phi: np.ndarray
    """Correlation of firing, (T, B)."""

    @property
    def pearson(self) -> np.ndarray:
        """Correlation of values, (T, B)."""
        return self.pearson_all[np.ix_(self.above, self.below)]


@torch.no_grad()
def measure(
    ctx: EvalContext,
    *,
    rows: int | None,
    min_fires: int,
    pairs: int,
    map_top: int,
    map_bottom: int,
    relatives: int,
) -> Measured:
    """Compare the levels of an SAE with each other.

    The levels are those of a hierarchical SAE, or the two groups of a nested one (the inner group
    is the top). An SAE without levels is measured as one level.

    Args:
        ctx: The SAE and its held-out rows.
        rows: Held-out rows used, from the first (None: all).
        min_fires: Latents with fewer firings are left out of the pairs.
        pairs: Number of pairs whose values are compared, those of largest mutual information of
            firing.
        map_top: Number of top latents in the stored part of the correlation map, those of strongest
            correlation.
        map_bottom: Number of bottom latents in the stored part.
        relatives: Number of children or parents listed per latent.

    Returns:
        The metrics of `INFO`. Arrays: histograms of correlations, a part of the correlation map
        between the levels, the gates and the record of the fit. `features`: the level of each
        latent and, for a hierarchical SAE, its nearest children (the bottom latents that a top
        latent is made of) or parents.
    """
    sae = ctx.sae
    codes = sparse_codes(ctx, rows)
    if codes is None:
        return nulls(INFO, NOT_FINITE)
    levels = levels_of(sae)
    sums = _pair_sums(codes, min_fires)
    phi, pearson = sums.phi(), sums.pearson()
    inside = {name: np.flatnonzero(np.isin(sums.alive, part)) for name, part in levels.items()}
    values, arrays = _within(inside, phi, pearson)
    for name, members in levels.items():
        active = codes[:, members].nnz
        values[f"{name}_sparsity"] = 1 - active / (sums.n * len(members))
    if len(levels) > 1 and all(map(len, inside.values())):
        above, below = inside["top"], inside["bottom"]
        level_pairs = LevelPairs(sums, above, below, pearson, phi[np.ix_(above, below)])
        cross_values, cross_arrays = _cross(sae, codes, level_pairs, pairs)
        values |= cross_values
        arrays |= cross_arrays
        arrays["levels_map"] = _correlation_map(level_pairs.pearson, map_top, map_bottom)
    features = _level_features(levels)
    if isinstance(sae, Hierarchical):
        own_values, own_arrays = _hierarchical(ctx, sae, sums, pearson, inside)
        values |= own_values
        arrays |= own_arrays
        _add_relatives(sae, features, relatives)
    # The values of a level "all" are in no metric: an SAE without levels has none of them.
    values = {i.name: values.get(i.name) for i in INFO}
    why = {name: _why_null(name, levels, sae) for name, v in values.items() if v is None}
    arrays["levels_edges"] = BIN_EDGES
    return Measured(values, arrays, why, features=features or None)


def _within(
    inside: dict[str, np.ndarray], phi: np.ndarray, pearson: np.ndarray
) -> tuple[Values, Arrays]:
    """Correlations between the latents of each level.

    Args:
        inside: Places of the latents of each level in the matrices.
        phi: Correlation of firing, (A, A).
        pearson: Correlation of values, (A, A).
    """
    values: Values = {}
    arrays: Arrays = {}
    for name, places in inside.items():
        different = ~np.eye(len(places), dtype=bool)
        for kind, matrix in (("phi", phi), ("pearson", pearson)):
            correlations = matrix[np.ix_(places, places)][different]
            arrays[f"levels_{kind}_{name}"] = np.histogram(correlations, BIN_EDGES)[0]
            if len(correlations):
                values[f"{name}_{kind}_rms"] = float(np.sqrt(np.square(correlations).mean()))
    return values, arrays


def _level_features(levels: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    features = []
    for name, members in levels.items():
        if name != "all":
            features += [{"latent": j, "level": name} for j in members.tolist()]
    return features


def _why_null(name: str, levels: dict[str, np.ndarray], sae: SAE) -> str:
    if name in {i.name for i in HIERARCHICAL}:
        if isinstance(sae, Hierarchical):
            return f"there is no such thing with levels={sae.levels}"
        return NOT_HIERARCHICAL
    needs_two_levels = name in {i.name for i in CROSS} or name.split("_")[0] not in levels
    return ONE_LEVEL if needs_two_levels and len(levels) < 2 else TOO_FEW


def _pair_sums(codes: sparse.csr_matrix, min_fires: int) -> PairSums:
    fires = np.diff(codes.tocsc().indptr)
    alive = np.flatnonzero(fires >= max(min_fires, 1))
    part = codes[:, alive]
    scale = np.sqrt(np.asarray(part.multiply(part).mean(0)).ravel())
    both = torch.zeros(len(alive), len(alive))
    products = torch.zeros(len(alive), len(alive))
    sums = np.zeros(len(alive))
    n = 0
    for chunk in _chunks(part):
        values = torch.from_numpy(chunk / scale)
        on = (values > 0).float()
        both += on.t() @ on
        products += values.t() @ values
        sums += chunk.sum(0, dtype=np.float64) / scale
        n += len(chunk)
    return PairSums(n, alive, both.double().numpy(), products.double().numpy(), sums)


def _chunks(codes: sparse.csr_matrix) -> Iterator[np.ndarray]:
    """Dense parts of sparse codes, `CHUNK` rows at a time."""
    for begin in range(0, codes.get_shape()[0], CHUNK):
        yield codes[begin : begin + CHUNK].toarray()


# ------------------------------------------------------------------------------ between the levels


def _cross(
    sae: SAE, codes: sparse.csr_matrix, pairs: LevelPairs, n_value_pairs: int
) -> tuple[Values, Arrays]:
    """Metrics between the levels, and their histograms."""
    sums, phi, pearson = pairs.sums, pairs.phi, pairs.pearson
    p11 = torch.from_numpy(sums.both[np.ix_(pairs.above, pairs.below)] / sums.n)
    p = torch.from_numpy(sums.rate[pairs.above])
    q = torch.from_numpy(sums.rate[pairs.below])
    nats = (pairwise(p11, p, q) - 1 / (2 * sums.n)).clamp_min(0)
    bits = (nats / math.log(2)).numpy()
    largest_share = redundancy(p11, p, q, sums.n).numpy().max(1)
    directions = torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=1).cpu().numpy()
    cosine = directions[sums.alive[pairs.above]] @ directions[sums.alive[pairs.below]].T
    fan_in = (pearson > FAN_IN_MIN_R).sum(1)
    values = {
        "cross_phi_rms": np.sqrt(np.square(phi).mean()),
        "cross_pearson_rms": np.sqrt(np.square(pearson).mean()),
        "cross_mutual_information_bits": bits.mean(),
        "cross_mutual_information_p99_bits": np.quantile(bits, 0.99),
        "cross_redundancy": largest_share.mean(),
        "cross_redundant_frac": (largest_share > 0.5).mean(),
        "cross_value_information_bits": _value_information(codes, pairs, bits, n_value_pairs),
        "cross_cka": _cka(pairs),
        "cross_coherence": cosine.max(1).mean(),
        "cross_coherence_ratio": directions.shape[1] * np.square(cosine).mean(),
        "cross_fan_in": fan_in.mean(),
    }
    for k in REGRESSORS:
        values[f"cross_explained_{k}"] = _explained(pairs, k)
    arrays = {
        "levels_phi_cross": np.histogram(phi, BIN_EDGES)[0],
        "levels_pearson_cross": np.histogram(pearson, BIN_EDGES)[0],
        "levels_redundancy": largest_share,
        "levels_coherence": cosine.max(1),
        "levels_fan_in": fan_in,
    }
    return {name: float(value) for name, value in values.items()}, arrays


def _explained(pairs: LevelPairs, k: int) -> float:
    """Mean R2 of top latents regressed on the `k` bottom latents of largest |r|."""
    r = pairs.pearson_all
    nearest = np.argsort(-np.abs(pairs.pearson), axis=1, kind="stable")[:, :k]
    r2 = []
    for target, order in zip(pairs.above, nearest, strict=True):
        predictors = pairs.below[order]
        # Least squares needs no rows: the correlations hold all of it.
        gram = r[np.ix_(predictors, predictors)] + 1e-6 * np.eye(len(predictors))
        weights = np.linalg.lstsq(gram, r[target, predictors], rcond=None)[0]
        r2.append(float(r[target, predictors] @ weights))
    return float(np.mean(r2))


def _cka(pairs: LevelPairs) -> float:
    """Linear centred kernel alignment of the codes of the two levels."""
    above, below = pairs.above, pairs.below
    covariance = pairs.sums.covariance()
    across = np.linalg.norm(covariance[np.ix_(above, below)])
    within_above = np.linalg.norm(covariance[np.ix_(above, above)])
    within_below = np.linalg.norm(covariance[np.ix_(below, below)])
    return float(across**2 / max(within_above * within_below, 1e-30))


def _value_information(
    codes: sparse.csr_matrix, pairs: LevelPairs, bits: np.ndarray, n_pairs: int
) -> float:
    """Mean mutual information of values, in bits, over the pairs of largest information of firing.

    Values fall in 9 bins: zero, and eight quantiles of the positive values. The estimate is the
    plug-in one less its bias.
    """
    best = np.argsort(-bits, axis=None, kind="stable")[:n_pairs]
    top, bottom = np.unravel_index(best, bits.shape)
    top_latents = pairs.sums.alive[pairs.above[top]].tolist()
    bottom_latents = pairs.sums.alive[pairs.below[bottom]].tolist()
    n = pairs.sums.n
    columns = sparse.csc_matrix(codes)
    bins = {j: _value_bins(columns, j, n) for j in {*top_latents, *bottom_latents}}
    information = []
    for i, j in zip(top_latents, bottom_latents, strict=True):
        joint = np.bincount(9 * bins[i] + bins[j], minlength=81).reshape(9, 9) / n
        information.append(max(_unbiased_information(joint, n), 0.0) / math.log(2))
    return float(np.mean(information))


def _value_bins(columns: sparse.csc_matrix, latent: int, n: int) -> np.ndarray:
    """Bin of a latent's value on each of `n` rows: 0 for zero, else 1 to 8 by quantile."""
    part = slice(columns.indptr[latent], columns.indptr[latent + 1])
    positive = columns.data[part]
    cuts = np.quantile(positive, np.arange(1, 8) / 8)
    bins = np.zeros(n, np.int64)
    bins[columns.indices[part]] = 1 + np.searchsorted(cuts, positive)
    return bins


def _unbiased_information(joint: np.ndarray, n: int) -> float:
    """Mutual information in nats of a joint distribution from `n` rows, less the plug-in bias."""
    rows, columns = joint.sum(1), joint.sum(0)
    independent = np.outer(rows, columns)
    seen = joint > 0
    plug_in = float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())
    degrees = np.count_nonzero(joint) - np.count_nonzero(rows) - np.count_nonzero(columns) + 1
    return plug_in - degrees / (2 * n)


def _correlation_map(pearson: np.ndarray, n_top: int, n_bottom: int) -> np.ndarray:
    """The part of the correlations (T, B) that is strongest, as float16.

    Top latents stand in the order of their nearest bottom latents.
    """
    above = np.argsort(-np.abs(pearson).max(1), kind="stable")[:n_top]
    below = np.argsort(-np.abs(pearson[above]).max(0), kind="stable")[:n_bottom]
    part = pearson[np.ix_(above, below)]
    part = part[:, np.argsort(np.abs(part).argmax(0), kind="stable")]
    part = part[np.argsort(np.abs(part).argmax(1), kind="stable")]
    return part.astype(np.float16)


# -------------------------------------------------------------------------------- hierarchical SAEs


class _GateSums:
    """Running statistics of the gates of active bottom latents."""

    def __init__(self) -> None:
        self.n = 0
        self.n_open = 0
        self.sum = 0.0
        self.squares = 0.0
        self.histogram = np.zeros(GATE_BINS, np.int64)

    def add(self, gates: Tensor) -> None:
        """Add gates (n,), float64."""
        self.n += gates.numel()
        self.n_open += int((gates > 0.5).sum())
        self.sum += float(gates.sum())
        self.squares += float(gates.square().sum())
        self.histogram += torch.histc(gates, GATE_BINS, 0.0, 1.0).long().cpu().numpy()

    def values(self) -> Values:
        """The gate metrics; empty if there were no gates."""
        if not self.n:
            return {}
        mean = self.sum / self.n
        return {
            "gate_mean": mean,
            "gate_open_frac": self.n_open / self.n,
            "gate_spread": math.sqrt(max(self.squares / self.n - mean**2, 0.0)),
        }


def _hierarchical(
    ctx: EvalContext,
    sae: Hierarchical,
    sums: PairSums,
    pearson: np.ndarray,
    inside: dict[str, np.ndarray],
) -> tuple[Values, Arrays]:
    """Metrics of the paths, gates, phases and tree of a hierarchical SAE."""
    path_gates = {"fvu_bottom": 1.0}
    if sae.levels != "bottom":
        path_gates["fvu_top"] = 0.0
    errors = dict.fromkeys(path_gates, 0.0)
    gates = _GateSums()
    squares = 0.0
    total: Tensor | float = 0.0
    for r in ctx.chunks(sums.n):
        squares += float(r.y.double().square().sum())
        total = total + r.y.double().sum(0)
        for name, gate in path_gates.items():
            errors[name] += float((r.y - sae.decode(r.acts, gate)).square().sum())
        if sae.levels == "both":
            z1, z2 = sae.split(r.acts)
            gates.add(sae.gates(z2)[z1 > 0].double())
    variance = max(squares - float(torch.as_tensor(total).square().sum()) / sums.n, 1e-30)
    values: Values = {name: error / variance for name, error in errors.items()}
    values |= gates.values()
    values |= _phases(ctx, sae, sums.n, variance)
    if sae.levels != "bottom" and all(map(len, inside.values())):
        values["tree_spearman"] = _tree_spearman(sae, sums, pearson, inside)
    arrays = {
        "levels_gates": gates.histogram,
        "levels_trace": sae.trace.cpu().numpy(),
        "levels_trace_names": np.array(TRACED, dtype=str),
        "levels_targets": 1 - np.array(sae.active) / np.array(sae.widths),
        "levels_phase_ends": np.cumsum(sae.phase_fracs),
    }
    return values, arrays


def _tree_spearman(
    sae: Hierarchical, sums: PairSums, pearson: np.ndarray, inside: dict[str, np.ndarray]
) -> float | None:
    """Mean over top latents of Spearman's rho of tree weights and correlations."""
    top, bottom = inside["top"], inside["bottom"]
    if len(bottom) < 3:
        return None
    top_rows = sums.alive[top] - sae.widths[0]
    weights = _tree_weights(sae).numpy()[top_rows][:, sums.alive[bottom]]
    correlations = pearson[np.ix_(top, bottom)]
    rho = [_spearman(w, r) for w, r in zip(weights, correlations, strict=True)]
    return float(np.nanmean(rho)) if np.isfinite(rho).any() else None


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    rho: Any = spearmanr(a, b)
    return float(rho.statistic)


def _tree_weights(sae: Hierarchical) -> Tensor:
    """Weight `s_j D2_ij` with which top latent i writes bottom latent j, (m2, m1), on the CPU."""
    return (sae.top.W_dec.detach() * sae.scale).cpu()


def _phases(ctx: EvalContext, sae: Hierarchical, rows: int, variance: float) -> Values:
    """FVU at the end of each phase, and changes of the bottom since its own phase."""
    # A fit that was cut short has not been through all phases.
    progress = float(np.nanmax(sae.trace[:, 0].cpu().numpy(), initial=0.0))
    starts = np.cumsum([0.0, *sae.phase_fracs[:-1]])
    reached = [phase for phase, start in zip(PHASES, starts, strict=False) if progress >= start]
    kept = {phase: sae.weights_after(phase) for phase in reached}
    now = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    values = {}
    for phase in reached:
        sae.restore(phase)
        error = sum(float((r.y - r.recon).square().sum()) for r in ctx.chunks(rows))
        values[f"fvu_after_{phase}"] = error / variance
        sae.load_state_dict(now)
    if len(reached) > 1:
        first, second = kept["bottom"], kept["top"]
        frozen = [name for name in first if name.startswith("bottom.")]
        identical = all(torch.equal(first[name], second[name]) for name in frozen)
        values["frozen_identical"] = float(identical)
        before = torch.nn.functional.normalize(first["bottom.W_dec"].float(), dim=1)
        after = torch.nn.functional.normalize(sae.bottom.W_dec.float(), dim=1)
        values["bottom_drift_cosine"] = float((before * after).sum(1).mean())
    return values


def _add_relatives(sae: Hierarchical, features: list[dict[str, Any]], n: int) -> None:
    """Add to features the `n` nearest children (top latents) or parents (bottom latents).

    A relative is `[latent, weight]`, with the weight of the tree (`_tree_weights`).
    """
    if sae.levels == "bottom":
        return
    weights = _tree_weights(sae)
    m1 = sae.widths[0]
    bottom_features, top_features = features[:m1], features[m1:]
    for feature, row in zip(top_features, weights, strict=True):
        feature["children"] = _nearest(row, n, 0)
    for feature, row in zip(bottom_features, weights.t(), strict=True):
        feature["parents"] = _nearest(row, n, m1)


def _nearest(weights: Tensor, n: int, offset: int) -> list[list[float]]:
    """The `n` largest positive weights as `[index + offset, weight]`, largest first."""
    order = weights.argsort(descending=True)[:n].tolist()
    values = weights.tolist()
    return [[j + offset, float(f"{values[j]:.3g}")] for j in order if values[j] > 0]
