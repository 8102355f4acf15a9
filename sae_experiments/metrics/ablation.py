"""What the language model loses when a latent, or a group of them, is taken out of its activation while the SAE's error stays in."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import NO_TEXT, NOT_FINITE, nulls, sparse_codes
from sae_experiments.metrics.noise import Grouped, noise_of, noise_over, resampled_means
from sae_experiments.models.hooks import patched

LATENT = [
    MetricInfo(
        name="ablate_latent_ce_delta_bits",
        title="a latent's effect",
        formula="mean over sampled latents of the rise of the cross-entropy where they are active, when they are removed there",
        unit="bit/char",
        better="none",
    ),
    MetricInfo(
        name="ablate_latent_kl", title="a latent's KL", formula="the same for KL(p_clean || p_ablated)", unit="nat", better="none", shown=False
    ),
]
GROUPS = {
    "rare": "the tenth of the living latents that fires least",
    "frequent": "the tenth that fires most",
    "first_level": "the first level of a nested dictionary",
    "last_level": "its last level",
}
INFO = [
    *LATENT,
    *(
        MetricInfo(
            name=f"ablate_{group}_{what}",
            title=f"ablate {group.replace('_', ' ')}{'' if 'ce' in what else ' (KL)'}",
            formula=f"{'rise of the cross-entropy' if 'ce' in what else 'KL(p_clean || p_ablated)'} when {words} is removed",
            unit=unit,
            better="none",
            shown=False,
        )
        for group, words in GROUPS.items()
        for what, unit in (("ce_delta_bits", "bit/char"), ("kl", "nat"))
    ),
]


class Effect(NamedTuple):
    """Rise of the cross-entropy in nats and KL at every position but the first of each window, (W, T - 1)."""

    ce: Tensor
    kl: Tensor


@torch.no_grad()
def measure(
    bench: Bench, *, rows: int | None, windows: int, batch: int, latents: int, per_latent: int, least: int, groups: int, mean: bool, seed: int
) -> Measured:
    """``x' = x - (decode(z) - decode(z'))`` with z' the code without the latents (``mean``: with their mean value instead).

    On ``windows`` windows drawn at random from the first ``rows`` held-out rows. Latents are sampled evenly by density among those active ``least`` times there; each is
    removed in at most ``per_latent`` of them, and its effect averaged over the positions where it was active. Groups are ``groups`` quantiles
    of density, and the levels of an SAE whose latents have such (``sae.group``); their effect is averaged over all positions.
    """
    if bench.lm is None or bench.held_out is None:
        return nulls(INFO, NO_TEXT)
    if not hasattr(bench.write, "stream"):
        return nulls(INFO, "the SAE rebuilds several sites at once")
    codes = sparse_codes(bench, rows)
    if codes is None:
        return nulls(INFO, NOT_FINITE)
    store, chance = bench.held_out, np.random.default_rng(seed)
    there = codes.shape[0] // store.length
    picked = np.sort(chance.choice(there, min(windows, there), replace=False))
    world = _World(bench, codes, picked, batch, mean)
    density = np.asarray((codes != 0).mean(0)).ravel()
    values, arrays, why, noise = _latents(world, density, latents, per_latent, least, chance)
    alive = np.flatnonzero(density)
    by_density = np.array_split(alive[np.argsort(density[alive], kind="stable")], groups) if len(alive) >= groups else []
    levels = _levels(bench)
    found = {"group": [world.ablate(g, None) for g in by_density], "level": [world.ablate(g, None) for g in levels]}
    reasons = {"group": f"fewer than {groups} latents are alive", "level": "the SAE has no levels"}
    for name, (kind, which) in {"rare": ("group", 0), "frequent": ("group", -1), "first_level": ("level", 0), "last_level": ("level", -1)}.items():
        ce, kl = f"ablate_{name}_ce_delta_bits", f"ablate_{name}_kl"
        if not found[kind]:
            values[ce] = values[kl] = None
            why[ce] = why[kl] = reasons[kind]
            continue
        effect = found[kind][which]
        values[ce], values[kl] = float(effect.ce.mean()) / math.log(2), float(effect.kl.mean())
        noise[ce], noise[kl] = _noise(effect.ce) / math.log(2), _noise(effect.kl)
    for kind, effects in found.items():
        arrays[f"ablate_{kind}_ce_delta_bits"] = np.array([float(e.ce.mean()) / math.log(2) for e in effects])
        arrays[f"ablate_{kind}_kl"] = np.array([float(e.kl.mean()) for e in effects])
    return Measured(values, arrays, why, noise)


def _noise(per_position: Tensor) -> float:
    """Standard error of a mean over positions, by resampling windows."""
    sums = {"sum": per_position.double().sum(1).numpy(), "n": np.full(len(per_position), per_position.shape[1], float)}
    return noise_of(sums, lambda s: s["sum"] / s["n"], draws=200, seed=0)


def _levels(bench: Bench) -> list[np.ndarray]:
    group = getattr(bench.sae, "group", None)
    if not isinstance(group, Tensor) or group.shape != (bench.sae.d_sae,):
        return []
    of = group.cpu().numpy()
    return [np.flatnonzero(of == g) for g in np.unique(of)]


def _latents(world: _World, density: np.ndarray, latents: int, per_latent: int, least: int, chance: np.random.Generator):
    """Effects of single latents, each in some of the windows where it is active."""
    on = world.z != 0
    enough = np.flatnonzero(on[:, 1:].sum((0, 1)).numpy() >= least)
    names = [i.name for i in LATENT]
    if not len(enough):
        return dict.fromkeys(names), {}, dict.fromkeys(names, f"no latent is active {least} times in {len(world.x)} windows"), {}
    ranked = enough[np.argsort(density[enough], kind="stable")]
    sample = ranked[np.unique(np.linspace(0, len(ranked) - 1, min(latents, len(ranked))).round().astype(int))]
    rows, parts = [], []
    for j in sample.tolist():
        active = on[:, :, j]
        where = chance.permutation(np.flatnonzero(active[:, 1:].any(1).numpy()))[:per_latent]
        effect = world.ablate(np.array([j]), np.sort(where))
        at = active[np.sort(where)][:, 1:]
        window = np.repeat(np.sort(where)[:, None], at.shape[1], 1)[at.numpy()]
        parts.append([Grouped(e[at].double().numpy(), window) for e in (effect.ce / math.log(2), effect.kl)])
        rows.append((float(effect.ce[at].mean()) / math.log(2), float(effect.kl[at].mean())))
    columns = np.array(rows)
    values = dict(zip(names, columns.mean(0).tolist(), strict=True))
    noise = {name: noise_over(resampled_means(part, len(world.x))) for name, part in zip(names, zip(*parts, strict=True), strict=True)}
    noise = noise if len(world.x) > 1 else {}
    arrays = {"ablate_latents": sample, "ablate_latent_density": density[sample]} | dict(zip((f"{n}_each" for n in names), columns.T, strict=True))
    return values, arrays, {}, noise


class _World:
    """Some held-out windows: their text, codes (W, T, F) and clean log-probabilities."""

    def __init__(self, bench: Bench, codes, picked: np.ndarray, batch: int, mean: bool) -> None:
        store = bench.held_out
        self.bench, self.batch = bench, batch
        self.x, self.y = bench.lm.tokens(store.starts[picked])
        rows = (picked[:, None] * store.length + np.arange(store.length)).reshape(-1)
        self.z = torch.from_numpy(codes[rows].toarray()).view(len(picked), store.length, -1)
        self.instead = torch.from_numpy(np.asarray(codes.mean(0), np.float32).ravel() * mean)
        self.clean = torch.cat([self._log_probs(x) for x in self.x.split(batch)])

    def _log_probs(self, x: Tensor) -> Tensor:
        logits = self.bench.lm.model(input_ids=x.to(self.bench.device), use_cache=False).logits[:, 1:]
        return logits.float().log_softmax(-1).cpu()

    def ablate(self, latents: np.ndarray, windows: np.ndarray | None) -> Effect:
        """Effect of removing ``latents`` everywhere in ``windows`` (None: all)."""
        windows = np.arange(len(self.x)) if windows is None else windows
        ces, kls, device = [], [], self.bench.device
        for begin in range(0, len(windows), self.batch):
            part = torch.from_numpy(windows[begin : begin + self.batch])
            without = self.z[part].flatten(0, 1)
            with_all = self.bench.sae.decode(without.to(device))
            without[:, latents] = self.instead[latents]
            change = (with_all - self.bench.sae.decode(without.to(device))).view(len(part), self.z.shape[1], -1)
            with patched(self.bench.lm.model, self.bench.write, lambda a, change=change: a - change.to(a.dtype)):
                log_p = self._log_probs(self.x[part])
            clean, targets = self.clean[part], self.y[part, 1:, None]
            ces.append((clean - log_p).gather(2, targets).squeeze(2))
            kls.append(F.kl_div(log_p, clean, log_target=True, reduction="none").sum(2))
        return Effect(torch.cat(ces), torch.cat(kls))
