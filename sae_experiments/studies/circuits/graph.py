"""An attribution graph: the upstream latents, by how far back they are, that make one downstream latent fire, over many of its firings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from sae_experiments.errors import UserError
from sae_experiments.studies.circuits import check
from sae_experiments.studies.circuits.attribution import Circuit, Prompts, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """Which downstream latents get a graph, and how large it is."""

    latents: Sequence[int] | None  # by index (null: the most specific to one n-gram)
    count: int  # how many are chosen automatically
    order: int  # characters (or tokens) of the n-gram they are to be specific to
    min_fires: int  # held-out firings they need
    upstream_latent: (
        int | None
    )  # the one marked in the histogram of gradients (null: the largest attribution)
    firings: int  # of the downstream latent that a graph is averaged over, at even quantiles of its strength
    edges: int  # strongest upstream latents shown
    contexts: int  # top contexts of a node
    before: int  # characters of a context before and after
    after: int

    def __post_init__(self) -> None:
        for name in ("count", "order", "min_fires", "firings", "edges"):
            if getattr(self, name) < 1:
                raise UserError(f"study.graph.{name}={getattr(self, name)} must be at least 1")


class Edge(NamedTuple):
    """Upstream latent ``lag`` positions back: mean attribution and mean effect of removing it over all firings of the downstream latent (0
    where it is not active), its mean activation where it is active, and in how many of the firings that is."""

    latent: int
    lag: int
    weight: float
    effect: float
    value: float
    active: int


class Traced(NamedTuple):
    """One downstream latent: firings looked at, mean pre-activation, its strongest edges, mean attribution of the others and of the error."""

    latent: int
    n: int
    value: float
    edges: list[Edge]
    others: float
    error: float
    gradients: (
        np.ndarray
    )  # of everything it can depend on at its strongest firing, and which of them is marked
    marked: int
    every: np.ndarray  # of all F upstream latents, active or not, at the position of that firing
    here: np.ndarray  # which of the F are active there
    interest: int  # the upstream latent that is marked


def firings_of(prompts: Prompts, latent: int, n: int) -> Targets:
    """At most ``n`` firings of a downstream latent in the prompts, at even quantiles of strength, in order of their prompts."""
    at = (prompts.active.latent == latent).nonzero().squeeze(1)
    strongest = at[torch.argsort(prompts.active_value[at], descending=True, stable=True)]
    chosen = (
        strongest[np.unique(np.linspace(0, len(at) - 1, min(n, len(at))).round().astype(int))]
        if len(at)
        else at
    )
    return prompts.active[chosen.sort().values]


def trace(
    circuit: Circuit, prompts: Prompts, latent: int, spec: GraphSpec, *, steps: int
) -> Traced | None:
    """The strongest edges into ``latent``; None where it never fires in the prompts (or nothing is active upstream)."""
    targets = firings_of(prompts, latent, spec.firings)
    if not targets.n:
        return None
    calls = list(circuit.attribute(prompts, targets, steps=steps))
    gradient, attribution = (
        torch.cat([getattr(c, name) for c in calls]) for name in ("gradient", "attribution")
    )
    error = (
        sum(float((c.state_gradient * prompts.error[c.targets.prompt]).sum()) for c in calls)
        / targets.n
    )
    value = check.clean(circuit, prompts, targets)
    allowed = check.reachable(prompts, targets, same=False)
    pairs = check.Pairs(*allowed.nonzero(as_tuple=True))
    if not len(pairs.row):
        return None
    lag = targets.position[pairs.row] - pairs.position
    upstream = prompts.index[targets.prompt[pairs.row], pairs.position, pairs.slot]
    length = prompts.index.shape[1]
    kinds, at = torch.unique(upstream * length + lag, return_inverse=True)
    summed = attribution.new_zeros(len(kinds)).index_add_(0, at, pairs.of(attribution))
    best = summed.abs().topk(min(spec.edges, len(kinds))).indices
    chosen = torch.isin(at, best)
    some = check.Pairs(*(x[chosen] for x in pairs))
    effects = check.single_effects(circuit, prompts, targets, some)
    edges = []
    for i in best.tolist():
        here = at[chosen] == i
        active = prompts.value[targets.prompt[some.row], some.position, some.slot][here]
        kind = int(kinds[i])
        edges.append(
            Edge(
                kind // length,
                kind % length,
                float(summed[i]) / targets.n,
                float(effects[here].sum()) / targets.n,
                float(active.mean()),
                int(here.sum()),
            )
        )
    strongest = int(value.argmax())
    mine = (pairs.row == strongest).nonzero().squeeze(1)
    wanted = (
        upstream[mine] == spec.upstream_latent
        if spec.upstream_latent is not None
        else torch.zeros_like(mine, dtype=torch.bool)
    )
    attributed = pairs.of(attribution)[mine]
    marked = int(
        (attributed.abs() * (wanted if bool(wanted.any()) else torch.ones_like(wanted))).argmax()
    )
    own = int(targets.position[strongest])
    every = circuit.directions @ torch.cat([c.state_gradient for c in calls])[strongest, own]
    active_here = torch.zeros(len(every), dtype=torch.bool, device=every.device)
    active_here[upstream[mine][pairs.position[mine] == own]] = True
    interest = int(upstream[mine][marked]) if spec.upstream_latent is None else spec.upstream_latent
    others = (float(attribution[allowed].sum()) - float(summed[best].sum())) / targets.n
    return Traced(
        latent,
        targets.n,
        float(value.mean()),
        edges,
        others,
        error,
        pairs.of(gradient)[mine].cpu().numpy(),
        marked,
        every.cpu().numpy(),
        active_here.cpu().numpy(),
        interest,
    )


def as_dict(
    traced: Traced,
    title: str,
    up: Mapping[int, Mapping[str, Any]],
    down: Mapping[int, Mapping[str, Any]],
    sites: tuple[str, str],
) -> dict[str, Any]:
    """The graph for the report; ``up`` and ``down`` say of each latent its ``rule`` and ``contexts``."""
    target = f"down.{traced.latent}"
    nodes = [_node(target, f"{sites[1]} #{traced.latent}", 1, 0, traced.value, down[traced.latent])]
    links = []
    for e in traced.edges:
        name = f"up.{e.latent}@{-e.lag}"
        nodes.append(
            _node(name, f"{sites[0]} #{e.latent}", 0, -e.lag, e.value, up[e.latent])
            | {"active_frac": _digits(e.active / traced.n)}
        )
        links.append(
            {"from": name, "to": target, "weight": _digits(e.weight), "effect": _digits(e.effect)}
        )
    last = min((-e.lag for e in traced.edges), default=0)
    for i, (name, label, weight) in enumerate(
        (
            ("others", "all other latents", traced.others),
            ("error", "what the SAE leaves out", traced.error),
        )
    ):
        nodes.append(
            {
                "id": name,
                "label": label,
                "column": 0,
                "row": last - 1 - i,
                "value": 0.0,
                "rule": None,
                "contexts": [],
            }
        )
        links.append({"from": name, "to": target, "weight": _digits(weight)})
    return {
        "title": title,
        "nodes": nodes,
        "edges": links,
        "firings": traced.n,
        "latent": traced.latent,
    }


def _node(
    name: str, label: str, column: int, row: int, value: float, about: Mapping[str, Any]
) -> dict[str, Any]:
    about = {"rule": about.get("rule"), "contexts": about.get("contexts", [])}
    return {
        "id": name,
        "label": label,
        "column": column,
        "row": row,
        "value": _digits(value),
        **about,
    }


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
