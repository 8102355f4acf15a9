"""How much a code changes when its input is perturbed: sizes, kinds, folds of the text, distributions. Noise acts on the input, never on the code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import NOT_FINITE, nulls, raw_rows
from sae_experiments.metrics.noise import noise_of
from sae_experiments.metrics.robustness.margins import (
    NO_CLOSED_FORM,
    confirmed,
    crosstalk,
    has_margins,
    radii,
)
from sae_experiments.metrics.robustness.noise import NO_INPUT, NO_MODEL, Noises, other_texts
from sae_experiments.metrics.robustness.sums import Distributions, Sums, structure
from sae_experiments.metrics.robustness.text import denoising, seeds_agree
from sae_experiments.saes.purified.perturb import TYPES, Cloud
from sae_experiments.sampling import spread, spread_rows


def _info(name: str, title: str, formula: str, better: str = "none", unit: str = "", shown: bool = False) -> MetricInfo:
    return MetricInfo(name=f"rob_{name}", title=title, formula=formula, unit=unit, better=better, shown=shown)  # pyright: ignore[reportArgumentType]


INFO = [
    _info("change", "feature change", "100 sum |z~ - z| / sum |z|, Gaussian noise of size eps R, R = mean ||x - mean x||", "down", "%", True),
    _info("change_mean", "feature change (mean)", "mean over alive latents of 100 sum_b |z~ - z| / sum_b |z|", "down", "%"),
    _info("fss", "FSS", "median over alive latents of 100 (1 - sum_b |z~ - z| / sum_b (|z~| + |z|))", "up", "", True),
    _info("fss_pooled", "FSS (pooled)", "the same with sums over all latents", "up"),
    _info("fss_p5", "FSS (5 %)", "5th percentile of FSS over alive latents", "up"),
    _info("sci", "SCI", "mean over alive latents of Pearson's r between z and z~", "up", "", True),
    _info("sci_token", "SCI (token)", "mean over rows of the cosine of z and z~", "up"),
    _info("sci_structure", "SCI (structure)", "Pearson's r between the correlations of pairs of latents, clean and perturbed", "up"),
    _info("sci_skipped", "SCI skipped", "alive latents without variance, which have no r", unit="latents"),
    _info("jaccard", "Jaccard", "mean over rows of |S and S~| / |S or S~|", "up"),
    _info("flips", "flips", "latents that go on or off, of 1000", "down", "per 1000"),
    _info("flip_share", "share of flips", "part of sum |z~ - z| that belongs to latents which went on or off", "none"),
    _info("radius", "certified radius", "median over active latents of the distance to the nearest input that turns them off, over R", "up", "R"),
    _info("certified", "certified", "share of active latents with a radius above eps R", "up"),
    _info("radius_confirmed", "radius confirmed", "share of radii that hold by trial (1 unless the formula is wrong)", "target"),
    _info("crosstalk", "cross-talk", "median of sum_{l != i} (dz_l ||d_l||)^2 / (dz_i ||d_i||)^2 after a step along d_i, i active", "down"),
    _info("slope", "own slope", "mean dz_i ||d_i|| over the length of that step (ideal 1)", "target"),
    _info("denoised_fvu", "FVU under noise", "sum ||y - yhat(x~)||^2 / sum ||y - mean y||^2", "down"),
    _info("noise_ce_bits", "noise delta CE", "cross-entropy with x~ in place of x, minus clean", "none", "bit"),
    _info("denoised_ce_bits", "denoised delta CE", "cross-entropy with yhat(x~) in place of x, minus clean", "down", "bit"),
    _info("wasserstein", "Wasserstein", "mean over alive latents of W1(z, z~) / mean |z|", "down"),
    _info("zero_mass", "zero mass", "mean over alive latents of the change in how often they are off, P(z~ = 0) - P(z = 0)", "none"),
    _info("fold_sd", "fold sd", "mean over latents of the standard deviation of FSS between folds of the documents", "down"),
    _info("fold_rank", "fold rank", "mean Spearman correlation of FSS over latents between two folds", "up"),
    _info("fold_icc", "fold ICC", "ICC(2,1) of FSS: latents x folds", "up"),
    _info("seed_rank", "seed rank", "Spearman correlation of FSS between latents matched one to one with another seed's (cosine > 0.7)", "up"),
    _info("seed_matched", "seed matched", "alive latents matched so, as a share", "up"),
    _info("token_size", "size of a token change", "mean ||x~ - x|| / R where earlier characters were replaced, unscaled", "none", "R"),
    _info("token_change", "change by token", "feature change under that unscaled noise", "down", "%"),
    *(_info(f"change_{k}", f"change, {k}", f"feature change under {k} noise of size eps R", "down", "%") for k in TYPES),
    *(_info(f"area_{k}", f"area, {k}", "area under pooled FSS over log eps, of 100", "up") for k in TYPES),
    *(_info(f"eps50_{k}", f"eps50, {k}", "size at which pooled FSS falls to 50", "up", "R") for k in TYPES),
]


@torch.no_grad()
def measure(
    bench: Bench, *, eps: float, rows: int | None, draws: int, least: int, type_rows: int, curve_rows: int, sizes: Sequence[float], attack_steps: int,
    folds: int, block: int, structure_latents: int, shown_latents: int, bins: int, margin_rows: int, token_share: float, windows: int,
    match: int, seed: int,
) -> Measured:  # fmt: skip
    """Everything above, for Gaussian noise on ``rows`` rows and ``draws`` draws; the other kinds on ``type_rows``; curves over ``sizes``.

    Alive: fires at least ``least`` times. A kind that cannot be made (no text, a transcoder) is null with its reason; so is all of it where a
    code is not finite.
    """
    sae = bench.sae.eval()
    x = torch.from_numpy(raw_rows(bench, rows)).to(bench.device)
    if not bool(torch.isfinite(x).all()) or not bool(torch.isfinite(sae.encode(x[:4096])).all()):
        return nulls(INFO, NOT_FINITE)
    cloud = Cloud(sae.d_in).to(bench.device).learn(x)
    if not float(cloud.radius) > 0:
        return nulls(INFO, "the held-out rows do not vary")
    alt = other_texts(bench, min(type_rows, len(x)), token_share, seed)
    noises = Noises(sae=sae, cloud=cloud, attack_steps=attack_steps, seed=seed, alt=alt)
    length = bench.held_out.length if bench.held_out is not None else 128
    found = Found()
    total = _headline(found, noises, x, eps, draws, least, length * block, folds, seed)
    _shapes(found, noises, x[:type_rows], eps, total.alive(least * draws), structure_latents, shown_latents, bins)
    _kinds(found, noises, x[:type_rows], eps)
    few = spread(min(type_rows, len(x)), curve_rows)
    _curves(found, replace(noises, alt=None if alt is None else alt[few]), bench, x, few, sizes)
    _margins(found, noises, spread_rows(x, margin_rows), eps, seed)
    if alt is not None:
        size, raw = (alt - x[: len(alt)]).norm(dim=1), Sums(sae.d_sae)
        raw.add(sae.encode(x[: len(alt)]), sae.encode(alt))
        found.put(token_size=float(size[size > 0].mean() / cloud.radius) if bool((size > 0).any()) else None, token_change=raw.change())
    found.put(**dict(zip(("noise_ce_bits", "denoised_ce_bits"), denoising(bench, cloud, eps, windows, seed), strict=True)))
    found.put(**seeds_agree(bench, noises, x, total, eps, least, match))
    trace = getattr(sae, "eps_trace", None)
    if trace is not None:
        found.arrays["rob_eps_trace"] = trace.cpu().numpy()
    return found.measured()


class Found:
    """Collects numbers and arrays; what is missing in the end is null, with the reason that fits its name."""

    def __init__(self) -> None:
        self.scalars: dict[str, float | None] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.noise: dict[str, float] = {}
        self.why: dict[str, str] = {}

    def put(self, **values: float | None) -> None:
        """Add numbers, named without their prefix."""
        self.scalars |= {f"rob_{k}": v for k, v in values.items()}

    def measured(self) -> Measured:
        """All metrics of ``INFO``."""
        scalars = {i.name: self.scalars.get(i.name) for i in INFO}
        why = {name: self.why.get(name) or _why(name) for name, v in scalars.items() if v is None}
        return Measured(scalars, self.arrays, why, self.noise)


def _why(name: str) -> str:
    if name.startswith(("rob_radius", "rob_certified")):
        return NO_CLOSED_FORM
    if name.startswith("rob_seed"):
        return "there is no fit from another seed, or too few of its latents match"
    if name.startswith("rob_eps50"):
        return "FSS stays above 50 at every size"
    if "token" in name or name.endswith("ce_bits"):
        return NO_MODEL
    return NO_INPUT if "targeted" in name or name in ("rob_crosstalk", "rob_slope") else "too few latents fire often enough"


def _headline(
    found: Found, noises: Noises, x: torch.Tensor, eps: float, draws: int, least: int, document: int, folds: int, seed: int
) -> Sums:  # fmt: skip
    """Gaussian noise on all rows: per latent, per row, per fold."""
    size = max(1, 4096 // document) * document  # whole documents
    total, by_document = Sums(noises.sae.d_sae), []
    for draw in range(draws):
        parts = []
        for begin in range(0, len(x), size):
            part = x[begin : begin + size]
            z, moved = noises.sae.encode(part), noises.sae.encode(part + noises.delta("gaussian", part, begin, eps, draw))
            total.add(z, moved)
            parts += [[(m - c).abs().sum(0), c.abs().sum(0), (m.abs() + c.abs()).sum(0)]
                      for c, m in zip(z.split(document), moved.split(document), strict=True)]  # fmt: skip
        by_document.append(np.stack([[t.double().cpu().numpy() for t in p] for p in parts]))
    sums = np.sum(by_document, 0)  # (documents, 3, F)
    alive = total.alive(least * draws)
    found.put(**total.summary(alive))
    found.arrays["rob_fss_latents"] = np.where(alive, total.fss(), np.nan)
    found.arrays["rob_change_latents"] = np.where(alive, total.latent_change(), np.nan)
    if len(sums) > 1:
        pooled = {"moved": sums[:, 0].sum(1), "mass": sums[:, 1].sum(1), "both": sums[:, 2].sum(1)}
        formulas = {"rob_change": lambda s: 100 * s["moved"] / s["mass"], "rob_fss_pooled": lambda s: 100 * (1 - s["moved"] / s["both"])}
        found.noise |= {k: noise_of(pooled, f, draws=1000, seed=seed) for k, f in formulas.items() if (pooled["mass"] > 0).all()}
    if len(sums) >= folds > 1 and alive.sum() > 2:
        fold = np.stack([sums[i::folds].sum(0) for i in range(folds)])[:, :, alive]  # (folds, 3, alive): every fifth document, say
        table = 100 * (1 - fold[:, 0] / np.maximum(fold[:, 2], 1e-300))[:, (fold[:, 2] > 0).all(0)].T  # latents x folds
        found.put(**_agreement(table))
        found.arrays["rob_fold_fss"] = table.astype(np.float32)
    return total


def _agreement(table: np.ndarray) -> dict[str, float | None]:
    """Agreement of folds about latents, from FSS (latents, folds): standard deviation, Spearman correlation, ICC(2,1) (Shrout and Fleiss 1979)."""
    n, k = table.shape
    if n < 3:
        return {}
    ranks = np.apply_along_axis(rankdata, 0, table)
    r = np.corrcoef(ranks.T)[np.triu_indices(k, 1)] if (ranks.std(0) > 0).all() else np.array([np.nan])
    grand = table.mean()
    between, judges = k * ((table.mean(1) - grand) ** 2).sum() / (n - 1), n * ((table.mean(0) - grand) ** 2).sum() / (k - 1)
    rest = ((table - table.mean(1, keepdims=True) - table.mean(0) + grand) ** 2).sum() / ((n - 1) * (k - 1))
    below = between + (k - 1) * rest + k * (judges - rest) / n
    icc = (between - rest) / below if below > 0 else math.nan
    values = {"fold_sd": float(table.std(1, ddof=1).mean()), "fold_rank": float(r.mean()), "fold_icc": float(icc)}
    return {name: v if math.isfinite(v) else None for name, v in values.items()}


def _shapes(
    found: Found, noises: Noises, x: torch.Tensor, eps: float, alive: np.ndarray, n_structure: int, shown: int, bins: int
) -> None:  # fmt: skip
    """Distributions of activations, and correlations between latents, clean and perturbed."""
    pairs = [
        (noises.sae.encode(part), noises.sae.encode(part + noises.delta("gaussian", part, i * 4096, eps))) for i, part in enumerate(x.split(4096))
    ]
    z, moved = (torch.cat([p[i] for p in pairs]) for i in (0, 1))
    which = np.flatnonzero(alive)
    if len(which) < 2:
        return
    found.put(sci_structure=structure(z, moved, which[np.linspace(0, len(which) - 1, min(n_structure, len(which))).astype(int)]))
    shapes = Distributions(z, moved, which, bins)
    found.put(wasserstein=shapes.wasserstein, zero_mass=shapes.zero_mass)
    found.arrays |= shapes.arrays(found.arrays["rob_fss_latents"], shown)


def _kinds(found: Found, noises: Noises, x: torch.Tensor, eps: float) -> None:
    """Feature change under every kind of noise of one size; the same Gaussian rows too, so that all kinds see the same text."""
    row: list[float] = []
    for kind in TYPES:
        why = noises.why_not(kind)
        value = None if why else _sums_of(kind, noises, x, eps).change()
        found.put(**{f"change_{kind}": value})
        if value is None:
            found.why[f"rob_change_{kind}"] = why or "no latent fires"
        row.append(math.nan if value is None else value)
    found.arrays |= {"rob_kinds": np.array(TYPES), "rob_kind_change": np.array(row)}


def _sums_of(kind: str, noises: Noises, x: torch.Tensor, eps: float) -> Sums:
    sums = Sums(noises.sae.d_sae)
    for i, part in enumerate(x.split(4096)):
        sums.add(noises.sae.encode(part), noises.sae.encode(part + noises.delta(kind, part, i * 4096, eps)))
    return sums


def _curves(found: Found, noises: Noises, bench: Bench, x: torch.Tensor, few: np.ndarray, sizes: Sequence[float]) -> None:
    """FSS, change, SCI, Jaccard index and FVU over sizes for every kind, on the rows ``few`` of x."""
    y = torch.cat([r.y for r in bench.chunks(int(few[-1]) + 1)])[few]
    x = x[few]
    variance = float((y - y.mean(0)).double().square().sum())
    names = ("fss", "change", "sci", "jaccard", "fvu")
    curves = {name: np.full((len(TYPES), len(sizes)), np.nan) for name in names}
    clean = noises.sae.encode(x)
    for i, kind in enumerate(TYPES):
        why = noises.why_not(kind)
        if why:
            found.why |= {f"rob_{k}_{kind}": why for k in ("area", "eps50")}
            continue
        for j, eps in enumerate(sizes):
            moved = x + noises.delta(kind, x, 0, eps)
            codes, sums = noises.sae.encode(moved), Sums(noises.sae.d_sae)
            sums.add(clean, codes)
            error = float((y - noises.sae.reconstruct(moved, codes)).double().square().sum())
            values: dict[str, Any] = sums.summary(sums.alive(10)) | {"fvu": error / variance if variance > 0 else None}
            for name, value in zip(names, (values["fss_pooled"], values["change"], values["sci"], values["jaccard"], values["fvu"]), strict=True):
                curves[name][i, j] = math.nan if value is None else value
        found.put(**{f"area_{kind}": area(sizes, curves["fss"][i]), f"eps50_{kind}": halved(sizes, curves["fss"][i])})
        if kind == "gaussian":
            at = min(range(len(sizes)), key=lambda j: abs(sizes[j] - 0.1))
            found.put(denoised_fvu=float(curves["fvu"][i, at]))
    found.arrays |= {"rob_sizes": np.array(sizes), **{f"rob_curve_{name}": values for name, values in curves.items()}}


def area(sizes: Sequence[float], fss: np.ndarray) -> float | None:
    """Mean of FSS over the logarithm of the sizes above 0 (trapezoids), in [0, 100]."""
    at = [i for i, s in enumerate(sizes) if s > 0 and math.isfinite(fss[i])]
    if len(at) < 2:
        return None
    logs = np.log([sizes[i] for i in at])
    return float(np.trapezoid(fss[at], logs) / (logs[-1] - logs[0]))


def halved(sizes: Sequence[float], fss: np.ndarray) -> float | None:
    """The first size at which FSS is 50, between two measured sizes by a straight line in log size; None if it never is."""
    for i in range(1, len(sizes)):
        if fss[i] <= 50 < fss[i - 1]:
            share = (fss[i - 1] - 50) / (fss[i - 1] - fss[i])
            return float(sizes[i] * share if sizes[i - 1] == 0 else math.exp((1 - share) * math.log(sizes[i - 1]) + share * math.log(sizes[i])))
    return None


def _margins(found: Found, noises: Noises, x: torch.Tensor, eps: float, seed: int) -> None:
    """Certified radii and cross-talk."""
    scale = float(noises.cloud.radius)
    if has_margins(noises.sae):
        distance = radii(noises.sae, x)[2]
        if len(distance):
            found.put(radius=float(distance.median()) / scale, certified=float((distance > eps * scale).float().mean()))
            found.put(radius_confirmed=confirmed(noises.sae, x, 512, seed))
            found.arrays["rob_radii"] = np.quantile((distance / scale).cpu().numpy(), np.linspace(0, 1, 101))
    if not noises.why_not("targeted"):
        found.put(**dict(zip(("crosstalk", "slope"), crosstalk(noises, x, eps), strict=True)))
