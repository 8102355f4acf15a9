"""Checks of graphs by interventions on the real model, over all prompts of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.studies.attribution.influence import Graph
from sae_experiments.studies.attribution.info import ORDERS
from sae_experiments.studies.attribution.interventions import Interventions
from sae_experiments.studies.base import Outcome

#: Targets of interventions, whose predicted and measured changes are compared.
TARGETS = ("latent", "logit")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSpec:
    """Settings of the checks by intervention."""

    strongest: int  # latents clamped per prompt, those with the largest influence
    random: int  # further latents clamped per prompt, at random
    multiples: Sequence[float]  # of its activation that a latent is set to
    counts: Sequence[int]  # latents removed at once, in deletion curves

    def __post_init__(self) -> None:
        if self.strongest < 1 or self.random < 0 or not self.multiples or not self.counts:
            raise UserError(
                "study.checks: strongest must be at least 1, random at least 0, and multiples and "
                "counts must not be empty"
            )
        if 1 in self.multiples:
            raise UserError("study.checks.multiples=1 changes nothing: leave it out")


def check_graph(
    interventions: Interventions, graph: Graph, groups: Sequence[Tensor], spec: CheckSpec, seed: int
) -> dict[str, Tensor]:
    """Predicted and measured effects, and deletion curves, of one prompt.

    Args:
        interventions: Interventions on the prompt's model.
        graph: Its graph.
        groups: Latents of each supernode.
        spec: Settings.
        seed: Seed of the random choice of latents.

    Returns:
        Arrays by name; empty if no latent is active.
    """
    n = graph.n
    if not n:
        return {}
    influence = graph.influence()[0][:n]
    chance = torch.Generator().manual_seed(seed % 2**63)
    shuffled = torch.randperm(n, generator=chance).to(influence.device)
    by_influence = torch.argsort(influence, descending=True, stable=True)
    latents = torch.cat([by_influence[: spec.strongest], shuffled[: spec.random]]).unique()
    effects: dict[str, Tensor] = {}
    for check in ("constrained", "free"):
        effects |= _effects(interventions, interventions.one_each(latents), check, spec.multiples)
        if groups:
            whole = _effects(interventions, interventions.members(groups), check, spec.multiples)
            effects |= {f"supernode_{name}": values for name, values in whole.items()}
    orders = {
        "influence": by_influence,
        "direct": graph.weights[n, :n].abs().argsort(descending=True, stable=True),
        "activation": interventions.local.nodes.value.argsort(descending=True, stable=True),
        "random": shuffled,
    }
    for order, ranked in orders.items():
        effects[f"deletion_{order}"] = interventions.deletion(ranked, spec.counts)
    return effects


def _effects(
    interventions: Interventions, sets: Tensor, check: str, multiples: Sequence[float]
) -> dict[str, Tensor]:
    """Predicted and measured effects by name, one after the other."""
    free = check == "free"
    later = interventions.later(sets)
    effects: dict[str, list[Tensor]] = {}
    for multiple in multiples:
        predict = interventions.total if free else interventions.direct
        predicted = predict(sets, multiple)
        measured = interventions.measure(sets, multiple, free=free)
        parts = {
            f"{check}_latent_predicted": predicted.latents[later],
            f"{check}_latent_measured": measured.latents[later],
            f"{check}_logit_predicted": predicted.logits.flatten(),
            f"{check}_logit_measured": measured.logits.flatten(),
        }
        for name, part in parts.items():
            effects.setdefault(name, []).append(part)
    return {name: torch.cat(parts) for name, parts in effects.items()}


@torch.no_grad()
def removals(interventions: Interventions, groups: Sequence[Tensor]) -> list[dict[str, float]]:
    """Effects of removing each group of latents freely, on the most probable next token.

    Returns:
        For each group: the token's probability `before` and `after`, and the `predicted` and
        `measured` change of its logit minus the mean logit.
    """
    if not groups:
        return []
    sets = interventions.members(groups)
    token = interventions.local.logits.token[0]
    columns = {
        "before": interventions.local.logits.probability[:1].expand(len(groups)),
        "after": interventions.next_tokens(sets, 0.0)[:, token].exp(),
        "predicted": interventions.total(sets, 0.0).logits[:, 0],
        "measured": interventions.measure(sets, 0.0, free=True).logits[:, 0],
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def add_effects(outcome: Outcome, checked: Sequence[Mapping[str, Tensor]]) -> None:
    """Add correlation and slope of measured effects on predicted ones, over all prompts."""
    for check in ("constrained", "free", "supernode_constrained", "supernode_free"):
        for target in TARGETS:
            _add_pairs(outcome, checked, f"{check}_{target}")


def _add_pairs(outcome: Outcome, checked: Sequence[Mapping[str, Tensor]], name: str) -> None:
    """Add the agreement of one kind of pairs, and the pairs themselves."""
    pairs = []
    for side in ("predicted", "measured"):
        key = f"{name}_{side}"
        parts = [one[key] for one in checked if key in one]
        pairs.append(torch.cat(parts).cpu().double().numpy() if parts else np.zeros(0))
        outcome.arrays[key] = pairs[-1].astype(np.float32)
    outcome.metrics[f"{name}_pairs"] = len(pairs[0])
    for kind, value in zip(("pearson", "slope"), agreement(*pairs), strict=True):
        outcome.metrics[f"{name}_{kind}"] = value
        if value is None:
            outcome.why_null[f"{name}_{kind}"] = "there are no pairs that differ"


def agreement(predicted: np.ndarray, measured: np.ndarray) -> tuple[float | None, float | None]:
    """Pearson correlation, and slope of measured on predicted; None where nothing varies."""
    if len(predicted) < 3 or not predicted.std() > 0 or not measured.std() > 0:
        return None, None
    pearson = float(np.corrcoef(predicted, measured)[0, 1])
    return pearson, pearson * float(measured.std() / predicted.std())


def add_deletions(
    outcome: Outcome, checked: Sequence[Mapping[str, Tensor]], counts: Sequence[int]
) -> None:
    """Add the mean cost of each order of removal, its curve, and the noise over prompts.

    The gain over the order of activation is taken prompt by prompt.
    """
    outcome.arrays["deletion_counts"] = np.array(counts)
    curves: dict[str, np.ndarray] = {}
    for order in ORDERS:
        name = f"deletion_{order}"
        of_prompts = [one[name].cpu().double().numpy() for one in checked if one]
        curves[order] = np.stack(of_prompts) if of_prompts else np.zeros((0, len(counts)))
        outcome.arrays[name] = curves[order]
        _add_mean(outcome, name, curves[order].mean(1))
    gain = (curves["influence"] - curves["activation"]).mean(1)
    _add_mean(outcome, "deletion_gain", gain)


def _add_mean(outcome: Outcome, name: str, values: np.ndarray) -> None:
    """Add the mean of one value per prompt, and its standard error."""
    if not len(values):
        outcome.metrics[name] = None
        outcome.why_null[name] = "no latent is active in the prompts"
        return
    outcome.metrics[name] = float(values.mean())
    if len(values) > 1:
        outcome.noise[name] = float(values.std(ddof=1) / len(values) ** 0.5)
