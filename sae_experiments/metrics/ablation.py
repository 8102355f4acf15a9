"""Loss of the language model when latents are removed from its activation.

The SAE's reconstruction error stays in the activation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from sae_experiments.metrics.base import (
    EvalContext,
    LMSplice,
    Measured,
    MetricInfo,
    logits_of,
    next_log_probs,
)
from sae_experiments.metrics.codes import NO_TEXT, NOT_FINITE, nulls, sparse_codes
from sae_experiments.metrics.noise import Grouped, noise_of, noise_over, resampled_means
from sae_experiments.models.hooks import Site, joined, patched, prefix_of, resumed
from sae_experiments.models.store import Store
from sae_experiments.sampling import evenly_spaced

LATENT = [
    MetricInfo(
        name="ablate_latent_ce_delta_bits",
        title="a latent's effect",
        formula=(
            "mean over sampled latents of the rise of the cross-entropy where they are active, "
            "when they are removed there"
        ),
        unit="bit/char",
        better="none",
    ),
    MetricInfo(
        name="ablate_latent_kl",
        title="a latent's KL",
        formula="the same for KL(p_clean || p_ablated)",
        unit="nat",
        better="none",
        shown=False,
    ),
]
#: Groups of latents: name -> (kind of group, its index among these, description).
GROUPS = {
    "rare": ("group", 0, "the tenth of the living latents that fires least"),
    "frequent": ("group", -1, "the tenth that fires most"),
    "first_level": ("level", 0, "the first level of a nested dictionary"),
    "last_level": ("level", -1, "its last level"),
}


def _group_infos(group: str) -> list[MetricInfo]:
    title = f"ablate {group.replace('_', ' ')}"
    words = GROUPS[group][-1]
    return [
        MetricInfo(
            name=f"ablate_{group}_ce_delta_bits",
            title=title,
            formula=f"rise of the cross-entropy when {words} is removed",
            unit="bit/char",
            better="none",
            shown=False,
        ),
        MetricInfo(
            name=f"ablate_{group}_kl",
            title=f"{title} (KL)",
            formula=f"KL(p_clean || p_ablated) when {words} is removed",
            unit="nat",
            better="none",
            shown=False,
        ),
    ]


INFO = [*LATENT, *(info for group in GROUPS for info in _group_infos(group))]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the metric."""

    rows: int | None
    """Held-out rows that windows are drawn from, from the first on; None for all."""
    windows: int
    """Number of windows, drawn at random."""
    batch: int
    """Windows per forward pass."""
    latents: int
    """Number of latents removed one by one, evenly spaced by density."""
    per_latent: int
    """Maximum number of windows in which each of these latents is removed."""
    min_fires: int
    """Minimum number of active positions in the windows for such a latent."""
    groups: int
    """Number of quantiles of density, each of which is removed as a whole."""
    mean: bool
    """True: latents are set to their mean value instead of zero."""
    seed: int
    """Seed of the windows."""


class Effect(NamedTuple):
    """Effect of an ablation at every position but the first of each window."""

    ce: Tensor
    """Rise of the cross-entropy in nats, (W, T - 1)."""
    kl: Tensor
    """KL(p_clean || p_ablated) in nats, (W, T - 1)."""


@torch.no_grad()
def measure(ctx: EvalContext, **options: Any) -> Measured:
    """Effect on the language model of removing single latents and groups of latents.

    The activation x is replaced by

        x' = x - (decode(z) - decode(z'))

    with z' the code z without the latents. The effect of a single latent is averaged over the
    positions where it is active, that of a group over all positions. Groups are quantiles of
    density, and the levels of an SAE that has levels. Outlier rows that the fit left out stay as
    they are.

    Args:
        ctx: Evaluation context.
        **options: Fields of `Options`.
    """
    opts = Options(**options)
    lm = ctx.lm
    store = ctx.held_out
    if lm is None or store is None:
        return nulls(INFO, NO_TEXT)
    if not isinstance(ctx.write, Site):
        return nulls(INFO, "the SAE rebuilds several sites at once")
    codes = sparse_codes(ctx, opts.rows)
    if codes is None:
        return nulls(INFO, NOT_FINITE)
    rng = np.random.default_rng(opts.seed)
    n_windows = ctx.n_used(opts.rows) // store.length
    picked = np.sort(rng.choice(n_windows, min(opts.windows, n_windows), replace=False))
    windows = _Windows(ctx, lm, store, ctx.write, codes, picked, opts)
    density = np.asarray(sparse.csr_matrix(codes != 0).mean(0)).ravel()
    single = _single_latents(windows, density, opts, rng)
    groups = _groups(windows, _by_density(density, opts.groups), _levels(ctx), opts.groups)
    return Measured(
        single.scalars | groups.scalars,
        single.arrays | groups.arrays,
        single.why_null | groups.why_null,
        single.noise | groups.noise,
    )


def _single_latents(
    windows: _Windows, density: np.ndarray, opts: Options, rng: np.random.Generator
) -> Measured:
    """Effects of single latents, each removed in some of the windows where it is active."""
    on = windows.z != 0
    n_active = on[:, 1:].sum((0, 1)).numpy()
    candidates = np.flatnonzero(n_active >= opts.min_fires)
    n_windows = len(windows.x)
    if not len(candidates):
        return nulls(LATENT, f"no latent is active {opts.min_fires} times in {n_windows} windows")
    by_density = candidates[np.argsort(density[candidates], kind="stable")]
    sample = evenly_spaced(by_density, opts.latents)
    effects = []
    ce_parts = []
    kl_parts = []
    for latent in sample.tolist():
        active = on[:, :, latent]
        active_windows = np.flatnonzero(active[:, 1:].any(1).numpy())
        removed_in = np.sort(rng.permutation(active_windows)[: opts.per_latent])
        effect = windows.ablate(np.array([latent]), removed_in)
        positions = active[removed_in][:, 1:]
        window = np.repeat(removed_in[:, None], positions.shape[1], 1)[positions.numpy()]
        bits = effect.ce / math.log(2)
        ce_parts.append(Grouped(bits[positions].double().numpy(), window))
        kl_parts.append(Grouped(effect.kl[positions].double().numpy(), window))
        mean_bits = float(effect.ce[positions].mean()) / math.log(2)
        effects.append((mean_bits, float(effect.kl[positions].mean())))
    columns = np.array(effects)
    arrays = {"ablate_latents": sample, "ablate_latent_density": density[sample]}
    values: dict[str, float | None] = {}
    noise = {}
    for i, (info, parts) in enumerate(zip(LATENT, (ce_parts, kl_parts), strict=True)):
        values[info.name] = columns.mean(0).tolist()[i]
        arrays[f"{info.name}_each"] = columns[:, i]
        if n_windows > 1:
            noise[info.name] = noise_over(resampled_means(parts, n_windows))
    return Measured(values, arrays, noise=noise)


def _by_density(density: np.ndarray, n: int) -> list[np.ndarray]:
    """Latents that fire, in `n` quantiles of density; empty if there are fewer latents."""
    alive = np.flatnonzero(density)
    if len(alive) < n:
        return []
    return np.array_split(alive[np.argsort(density[alive], kind="stable")], n)


def _levels(ctx: EvalContext) -> list[np.ndarray]:
    """Latents of each level of a nested SAE; empty for any other."""
    if ctx.sae.level_of_latent is None:
        return []
    level = ctx.sae.level_of_latent.cpu().numpy()
    return [np.flatnonzero(level == number) for number in np.unique(level)]


def _groups(
    windows: _Windows,
    by_density: Sequence[np.ndarray],
    levels: Sequence[np.ndarray],
    n_groups: int,
) -> Measured:
    """Effects of removing each quantile of density and each level."""
    effects = {
        "group": [windows.ablate(latents) for latents in by_density],
        "level": [windows.ablate(latents) for latents in levels],
    }
    reasons = {
        "group": f"fewer than {n_groups} latents are alive",
        "level": "the SAE has no levels",
    }
    values: dict[str, float | None] = {}
    why_null = {}
    noise = {}
    for name, (kind, index, _) in GROUPS.items():
        ce = f"ablate_{name}_ce_delta_bits"
        kl = f"ablate_{name}_kl"
        if not effects[kind]:
            values |= {ce: None, kl: None}
            why_null |= {ce: reasons[kind], kl: reasons[kind]}
            continue
        effect = effects[kind][index]
        values[ce] = float(effect.ce.mean()) / math.log(2)
        values[kl] = float(effect.kl.mean())
        noise[ce] = _noise(effect.ce) / math.log(2)
        noise[kl] = _noise(effect.kl)
    arrays = {}
    for kind, of_kind in effects.items():
        bits = [float(effect.ce.mean()) / math.log(2) for effect in of_kind]
        arrays[f"ablate_{kind}_ce_delta_bits"] = np.array(bits)
        arrays[f"ablate_{kind}_kl"] = np.array([float(effect.kl.mean()) for effect in of_kind])
    return Measured(values, arrays, why_null, noise)


def _noise(per_position: Tensor) -> float:
    """Standard error over resampled windows of the mean over positions (W, T)."""
    n_windows, n_positions = per_position.shape
    sums = {
        "sum": per_position.double().sum(1).numpy(),
        "n": np.full(n_windows, n_positions, float),
    }
    return noise_of(sums, lambda totals: totals["sum"] / totals["n"])


class _Windows:
    """Windows of held-out text with codes and the clean model's log-probabilities.

    Args:
        ctx: Evaluation context.
        lm: Its language model.
        store: Its held-out activations.
        site: The activation that the SAE reconstructs.
        codes: Codes of the held-out rows, (N, F).
        picked: Numbers of the windows, (W,).
        opts: Options of the metric.
    """

    def __init__(
        self,
        ctx: EvalContext,
        lm: LMSplice,
        store: Store,
        site: Site,
        codes: sparse.csr_matrix,
        picked: np.ndarray,
        opts: Options,
    ) -> None:
        self.sae = ctx.sae
        self.device = ctx.device
        self.lm = lm
        self.site = site
        self.batch = ctx.windows_per_pass(opts.batch)
        # Token ids and next token ids, (W, T) each.
        self.x, self.y = lm.tokens(store.starts[picked])
        # Codes, (W, T, F).
        rows = (picked[:, None] * store.length + np.arange(store.length)).reshape(-1)
        self.z = torch.from_numpy(codes[rows].toarray()).view(len(picked), store.length, -1)
        inputs = store.rows(ctx.read_sites, rows).to(ctx.device)
        # Rows that an ablation changes, (W, T, 1): the ordinary ones. No latent counts as active
        # in the others.
        self.changed = torch.ones(*self.x.shape, 1, dtype=torch.bool)
        ordinary = ctx.replaced(inputs)
        if ordinary is not None:
            self.changed = ordinary.view(self.changed.shape).cpu()
            self.z.masked_fill_(~self.changed, 0)
        # Factors of the decoded codes, (W, T, 1); None for 1.
        scale = ctx.sae.output_scale(inputs)
        self.scale = None if scale is None else scale.view(len(picked), store.length, 1)
        # Value of each latent when it is removed, (F,).
        means = np.asarray(codes.mean(0), np.float32).ravel()
        self.replacement = torch.from_numpy(means * opts.mean)
        # Log-probabilities at all positions but the first, (W, T - 1, V).
        with prefix_of(lm.model, [site]) as prefixes:
            self.clean = torch.cat([self._log_probs(x) for x in self.x.split(self.batch)])
        self.prefix = joined(prefixes)

    def ablate(self, latents: np.ndarray, windows: np.ndarray | None = None) -> Effect:
        """Effect of removing `latents` everywhere in some windows (None: all)."""
        if windows is None:
            windows = np.arange(len(self.x))
        ces = []
        kls = []
        for begin in range(0, len(windows), self.batch):
            part = torch.from_numpy(windows[begin : begin + self.batch])
            acts = self.z[part].flatten(0, 1)
            whole = self.sae.decode(acts.to(self.device))
            acts[:, latents] = self.replacement[latents]
            change = whole - self.sae.decode(acts.to(self.device))
            change = change.view(len(part), self.z.shape[1], -1)
            if self.scale is not None:
                change = change * self.scale[part]
            change = change.masked_fill(~self.changed[part].to(change.device), 0)
            remove = patched(
                self.lm.model, self.site, lambda a, change=change: a - change.to(a.dtype)
            )
            with resumed(self.lm.model, self.prefix.part(part)), remove:
                log_p = self._log_probs(self.x[part])
            clean = self.clean[part]
            targets = self.y[part, 1:, None]
            ces.append((clean - log_p).gather(2, targets).squeeze(2))
            kls.append(F.kl_div(log_p, clean, log_target=True, reduction="none").sum(2))
        return Effect(torch.cat(ces), torch.cat(kls))

    def _log_probs(self, x: Tensor) -> Tensor:
        return next_log_probs(logits_of(self.lm.model, x.to(self.device))).cpu()
