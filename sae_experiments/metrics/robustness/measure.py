"""Change of a code when its input is perturbed: sizes and kinds of noise, folds of the text.

Noise acts on the input, never on the code. R is the mean distance of the rows from their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from sae_experiments.metric_info import Better
from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.metrics.codes import NOT_FINITE, nulls, ordinary_rows, raw_rows
from sae_experiments.metrics.noise import noise_of
from sae_experiments.metrics.robustness import curves
from sae_experiments.metrics.robustness.margins import (
    NO_CLOSED_FORM,
    confirmed,
    crosstalk,
    has_margins,
    radii,
)
from sae_experiments.metrics.robustness.noise import (
    CHUNK,
    NO_INPUT,
    NO_MODEL,
    NoiseSource,
    other_texts,
)
from sae_experiments.metrics.robustness.sums import Distributions, Sums, structure
from sae_experiments.metrics.robustness.text import denoising, seeds_agree
from sae_experiments.saes.purified.perturb import TYPES, NoiseModel
from sae_experiments.saes.purified.sae import Purified
from sae_experiments.sampling import spread, spread_rows

#: Rows per window where the rows are no text.
WINDOW_WITHOUT_TEXT = 128
#: Pairs (row, latent) whose certified radius is tried.
CONFIRMED_PAIRS = 512
#: Bootstrap samples of the documents.
BOOTSTRAP = 1000


def _info(
    name: str,
    title: str,
    formula: str,
    better: Better = "none",
    unit: str = "",
    shown: bool = False,
) -> MetricInfo:
    return MetricInfo(
        name=f"rob_{name}", title=title, formula=formula, unit=unit, better=better, shown=shown
    )


#: Gaussian noise of size eps R on all rows.
GAUSSIAN = [
    _info(
        "change",
        "feature change",
        "100 sum |z~ - z| / sum |z|, Gaussian noise of size eps R, R = mean ||x - mean x||",
        "down",
        "%",
        shown=True,
    ),
    _info(
        "change_mean",
        "feature change (mean)",
        "mean over alive latents of 100 sum_b |z~ - z| / sum_b |z|",
        "down",
        "%",
    ),
    _info(
        "fss",
        "FSS",
        "median over alive latents of 100 (1 - sum_b |z~ - z| / sum_b (|z~| + |z|))",
        "up",
        shown=True,
    ),
    _info("fss_pooled", "FSS (pooled)", "the same with sums over all latents", "up"),
    _info("fss_p5", "FSS (5 %)", "5th percentile of FSS over alive latents", "up"),
    _info(
        "sci",
        "SCI",
        "mean over alive latents of Pearson's r between z and z~",
        "up",
        shown=True,
    ),
    _info("sci_token", "SCI (token)", "mean over rows of the cosine of z and z~", "up"),
    _info(
        "sci_structure",
        "SCI (structure)",
        "Pearson's r between the correlations of pairs of latents, clean and perturbed",
        "up",
    ),
    _info(
        "sci_skipped",
        "SCI skipped",
        "alive latents without variance, which have no r",
        unit="latents",
    ),
    _info("jaccard", "Jaccard", "mean over rows of |S and S~| / |S or S~|", "up"),
    _info("flips", "flips", "latents that go on or off, of 1000", "down", "per 1000"),
    _info(
        "flip_share",
        "share of flips",
        "part of sum |z~ - z| that belongs to latents which went on or off",
    ),
]
#: Margins, reconstruction and the language model, distributions.
MARGINS_AND_MODEL = [
    _info(
        "radius",
        "certified radius",
        "median over active latents of the distance to the nearest input that turns them off, "
        "over R",
        "up",
        "R",
    ),
    _info("certified", "certified", "share of active latents with a radius above eps R", "up"),
    _info(
        "radius_confirmed",
        "radius confirmed",
        "share of radii that hold by trial (1 unless the formula is wrong)",
        "target",
    ),
    _info(
        "crosstalk",
        "cross-talk",
        "median of sum_{l != i} (dz_l ||d_l||)^2 / (dz_i ||d_i||)^2 after a step along d_i, "
        "i active",
        "down",
    ),
    _info(
        "slope",
        "own slope",
        "mean dz_i ||d_i|| over the length of that step (ideal 1)",
        "target",
    ),
    _info(
        "denoised_fvu",
        "FVU under noise",
        "sum ||y - yhat(x~)||^2 / sum ||y - mean y||^2",
        "down",
    ),
    _info(
        "noise_ce_bits",
        "noise delta CE",
        "cross-entropy with x~ in place of x, minus clean",
        unit="bit",
    ),
    _info(
        "denoised_ce_bits",
        "denoised delta CE",
        "cross-entropy with yhat(x~) in place of x, minus clean",
        "down",
        "bit",
    ),
    _info("wasserstein", "Wasserstein", "mean over alive latents of W1(z, z~) / mean |z|", "down"),
    _info(
        "zero_mass",
        "zero mass",
        "mean over alive latents of the change in how often they are off, P(z~ = 0) - P(z = 0)",
    ),
]
#: Agreement between folds of the text and between seeds, and noise from changed text.
AGREEMENT = [
    _info(
        "fold_sd",
        "fold sd",
        "mean over latents of the standard deviation of FSS between folds of the documents",
        "down",
    ),
    _info(
        "fold_rank",
        "fold rank",
        "mean Spearman correlation of FSS over latents between two folds",
        "up",
    ),
    _info("fold_icc", "fold ICC", "ICC(2,1) of FSS: latents x folds", "up"),
    _info(
        "seed_rank",
        "seed rank",
        "Spearman correlation of FSS between latents matched one to one with another seed's "
        "(cosine > 0.7)",
        "up",
    ),
    _info("seed_matched", "seed matched", "alive latents matched so, as a share", "up"),
    _info(
        "token_size",
        "size of a token change",
        "mean ||x~ - x|| / R where earlier characters were replaced, unscaled",
        unit="R",
    ),
    _info(
        "token_change",
        "change by token",
        "feature change under that unscaled noise",
        "down",
        "%",
    ),
]
#: Every kind of noise.
KINDS = [
    *(
        _info(
            f"change_{kind}",
            f"change, {kind}",
            f"feature change under {kind} noise of size eps R",
            "down",
            "%",
        )
        for kind in TYPES
    ),
    *(
        _info(
            f"area_{kind}",
            f"area, {kind}",
            "area under pooled FSS over log eps, of 100",
            "up",
        )
        for kind in TYPES
    ),
    *(
        _info(
            f"eps50_{kind}",
            f"eps50, {kind}",
            "size at which pooled FSS falls to 50",
            "up",
            "R",
        )
        for kind in TYPES
    ),
]
INFO = [*GAUSSIAN, *MARGINS_AND_MODEL, *AGREEMENT, *KINDS]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the metric."""

    eps: float
    """Size of the noise in units of R."""
    rows: int | None
    """Held-out rows under Gaussian noise, from the first (None: all)."""
    draws: int
    """Draws of Gaussian noise per row."""
    min_fires: int
    """Minimum firings per draw for a latent to count as alive."""
    type_rows: int
    """Rows under each other kind of noise."""
    curve_rows: int
    """Rows of each point of the curves."""
    sizes: Sequence[float]
    """Sizes of the curves in units of R, ascending."""
    attack_steps: int
    """Steps of `pgd`."""
    folds: int
    """Folds of the documents between which FSS is compared."""
    block: int
    """Windows per document."""
    structure_latents: int
    """Latents whose correlations with each other are compared."""
    shown_latents: int
    """Latents with a stored histogram."""
    bins: int
    """Bins per histogram."""
    margin_rows: int
    """Rows whose certified radii and cross-talk are measured."""
    token_share: float
    """Share of the characters that are replaced for token noise."""
    windows: int
    """Held-out windows that the language model reads with noise in them."""
    match: int
    """Largest number of latents matched with another seed's (the cost is cubic in it)."""
    seed: int
    """Seed of the noise and of all samples."""


@torch.no_grad()
def measure(ctx: EvalContext, **options: Any) -> Measured:
    """Stability of codes under perturbations of the input.

    Gaussian noise acts on `rows` rows, the other kinds on `type_rows`. A kind that is impossible
    (without text, or for a transcoder) is null with its reason; everything is null if a code is not
    finite.

    Args:
        ctx: The SAE and its held-out rows.
        **options: Fields of `Options`.
    """
    opts = Options(**options)
    sae = ctx.sae.eval()
    x = torch.from_numpy(raw_rows(ctx, opts.rows)).to(ctx.device)
    if not bool(torch.isfinite(x).all()) or not bool(torch.isfinite(sae.encode(x[:CHUNK])).all()):
        return nulls(INFO, NOT_FINITE)
    cloud = NoiseModel(sae.d_in).to(ctx.device).learn(x)
    if not float(cloud.radius) > 0:
        return nulls(INFO, "the held-out rows do not vary")
    ordinary = ordinary_rows(ctx, len(x))
    alt = other_texts(ctx, min(opts.type_rows, len(x)), opts.token_share, opts.seed)
    if alt is not None:
        alt = _without_outliers(ctx, x, ordinary, alt)
    noises = NoiseSource(
        sae=sae, cloud=cloud, attack_steps=opts.attack_steps, seed=opts.seed, alt=alt
    )
    window = WINDOW_WITHOUT_TEXT if ctx.held_out is None else ctx.held_out.length
    results = Results()
    total = _gaussian(results, noises, x, window * opts.block, opts)
    alive = total.alive(opts.min_fires * opts.draws)
    type_rows = x[: opts.type_rows]
    _distributions(results, noises, type_rows, alive, opts)
    _kinds(results, noises, type_rows, opts.eps)
    _curves(results, noises, ctx, type_rows, np.flatnonzero(ordinary[: len(type_rows)]), opts)
    _margins(results, noises, spread_rows(x, opts.margin_rows), opts)
    _token_change(results, noises, x)
    rise = denoising(ctx, cloud, opts.eps, opts.windows, opts.seed)
    results.put(noise_ce_bits=rise.noisy, denoised_ce_bits=rise.denoised)
    results.put(**seeds_agree(ctx, noises, x, total, opts.eps, opts.min_fires, opts.match))
    if isinstance(sae, Purified):
        results.arrays["rob_eps_trace"] = sae.eps_trace.cpu().numpy()
    return results.measured()


def _without_outliers(ctx: EvalContext, x: Tensor, ordinary: np.ndarray, alt: Tensor) -> Tensor:
    """Rows of changed text; those that are outliers, before or after the change, are unchanged.

    Args:
        ctx: The SAE and its held-out rows.
        x: Rows of the text as it is, (N, D), without outliers.
        ordinary: Mask (N,) of the rows that are not outliers.
        alt: The first rows with the text changed, (M, D).
    """
    kept = torch.from_numpy(ordinary[: len(alt)]).to(alt.device)
    inside = ctx.replaced(alt)
    if inside is not None:
        kept = kept & inside
    return torch.where(kept[:, None], alt, x[: len(alt)])


class Results:
    """Collected values and arrays; metrics without a value become null with a reason."""

    def __init__(self) -> None:
        self.scalars: dict[str, float | None] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.noise: dict[str, float] = {}
        self.why: dict[str, str] = {}

    def put(self, **values: float | None) -> None:
        """Add values by metric name without its prefix."""
        self.scalars |= {f"rob_{name}": value for name, value in values.items()}

    def measured(self) -> Measured:
        """All metrics of `INFO`."""
        scalars = {info.name: self.scalars.get(info.name) for info in INFO}
        why = {}
        for name, value in scalars.items():
            if value is None:
                why[name] = self.why.get(name) or _why_null(name)
        return Measured(scalars, self.arrays, why, self.noise)


def _why_null(name: str) -> str:
    """Reason for a metric without a value and without a reason of its own."""
    if name.startswith(("rob_radius", "rob_certified")):
        return NO_CLOSED_FORM
    if name.startswith("rob_seed"):
        return "there is no fit from another seed, or too few of its latents match"
    if name.startswith("rob_eps50"):
        return "FSS stays above 50 at every size"
    if "token" in name or name.endswith("ce_bits"):
        return NO_MODEL
    if "targeted" in name or name in ("rob_crosstalk", "rob_slope"):
        return NO_INPUT
    return "too few latents fire often enough"


# ---------------------------------------------------------------------------------- Gaussian noise


def _gaussian(
    results: Results, noises: NoiseSource, x: Tensor, document: int, opts: Options
) -> Sums:
    """Measure stability under Gaussian noise per latent, per row and per fold of the text.

    Args:
        results: Collects the values.
        noises: Noise for the rows.
        x: Held-out rows, (N, D).
        document: Rows per document.
        opts: Options of the metric.

    Returns:
        Sums over all rows and draws.
    """
    sae = noises.sae
    total = Sums(sae.d_sae)
    whole_documents = max(1, CHUNK // document) * document
    by_draw = []
    for draw in range(opts.draws):
        pairs = noises.pairs("gaussian", x, opts.eps, draw=draw, size=whole_documents)
        parts = []
        for clean_rows, perturbed_rows in pairs:
            clean, perturbed = sae.encode(clean_rows), sae.encode(perturbed_rows)
            total.add(clean, perturbed)
            parts.append(_document_sums(clean, perturbed, document))
        by_draw.append(np.concatenate(parts))
    by_document = np.sum(by_draw, 0)
    alive = total.alive(opts.min_fires * opts.draws)
    results.put(**total.summary(alive))
    results.arrays["rob_fss_latents"] = np.where(alive, total.fss(), np.nan)
    results.arrays["rob_change_latents"] = np.where(alive, total.latent_change(), np.nan)
    if len(by_document) > 1:
        results.noise |= _document_noise(by_document, opts.seed)
    if len(by_document) >= opts.folds > 1 and alive.sum() > 2:
        table = _fold_fss(by_document[:, :, alive], opts.folds)
        results.put(**_agreement(table))
        results.arrays["rob_fold_fss"] = table.astype(np.float32)
    return total


def _document_sums(clean: Tensor, perturbed: Tensor, document: int) -> np.ndarray:
    """Sums of |z~ - z|, |z| and |z~| + |z| within documents, (documents, 3, F) float64.

    Args:
        clean: Codes, (B, F).
        perturbed: Codes of the same rows under noise, (B, F).
        document: Rows per document.
    """
    sums = []
    for z, moved in zip(clean.split(document), perturbed.split(document), strict=True):
        parts = [(moved - z).abs(), z.abs(), moved.abs() + z.abs()]
        sums.append(torch.stack([p.sum(0) for p in parts]).double().cpu().numpy())
    return np.stack(sums)


def _document_noise(by_document: np.ndarray, seed: int) -> dict[str, float]:
    """Standard errors over resampled documents, from sums (documents, 3, F)."""
    moved, mass, both = by_document.sum(2).T
    if not (mass > 0).all():
        return {}
    sums = {"moved": moved, "mass": mass, "both": both}
    formulas = {
        "rob_change": lambda s: 100 * s["moved"] / s["mass"],
        "rob_fss_pooled": lambda s: 100 * (1 - s["moved"] / s["both"]),
    }
    return {
        name: noise_of(sums, formula, draws=BOOTSTRAP, seed=seed)
        for name, formula in formulas.items()
    }


def _fold_fss(by_document: np.ndarray, folds: int) -> np.ndarray:
    """FSS (latents, folds) from sums per document (documents, 3, latents).

    A fold is every n-th document, for n folds. Latents that are silent in a fold are left out.
    """
    sums = np.stack([by_document[i::folds].sum(0) for i in range(folds)])
    moved, both = sums[:, 0], sums[:, 2]
    fss = 100 * (1 - moved / np.maximum(both, 1e-300))
    return fss[:, (both > 0).all(0)].T


def _agreement(table: np.ndarray) -> dict[str, float | None]:
    """Agreement of folds about latents.

    Args:
        table: FSS, (latents, folds).

    Returns:
        The standard deviation between folds, the Spearman correlation of two folds and ICC(2,1)
        (Shrout and Fleiss 1979); empty for fewer than three latents.
    """
    n, k = table.shape
    if n < 3:
        return {}
    ranks = np.apply_along_axis(rankdata, 0, table)
    rank_correlation = math.nan
    if (ranks.std(0) > 0).all():
        rank_correlation = float(np.corrcoef(ranks.T)[np.triu_indices(k, 1)].mean())
    grand = table.mean()
    latent_means = table.mean(1, keepdims=True)
    fold_means = table.mean(0)
    latent_square = k * ((latent_means - grand) ** 2).sum() / (n - 1)
    fold_square = n * ((fold_means - grand) ** 2).sum() / (k - 1)
    residual = table - latent_means - fold_means + grand
    error_square = (residual**2).sum() / ((n - 1) * (k - 1))
    scale = latent_square + (k - 1) * error_square + k * (fold_square - error_square) / n
    values = {
        "fold_sd": float(table.std(1, ddof=1).mean()),
        "fold_rank": rank_correlation,
        "fold_icc": float((latent_square - error_square) / scale) if scale > 0 else math.nan,
    }
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _distributions(
    results: Results, noises: NoiseSource, x: Tensor, alive: np.ndarray, opts: Options
) -> None:
    """Compare distributions of activations and correlations between latents.

    Args:
        results: Collects the values; already holds FSS per latent.
        noises: Noise for the rows.
        x: Rows, (N, D).
        alive: Mask of the latents compared, (F,).
        opts: Options of the metric.
    """
    sae = noises.sae
    codes = []
    for clean_rows, perturbed_rows in noises.pairs("gaussian", x, opts.eps):
        codes.append((sae.encode(clean_rows), sae.encode(perturbed_rows)))
    clean = torch.cat([z for z, _ in codes])
    perturbed = torch.cat([moved for _, moved in codes])
    latents = np.flatnonzero(alive)
    if len(latents) < 2:
        return
    n_paired = min(opts.structure_latents, len(latents))
    paired = latents[np.linspace(0, len(latents) - 1, n_paired).astype(int)]
    results.put(sci_structure=structure(clean, perturbed, paired))
    distributions = Distributions(clean, perturbed, latents, opts.bins)
    results.put(wasserstein=distributions.wasserstein, zero_mass=distributions.zero_mass)
    fss = results.arrays["rob_fss_latents"]
    results.arrays |= distributions.arrays(fss, opts.shown_latents)


# ---------------------------------------------------------------------------------- kinds of noise


def _kinds(results: Results, noises: NoiseSource, x: Tensor, eps: float) -> None:
    """Measure feature change under every kind of noise of one size.

    Gaussian noise is measured again, so that all kinds see the same rows `x` (N, D).
    """
    changes: list[float] = []
    for kind in TYPES:
        why = noises.why_not(kind)
        change = None if why else noises.sums(kind, x, eps).change()
        results.put(**{f"change_{kind}": change})
        if change is None:
            results.why[f"rob_change_{kind}"] = why or "no latent fires"
        changes.append(math.nan if change is None else change)
    results.arrays["rob_kinds"] = np.array(TYPES)
    results.arrays["rob_kind_change"] = np.array(changes)


def _curves(
    results: Results,
    noises: NoiseSource,
    ctx: EvalContext,
    x: Tensor,
    ordinary: np.ndarray,
    opts: Options,
) -> None:
    """Measure stability over the size of the noise.

    Args:
        results: Collects the values.
        noises: Noise for the rows.
        ctx: The SAE and its held-out rows.
        x: Held-out rows from the first, (N, D).
        ordinary: Indices of the rows from which the sample is drawn.
        opts: Options of the metric.
    """
    sample = ordinary[spread(len(ordinary), opts.curve_rows)]
    if noises.alt is not None:
        noises = replace(noises, alt=noises.alt[sample])
    y = torch.cat([r.y for r in ctx.chunks(int(sample[-1]) + 1)])[sample]
    rows = curves.CurveRows(x[sample], y, noises.sae.encode(x[sample]))
    values = np.full((len(TYPES), len(curves.NAMES), len(opts.sizes)), np.nan)
    for i, kind in enumerate(TYPES):
        why = noises.why_not(kind)
        if why:
            results.why |= {f"rob_area_{kind}": why, f"rob_eps50_{kind}": why}
            continue
        values[i] = curves.curve(noises, kind, rows, opts.sizes)
        fss = values[i, curves.NAMES.index("fss")]
        area, eps50 = curves.area(opts.sizes, fss), curves.size_at_half(opts.sizes, fss)
        results.put(**{f"area_{kind}": area, f"eps50_{kind}": eps50})
    gaussian = curves.curve(noises, "gaussian", rows, [opts.eps])
    fvu = float(gaussian[curves.NAMES.index("fvu"), 0])
    results.put(denoised_fvu=fvu if math.isfinite(fvu) else None)
    results.why["rob_denoised_fvu"] = "the rows of the curves do not vary"
    results.arrays["rob_sizes"] = np.array(opts.sizes)
    for i, name in enumerate(curves.NAMES):
        results.arrays[f"rob_curve_{name}"] = values[:, i]


def _token_change(results: Results, noises: NoiseSource, x: Tensor) -> None:
    """Measure the effect of changed text as it is, without scaling it to one size."""
    if noises.alt is None:
        return
    clean = x[: len(noises.alt)]
    size = (noises.alt - clean).norm(dim=1)
    changed = size > 0
    if bool(changed.any()):
        results.put(token_size=float(size[changed].mean() / noises.cloud.radius))
    sums = Sums(noises.sae.d_sae)
    sums.add(noises.sae.encode(clean), noises.sae.encode(noises.alt))
    results.put(token_change=sums.change())


def _margins(results: Results, noises: NoiseSource, x: Tensor, opts: Options) -> None:
    """Measure certified radii and cross-talk on rows (N, D)."""
    scale = float(noises.cloud.radius)
    if has_margins(noises.sae):
        distance = radii(noises.sae, x)[2]
        if len(distance):
            results.put(
                radius=float(distance.median()) / scale,
                certified=float((distance > opts.eps * scale).float().mean()),
                radius_confirmed=confirmed(noises.sae, x, CONFIRMED_PAIRS, opts.seed),
            )
            in_units_of_r = (distance / scale).cpu().numpy()
            results.arrays["rob_radii"] = np.quantile(in_units_of_r, np.linspace(0, 1, 101))
    if not noises.why_not("targeted"):
        ratio, slope = crosstalk(noises, x, opts.eps)
        results.put(crosstalk=ratio, slope=slope)
