"""Checks of a circuit over many targets: numbers, arrays for figures and standard errors."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.studies.circuits import check
from sae_experiments.studies.circuits.attribution import (
    Attribution,
    Circuit,
    Prompts,
    Targets,
    concatenated,
)
from sae_experiments.studies.circuits.comparators import CircuitWeights

#: Points of a scatter plot that are stored.
SCATTER = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitCheckSpec:
    """Number of attributions, and of those that are checked."""

    targets: int
    """Random (prompt, position, latent) among all active ones that are attributed."""
    checked: int
    """Random targets whose upstream latents are removed."""
    earlier: int
    """Upstream latents at earlier positions removed one at a time for each checked target.

    Half of them have the largest attributions, the others are random."""
    counts: Sequence[int]
    """Numbers of latents removed at once in deletion curves, ascending."""
    lags: int
    """Lags at which co-activation is counted; at larger ones it is 0."""
    random_orders: int
    """Random orders in deletion curves."""
    nudges: Sequence[float]
    """Steps along the gradient, as shares of the norm of the moved codes."""
    nodes: int
    """Gauss-Legendre points of the integrated gradients that test completeness."""
    bootstrap: int
    """Bootstrap samples of prompts."""

    def __post_init__(self) -> None:
        at_least_one = ("targets", "checked", "lags", "random_orders", "nodes")
        bounds = dict.fromkeys(at_least_one, 1) | {"earlier": 0, "bootstrap": 0}
        for name, bound in bounds.items():
            value = getattr(self, name)
            if value < bound:
                raise UserError(f"study.checks.{name}={value} must be at least {bound}")
        counts = list(self.counts)
        if not counts or min(counts) < 1 or counts != sorted(set(counts)):
            raise UserError(f"study.checks.counts={counts} must be whole numbers from 1 that grow")
        if not self.nudges or any(not step > 0 for step in self.nudges):
            raise UserError(f"study.checks.nudges={list(self.nudges)} must be positive numbers")


@dataclass
class Survey:
    """Results of a check."""

    metrics: dict[str, float | None] = field(default_factory=dict)
    """Numbers by name; None if undefined."""
    why_null: dict[str, str] = field(default_factory=dict)
    """Reasons of undefined numbers."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays for figures."""
    noise: dict[str, float] = field(default_factory=dict)
    """Standard errors over resampled prompts."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Durations by stage."""


class Scores(NamedTuple):
    """Rankings of upstream latents, (R, T, K) each; None for a comparator that is undefined."""

    attribution: Tensor
    cosine: Tensor | None
    gated_cosine: Tensor | None
    coactivation: Tensor
    activation: Tensor

    def known(self) -> dict[str, Tensor]:
        """The rankings that are defined, by name."""
        return {name: table for name, table in self._asdict().items() if table is not None}


def drawn(prompts: Prompts, n: int, seed: int) -> Targets:
    """At most `n` random targets of all that are active, in the order of their prompts."""
    total = prompts.active.n
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(n, total), replace=False))
    return prompts.active[torch.from_numpy(chosen).to(prompts.tokens.device)]


def gradients(
    circuit: Circuit,
    prompts: Prompts,
    targets: Targets,
    weights: CircuitWeights | None,
    *,
    steps: int,
    seed: int,
) -> Survey:
    """Attribute targets, and keep a sample of their gradients.

    Args:
        circuit: The two SAEs.
        prompts: The prompts.
        targets: The targets.
        weights: Directions whose cosines are stored beside the gradients; None: none are.
        steps: Points of integrated gradients; 0: the plain gradient.
        seed: Seed of the sample.
    """
    sample = _Sample(prompts, weights, seed, SCATTER / max(targets.n * prompts.index.shape[2], 1))
    seconds = 0.0
    calls = circuit.attribute(prompts, targets, steps=steps)
    while True:
        began = time.perf_counter()
        part = next(calls, None)
        seconds += time.perf_counter() - began
        if part is None:
            break
        sample.add(part)
    metrics: dict[str, float | None] = {
        "n_attributed_pairs": float(sample.n_pairs),
        "attribution_targets_per_second": targets.n / max(seconds, 1e-9),
    }
    arrays = {f"survey_{name}": np.concatenate(v) for name, v in sample.kept.items() if v}
    return Survey(metrics=metrics, arrays=arrays, seconds={"attribution": seconds})


class _Sample:
    """A random sample of the pairs of a target and an upstream latent.

    Args:
        prompts: The prompts.
        weights: Directions whose cosines are stored; None: none are.
        seed: Seed of the sample.
        share: Share of the pairs at the same position to keep; of those at earlier positions, as
            many are kept.
    """

    def __init__(
        self, prompts: Prompts, weights: CircuitWeights | None, seed: int, share: float
    ) -> None:
        self.prompts = prompts
        self.weights = weights
        self.share = share
        self.generator = torch.Generator(prompts.tokens.device).manual_seed(seed)
        self.n_pairs = 0
        names = ("gradient", "attribution", "cosine", "same")
        self.kept: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def add(self, part: Attribution) -> None:
        """Count the pairs of some targets, and keep some of them."""
        allowed = check.reachable(self.prompts, part.targets, same=False)
        same = check.reachable(self.prompts, part.targets, same=True)
        self.n_pairs += int(allowed.sum())
        n_earlier = max(float((allowed & ~same).sum()), 1)
        earlier_share = self.share * float(same.sum()) / n_earlier
        chance = torch.rand(allowed.shape, generator=self.generator, device=allowed.device)
        pairs = check.Pairs(
            *(allowed & (chance < torch.where(same, self.share, earlier_share))).nonzero(
                as_tuple=True
            )
        )
        self.kept["gradient"].append(_numpy(pairs.of(part.gradient)))
        self.kept["attribution"].append(_numpy(pairs.of(part.attribution)))
        self.kept["same"].append(_numpy(pairs.of(same)))
        if self.weights is not None:
            prompt = part.targets.prompt[pairs.row]
            upstream = self.prompts.index[prompt, pairs.position, pairs.slot]
            reads = self.weights.reads[part.targets.latent[pairs.row]]
            cosine = (self.weights.writes[upstream] * reads).sum(1)
            self.kept["cosine"].append(_numpy(cosine))


class Checker:
    """The checked targets of a circuit, and the results of the checks.

    Args:
        circuit: The two SAEs.
        prompts: The prompts.
        targets: The checked targets, in the order of their prompts.
        spec: Size of the checks.
        steps: Points of integrated gradients; 0: the plain gradient.
        seed: Seed of everything random.
    """

    def __init__(
        self,
        circuit: Circuit,
        prompts: Prompts,
        targets: Targets,
        spec: CircuitCheckSpec,
        *,
        steps: int,
        seed: int,
    ) -> None:
        self.circuit = circuit
        self.prompts = prompts
        self.targets = targets
        self.spec = spec
        self.seed = seed
        calls = list(circuit.attribute(prompts, targets, steps=steps))
        self.gradient = concatenated(calls, "gradient")
        self.attribution = concatenated(calls, "attribution")
        self.value = check.clean(circuit, prompts, targets)
        self.samples = check.resampled(_numpy(targets.prompt), spec.bootstrap, seed)
        self.survey = Survey()

    def scores(
        self,
        weights: CircuitWeights | None,
        gated: CircuitWeights | None,
        phi: np.ndarray,
        latents: np.ndarray,
    ) -> Scores:
        """Attribution and all comparators at every active upstream latent.

        Args:
            weights: Directions of the weights; None if undefined.
            gated: The same with mean slopes of the neurons.
            phi: Co-activation (m, L, F) of the downstream latents `latents`.
            latents: Sorted downstream latents (m,).
        """
        p, t = self.prompts, self.targets
        cosine, gated_cosine = (
            w and self.circuit.project(p, t.prompt, w.reads[t.latent], w.writes)
            for w in (weights, gated)
        )
        device = t.latent.device
        row = torch.from_numpy(np.searchsorted(latents, _numpy(t.latent))).to(device)
        lag = t.position[:, None] - torch.arange(p.index.shape[1], device=device)
        known = (lag >= 0) & (lag < phi.shape[1])
        lag = lag.clamp(0, phi.shape[1] - 1)
        table = torch.from_numpy(phi).to(device)
        coactivation = table[row[:, None, None], lag[:, :, None], p.index[t.prompt]]
        return Scores(
            attribution=self.attribution,
            cosine=cosine,
            gated_cosine=gated_cosine,
            coactivation=torch.where(known[:, :, None], coactivation, 0),
            activation=p.value[t.prompt].abs(),
        )

    def singles(self, scores: Scores) -> None:
        """Remove upstream latents one at a time.

        These are all that are active at the target's own position, and some at earlier ones.
        """
        same = check.reachable(self.prompts, self.targets, same=True)
        self._single("", check.Pairs(*same.nonzero(as_tuple=True)), scores)
        before = check.reachable(self.prompts, self.targets, same=False) & ~same
        n_best = self.spec.earlier // 2
        n_random = self.spec.earlier - n_best
        generator = torch.Generator(before.device).manual_seed(self.seed)
        chance = torch.rand(before.shape, generator=generator, device=before.device)
        best = check.ranks(self.attribution.abs(), before, max(n_best, 1)) < n_best
        random = check.ranks(chance, before & ~best, max(n_random, 1)) < n_random
        self._single("earlier_", check.Pairs(*(best | random).nonzero(as_tuple=True)), scores)

    def _single(self, prefix: str, pairs: check.Pairs, scores: Scores) -> None:
        """Compare every ranking with the effects of removing single latents.

        Args:
            prefix: Prefix of the results' names.
            pairs: Targets with the upstream latent to remove.
            scores: The rankings.
        """
        out = self.survey
        effect = _numpy(
            check.single_effects(
                self.circuit, self.prompts, self.targets, pairs, clean_values=self.value
            )
        )
        out.metrics[f"{prefix}n_pairs"] = float(len(effect))
        prompt = _numpy(self.targets.prompt[pairs.row])
        samples = check.resampled(prompt, self.spec.bootstrap, self.seed)
        out.arrays[f"{prefix}pair_effect"] = effect
        out.arrays[f"{prefix}pair_gradient"] = _numpy(pairs.of(self.gradient))
        for method, table in scores._asdict().items():
            keys = [f"{prefix}{method}_ablation_{kind}" for kind in ("pearson", "spearman")]
            if method == "attribution":
                keys += [f"{prefix}attribution_sign_agreement", f"{prefix}attribution_slope"]
            if table is None or not len(effect):
                why = "no upstream latent is active there"
                if table is None:
                    why = "both sites lie in one MLP"
                out.metrics |= dict.fromkeys(keys)
                out.why_null |= dict.fromkeys(keys, why)
                continue
            predicted = _numpy(pairs.of(table))
            out.arrays[f"{prefix}pair_{method}"] = predicted
            out.metrics |= dict(zip(keys, check.agreement(predicted, effect), strict=False))
            resampled = [check.agreement(predicted[s], effect[s])[: len(keys)] for s in samples]
            columns = np.array(resampled).reshape(-1, len(keys)).T
            out.noise |= check.spread(dict(zip(keys, columns, strict=True)))

    def deletions(self, scores: Scores) -> None:
        """Remove the first 1, 2, 4, ... latents by each ranking.

        This is done for the latents at the target's own position, and for all that it can depend
        on.
        """
        for same, prefix in ((True, ""), (False, "all_")):
            allowed = check.reachable(self.prompts, self.targets, same=same)
            most = max(int(allowed.flatten(1).sum(1).max()), 1)
            counts = [n for n in self.spec.counts if n <= most]
            orders = {method: [table] for method, table in scores.known().items()}
            generator = torch.Generator(allowed.device).manual_seed(self.seed)
            orders["random"] = [
                torch.rand(allowed.shape, generator=generator, device=allowed.device)
                for _ in range(self.spec.random_orders)
            ]
            value = _numpy(self.value)
            curves = {}
            for method, tables in orders.items():
                removed = [self._removed(table, allowed, counts) for table in tables]
                curves[method] = check.curve_of(np.mean(removed, axis=0), value, self.samples)
            self._curves(prefix, counts, curves)

    def _removed(self, table: Tensor, allowed: Tensor, counts: Sequence[int]) -> np.ndarray:
        """Changes (R, Q) of the targets without the first q latents of a ranking (R, T, K)."""
        places = check.ranks(table, allowed, counts[-1])
        return check.deletion(
            self.circuit, self.prompts, self.targets, places, counts, clean_values=self.value
        )

    def _curves(
        self, prefix: str, counts: Sequence[int], curves: Mapping[str, check.Curve]
    ) -> None:
        """Add deletion curves by method, and the gains of attribution over the others."""
        out = self.survey
        best = curves["attribution"]
        out.arrays[f"{prefix}deletion_counts"] = np.array(counts)
        for method, curve in curves.items():
            area = f"{prefix}deletion_area_{method}"
            out.metrics[area] = curve.area
            out.noise |= check.spread({area: curve.areas})
            ends = np.full((2, len(counts)), np.nan)
            if len(curve.shares):
                ends = np.quantile(curve.shares, [0.025, 0.975], axis=0)
            out.arrays[f"{prefix}deletion_{method}"] = np.stack([curve.share, *ends])
            if method in ("cosine", "coactivation"):
                gains = best.areas - curve.areas
                self._gain(f"{prefix}deletion_gain_over_{method}", best.area - curve.area, gains)

    def _gain(self, key: str, gain: float, resampled: np.ndarray) -> None:
        """Add a gain with the lower end of its interval over bootstrap samples (B,)."""
        out = self.survey
        out.metrics |= {key: gain, f"{key}_low": None}
        out.noise |= check.spread({key: resampled})
        if len(resampled):
            out.metrics[f"{key}_low"] = check.interval(resampled)[0]
        else:
            out.why_null[f"{key}_low"] = "there is only one prompt, or study.checks.bootstrap=0"

    def joint(self) -> None:
        """Move all codes along the gradient, remove all latents, and test completeness."""
        p, t, out = self.prompts, self.targets, self.survey
        allowed = check.reachable(p, t, same=False)
        for step in self.spec.nudges:
            self._nudge(step, allowed)
        removed = check.joint_effects(
            self.circuit, p, t, lambda part: allowed[part].to(p.amount.dtype)
        )
        whole = _numpy(removed)
        out.arrays["joint"] = np.stack([_numpy(self.attribution.flatten(1).sum(1)), whole])
        out.metrics["joint_ablation_pearson"] = check.agreement(*out.arrays["joint"]).pearson
        self._completeness()
        calls = list(self.circuit.attribute(p, t, steps=self.spec.nodes))
        integrated = _numpy(concatenated(calls, "attribution").flatten(1).sum(1))
        gap = np.abs(integrated - whole).sum() / max(np.abs(whole).sum(), 1e-12)
        out.metrics["integrated_gap"] = float(gap)

    def _nudge(self, step: float, allowed: Tensor) -> None:
        """Add the agreement of predicted and actual change for one step along the gradient."""
        predicted, actual = (
            _numpy(x)
            for x in check.nudge(
                self.circuit, self.prompts, self.targets, self.gradient, allowed, step
            )
        )
        agreement = check.agreement(predicted, actual)
        name = f"nudge_{step:g}".replace(".", "_")
        self.survey.metrics[f"{name}_pearson"] = agreement.pearson
        self.survey.metrics[f"{name}_slope"] = agreement.slope
        self.survey.arrays[name] = np.stack([predicted, actual])

    def _completeness(self) -> None:
        """Add the shares of the pre-activations that each part of the state accounts for."""
        p = self.prompts
        parts = dict.fromkeys(("latents", "error", "bias"), 0.0)
        for call in self.circuit.attribute(p, self.targets):
            prompt = call.targets.prompt
            parts["latents"] += float((call.gradient * p.value[prompt]).sum())
            parts["error"] += float((call.state_gradient * p.error[prompt]).sum())
            parts["bias"] += float((call.state_gradient * p.bias).sum())
        total = float(self.value.sum())
        metrics = self.survey.metrics
        metrics |= {f"completeness_{name}": part / total for name, part in parts.items()}
        metrics["completeness_rest"] = 1 - sum(parts.values()) / total


def _numpy(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()
