"""The causal check of a circuit over many targets, as numbers, arrays for figures, and their noise over resampled prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.studies.circuits import check
from sae_experiments.studies.circuits.attribution import Circuit, Prompts, Targets
from sae_experiments.studies.circuits.comparators import Weights

SCATTER = 20_000  # points of a scatter that are stored
BINS = 121


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSpec:
    """How much is attributed and how much of it is checked."""

    targets: (
        int  # (prompt, position, latent) that are attributed, at random among all that are active
    )
    checked: int  # of these, targets whose upstream latents are really removed
    earlier: int  # upstream latents at earlier positions removed one at a time, for each checked target: half of them the largest attributions
    counts: Sequence[int]  # how many are removed at once, in deletion curves
    lags: int  # positions back for which co-activation is counted; beyond them it is 0
    random_orders: int  # random orders in deletion curves
    nudges: Sequence[float]  # steps along the gradient, as shares of the norm of the codes moved
    nodes: int  # Gauss-Legendre points of the integrated gradients that completeness is tested with
    bootstrap: int  # resamplings of prompts

    def __post_init__(self) -> None:
        for name, least in (
            ("targets", 1),
            ("checked", 1),
            ("earlier", 0),
            ("lags", 1),
            ("random_orders", 1),
            ("nodes", 1),
            ("bootstrap", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(
                    f"study.checks.{name}={getattr(self, name)} must be at least {least}"
                )
        if (
            not self.counts
            or any(n < 1 for n in self.counts)
            or list(self.counts) != sorted(set(self.counts))
        ):
            raise UserError(
                f"study.checks.counts={list(self.counts)} must be whole numbers from 1 that grow"
            )
        if not self.nudges or any(not n > 0 for n in self.nudges):
            raise UserError(f"study.checks.nudges={list(self.nudges)} must be positive numbers")


@dataclass
class Survey:
    """Numbers, why some are missing, arrays for figures, standard errors over resampled prompts, seconds."""

    metrics: dict[str, float | None] = field(default_factory=dict)
    why_null: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Scores(NamedTuple):
    """What upstream latents are ranked by, (R, T, K) each, for the checked targets; None where a comparator does not exist."""

    attribution: Tensor
    cosine: Tensor | None
    gated_cosine: Tensor | None
    coactivation: Tensor
    activation: Tensor


def drawn(prompts: Prompts, n: int, seed: int) -> Targets:
    """``n`` targets at random among all active (prompt, position, latent), in order of their prompts."""
    total = prompts.active.n
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(n, total), replace=False))
    return prompts.active[torch.from_numpy(chosen).to(prompts.tokens.device)]


def gradients(
    circuit: Circuit,
    prompts: Prompts,
    targets: Targets,
    weights: Weights | None,
    *,
    steps: int,
    seed: int,
) -> Survey:
    """All gradients of ``targets``: their histogram, and a sample of them with cosines; how many targets a second."""
    found, device = Survey(), prompts.tokens.device
    kept: dict[str, list[np.ndarray]] = {
        k: [] for k in ("gradient", "attribution", "cosine", "same")
    }
    generator = torch.Generator(device).manual_seed(seed)
    share = SCATTER / max(
        targets.n * prompts.index.shape[2], 1
    )  # of the pairs at the same position, and as many of the earlier ones
    seconds, n_pairs = 0.0, 0
    calls = circuit.attribute(prompts, targets, steps=steps)
    while True:
        began = time.perf_counter()
        part = next(calls, None)
        seconds += time.perf_counter() - began
        if part is None:
            break
        allowed, same = (check.reachable(prompts, part.targets, same=s) for s in (False, True))
        n_pairs += int(allowed.sum())
        earlier = share * float(same.sum()) / max(float((allowed & ~same).sum()), 1)
        chance = torch.rand(allowed.shape, generator=generator, device=device)
        take = allowed & (chance < torch.where(same, share, earlier))
        at = take.nonzero(as_tuple=True)
        kept["gradient"].append(part.gradient[at].cpu().numpy())
        kept["attribution"].append(part.attribution[at].cpu().numpy())
        kept["same"].append(same[at].cpu().numpy())
        if weights is not None:
            upstream = prompts.index[part.targets.prompt[at[0]], at[1], at[2]]
            kept["cosine"].append(
                (weights.writes[upstream] * weights.reads[part.targets.latent[at[0]]])
                .sum(1)
                .cpu()
                .numpy()
            )
    found.arrays = {f"survey_{k}": np.concatenate(v) for k, v in kept.items() if v}
    found.metrics = {
        "n_attributed_pairs": float(n_pairs),
        "attribution_targets_per_second": targets.n / max(seconds, 1e-9),
    }
    found.seconds = {"attribution": seconds}
    return found


class Checker:
    """The checked targets of a circuit with everything that is compared."""

    def __init__(
        self,
        circuit: Circuit,
        prompts: Prompts,
        targets: Targets,
        spec: CheckSpec,
        *,
        steps: int,
        seed: int,
    ) -> None:
        self.circuit, self.prompts, self.targets, self.spec, self.seed = (
            circuit,
            prompts,
            targets,
            spec,
            seed,
        )
        calls = list(circuit.attribute(prompts, targets, steps=steps))
        self.gradient, self.attribution = (
            torch.cat([getattr(c, name) for c in calls]) for name in ("gradient", "attribution")
        )
        self.value = check.clean(circuit, prompts, targets)
        self.samples = check.resampled(targets.prompt.cpu().numpy(), spec.bootstrap, seed)
        self.found = Survey()

    def scores(
        self, weights: Weights | None, gated: Weights | None, phi: np.ndarray, latents: np.ndarray
    ) -> Scores:
        """The comparators at every active upstream latent; ``phi`` (G', L, F) of ``latents`` (G',)."""
        p, t = self.prompts, self.targets
        cosines = [
            w and self.circuit.project(p, t.prompt, w.reads[t.latent], w.writes)
            for w in (weights, gated)
        ]
        row = torch.from_numpy(np.searchsorted(latents, t.latent.cpu().numpy())).to(t.latent.device)
        lag = t.position[:, None] - torch.arange(p.index.shape[1], device=row.device)
        known = (lag >= 0) & (lag < phi.shape[1])
        table = torch.from_numpy(phi).to(row.device)
        found = table[
            row[:, None, None], lag.clamp(0, phi.shape[1] - 1)[:, :, None], p.index[t.prompt]
        ]
        return Scores(
            self.attribution,
            *cosines,
            torch.where(known[:, :, None], found, 0),
            p.value[t.prompt].abs(),
        )

    def singles(self, scores: Scores) -> None:
        """Remove upstream latents one at a time: all that are active at the target's own position, some of those before it."""
        same = check.reachable(self.prompts, self.targets, same=True)
        self._single("", check.Pairs(*same.nonzero(as_tuple=True)), scores)
        before = check.reachable(self.prompts, self.targets, same=False) & ~same
        half = self.spec.earlier // 2
        chance = torch.rand(
            before.shape,
            generator=torch.Generator(before.device).manual_seed(self.seed),
            device=before.device,
        )
        best = check.ranks(self.attribution.abs(), before, max(half, 1)) < half
        others = (
            check.ranks(chance, before & ~best, max(self.spec.earlier - half, 1))
            < self.spec.earlier - half
        )
        self._single("earlier_", check.Pairs(*(best | others).nonzero(as_tuple=True)), scores)

    def _single(self, prefix: str, pairs: check.Pairs, scores: Scores) -> None:
        found, names = self.found, ("pearson", "spearman")
        effect = (
            check.single_effects(self.circuit, self.prompts, self.targets, pairs, whole=self.value)
            .cpu()
            .numpy()
        )
        found.metrics[f"{prefix}n_pairs"] = float(len(effect))
        samples = check.resampled(
            self.targets.prompt[pairs.row].cpu().numpy(), self.spec.bootstrap, self.seed
        )
        found.arrays[f"{prefix}pair_effect"] = effect
        found.arrays[f"{prefix}pair_gradient"] = pairs.of(self.gradient).cpu().numpy()
        for method in scores._fields:
            table = getattr(scores, method)
            keys = [f"{prefix}{method}_ablation_{n}" for n in names]
            if method == "attribution":
                keys += [f"{prefix}attribution_sign_agreement", f"{prefix}attribution_slope"]
            if table is None or not len(effect):
                why = (
                    "both sites lie in one MLP"
                    if table is None
                    else "no upstream latent is active there"
                )
                found.metrics |= dict.fromkeys(keys)
                found.why_null |= dict.fromkeys(keys, why)
                continue
            predicted = pairs.of(table).cpu().numpy()
            found.arrays[f"{prefix}pair_{method}"] = predicted
            found.metrics |= dict(zip(keys, check.agreement(predicted, effect), strict=False))
            again = np.array(
                [check.agreement(predicted[s], effect[s])[: len(keys)] for s in samples]
            ).reshape(-1, len(keys))
            found.noise |= check.spread(dict(zip(keys, again.T, strict=True)))

    def deletions(self, scores: Scores) -> None:
        """Remove the first 1, 2, 4, ... latents by each method, of those at the target's own position and of all it can depend on."""
        for pool, prefix in ((True, ""), (False, "all_")):
            allowed = check.reachable(self.prompts, self.targets, same=pool)
            counts = [
                n for n in self.spec.counts if n <= max(int(allowed.flatten(1).sum(1).max()), 1)
            ]
            orders = {
                m: [getattr(scores, m)] for m in scores._fields if getattr(scores, m) is not None
            }
            generator = torch.Generator(allowed.device).manual_seed(self.seed)
            orders["random"] = [
                torch.rand(allowed.shape, generator=generator, device=allowed.device)
                for _ in range(self.spec.random_orders)
            ]
            value, curves = self.value.cpu().numpy(), {}
            for method, tables in orders.items():
                removed = [self._removed(table, allowed, counts) for table in tables]
                curves[method] = check.curve_of(np.mean(removed, axis=0), value, self.samples)
            self._curves(prefix, counts, curves)

    def _removed(self, table: Tensor, allowed: Tensor, counts: Sequence[int]) -> np.ndarray:
        places = check.ranks(table, allowed, counts[-1])
        return check.deletion(
            self.circuit, self.prompts, self.targets, places, counts, whole=self.value
        )

    def _curves(self, prefix: str, counts: Sequence[int], curves: dict[str, check.Curve]) -> None:
        found, best = self.found, curves["attribution"]
        found.arrays[f"{prefix}deletion_counts"] = np.array(counts)
        for method, curve in curves.items():
            found.metrics[f"{prefix}deletion_area_{method}"] = curve.area
            found.noise |= check.spread({f"{prefix}deletion_area_{method}": curve.areas})
            ends = (
                np.quantile(curve.shares, [0.025, 0.975], axis=0)
                if len(curve.shares)
                else np.full((2, len(counts)), np.nan)
            )
            found.arrays[f"{prefix}deletion_{method}"] = np.stack([curve.share, *ends])
            if method in ("cosine", "coactivation"):
                key = f"{prefix}deletion_gain_over_{method}"
                gains = best.areas - curve.areas
                found.metrics |= {
                    key: best.area - curve.area,
                    f"{key}_low": check.interval(gains)[0] if len(gains) else None,
                }
                found.why_null |= (
                    {}
                    if len(gains)
                    else {f"{key}_low": "there is only one prompt, or study.checks.bootstrap=0"}
                )
                found.noise |= check.spread({key: gains})

    def joint(self) -> None:
        """Move along the gradient, remove everything, and see whether the parts add up."""
        p, t, found = self.prompts, self.targets, self.found
        allowed = check.reachable(p, t, same=False)
        for step in self.spec.nudges:
            predicted, actual = (
                x.cpu().numpy()
                for x in check.nudge(self.circuit, p, t, self.gradient, allowed, step)
            )
            agrees, name = check.agreement(predicted, actual), f"{step:g}".replace(".", "_")
            found.metrics |= {
                f"nudge_{name}_pearson": agrees.pearson,
                f"nudge_{name}_slope": agrees.slope,
            }
            found.arrays[f"nudge_{name}"] = np.stack([predicted, actual])
        whole = (
            check.joint_effects(self.circuit, p, t, lambda part: allowed[part].to(p.amount.dtype))
            .cpu()
            .numpy()
        )
        found.arrays["joint"] = np.stack([self.attribution.flatten(1).sum(1).cpu().numpy(), whole])
        found.metrics["joint_ablation_pearson"] = check.agreement(*found.arrays["joint"]).pearson
        parts = dict.fromkeys(("latents", "error", "bias"), 0.0)
        for c in self.circuit.attribute(p, t):
            parts["latents"] += float((c.gradient * p.value[c.targets.prompt]).sum())
            parts["error"] += float((c.state_gradient * p.error[c.targets.prompt]).sum())
            parts["bias"] += float((c.state_gradient * p.bias).sum())
        total = float(self.value.sum())
        found.metrics |= {f"completeness_{k}": v / total for k, v in parts.items()}
        found.metrics["completeness_rest"] = 1 - sum(parts.values()) / total
        path = (
            torch.cat(
                [
                    c.attribution.flatten(1).sum(1)
                    for c in self.circuit.attribute(p, t, steps=self.spec.nodes)
                ]
            )
            .cpu()
            .numpy()
        )
        found.metrics["integrated_gap"] = float(
            np.abs(path - whole).sum() / max(np.abs(whole).sum(), 1e-12)
        )
