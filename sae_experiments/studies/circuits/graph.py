"""Attribution graphs: the upstream latents behind the firings of one downstream latent.

Edges are the same upstream latent at the same lag, averaged over many firings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.files import rounded
from sae_experiments.sampling import evenly_spaced
from sae_experiments.studies.circuits import check
from sae_experiments.studies.circuits.attribution import Circuit, Prompts, Targets, concatenated


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitGraphSpec:
    """Downstream latents that get a graph, and the size of the graphs."""

    latents: Sequence[int] | None
    """Latents by index; None: those most specific to one n-gram."""
    count: int
    """Number of latents if they are not given by index."""
    order: int
    """Characters or tokens of the n-gram to which they are specific."""
    min_fires: int
    """Held-out firings that such a latent needs."""
    upstream_latent: int | None
    """Latent marked in the histogram of gradients; None: that of the largest attribution."""
    firings: int
    """Firings that a graph averages over, at even quantiles of their strength."""
    edges: int
    """Strongest upstream latents shown."""
    contexts: int
    """Strongest contexts of a node."""
    before: int
    """Characters of a context before the firing."""
    after: int
    """Characters of a context after the firing."""

    def __post_init__(self) -> None:
        for name in ("count", "order", "min_fires", "firings", "edges"):
            if getattr(self, name) < 1:
                raise UserError(f"study.graph.{name}={getattr(self, name)} must be at least 1")


class Edge(NamedTuple):
    """One upstream latent at one lag, over all firings of the downstream latent."""

    latent: int
    lag: int
    """Positions between the two latents."""
    weight: float
    """Mean attribution over all firings, 0 where the latent is not active."""
    effect: float
    """Mean effect of removing the latent over all firings, 0 where it is not active."""
    value: float
    """Mean activation where it is active."""
    active: int
    """Number of firings in which it is active."""


class TracedLatent(NamedTuple):
    """The graph of one downstream latent."""

    latent: int
    n: int
    """Number of firings."""
    value: float
    """Mean pre-activation."""
    edges: list[Edge]
    """The strongest edges."""
    others: float
    """Mean attribution of all other upstream latents."""
    error: float
    """Mean attribution of the upstream SAE's error."""
    gradients: np.ndarray
    """Gradients at the strongest firing, of each active upstream latent that it can depend on."""
    marked: int
    """Number of the marked one among these."""
    every: np.ndarray
    """Gradients (F,) of all upstream latents, active or not, at the position of that firing."""
    here: np.ndarray
    """Mask (F,) of those that are active there."""
    interest: int
    """The marked upstream latent."""


class _Upstream(NamedTuple):
    """Active upstream latents that the targets can depend on, as N pairs of E kinds."""

    pairs: check.Pairs
    latent: Tensor
    """Upstream latent of each pair, (N,)."""
    kinds: Tensor
    """Latent and lag of each kind, as `latent * length + lag`, (E,)."""
    kind: Tensor
    """Kind of each pair, (N,)."""
    length: int
    """Positions of a prompt."""


def firings_of(prompts: Prompts, latent: int, n: int) -> Targets:
    """At most `n` firings of a downstream latent in the prompts, in the order of the prompts.

    They lie at even quantiles of strength.
    """
    at = (prompts.active.latent == latent).nonzero().squeeze(1)
    strongest = at[torch.argsort(prompts.active_value[at], descending=True, stable=True)]
    places = evenly_spaced(np.arange(len(at)), n)
    return prompts.active[strongest[torch.from_numpy(places).to(at.device)].sort().values]


def trace(
    circuit: Circuit, prompts: Prompts, latent: int, spec: CircuitGraphSpec, *, steps: int
) -> TracedLatent | None:
    """Find the strongest edges into a downstream latent.

    Args:
        circuit: The two SAEs.
        prompts: The prompts.
        latent: The downstream latent.
        spec: Size of the graph.
        steps: Points of integrated gradients; 0: the plain gradient.

    Returns:
        The graph; None if the latent never fires in the prompts, or nothing is active upstream.
    """
    targets = firings_of(prompts, latent, spec.firings)
    if not targets.n:
        return None
    calls = list(circuit.attribute(prompts, targets, steps=steps))
    gradient, attribution = concatenated(calls, "gradient"), concatenated(calls, "attribution")
    value = check.clean(circuit, prompts, targets)
    allowed = check.reachable(prompts, targets, same=False)
    upstream = _upstream(prompts, targets, allowed)
    if not len(upstream.kind):
        return None
    of_error = sum(
        float((call.state_gradient * prompts.error[call.targets.prompt]).sum()) for call in calls
    )
    pairs = upstream.pairs
    summed = attribution.new_zeros(len(upstream.kinds))
    summed.index_add_(0, upstream.kind, pairs.of(attribution))
    best = summed.abs().topk(min(spec.edges, len(summed))).indices
    others = (float(attribution[allowed].sum()) - float(summed[best].sum())) / targets.n
    strongest = int(value.argmax())
    own_pairs = (pairs.row == strongest).nonzero().squeeze(1)
    own_latents = upstream.latent[own_pairs]
    marked = _marked(own_latents, pairs.of(attribution)[own_pairs], spec.upstream_latent)
    position = int(targets.position[strongest])
    every = circuit.directions @ concatenated(calls, "state_gradient")[strongest, position]
    active_here = torch.zeros(len(every), dtype=torch.bool, device=every.device)
    active_here[own_latents[pairs.position[own_pairs] == position]] = True
    return TracedLatent(
        latent=latent,
        n=targets.n,
        value=float(value.mean()),
        edges=_edges(circuit, prompts, targets, upstream, summed, best),
        others=others,
        error=of_error / targets.n,
        gradients=pairs.of(gradient)[own_pairs].cpu().numpy(),
        marked=marked,
        every=every.cpu().numpy(),
        here=active_here.cpu().numpy(),
        interest=int(own_latents[marked]) if spec.upstream_latent is None else spec.upstream_latent,
    )


def _upstream(prompts: Prompts, targets: Targets, allowed: Tensor) -> _Upstream:
    """The active upstream latents in a mask (R, T, K)."""
    pairs = check.Pairs(*allowed.nonzero(as_tuple=True))
    lag = targets.position[pairs.row] - pairs.position
    latent = prompts.index[targets.prompt[pairs.row], pairs.position, pairs.slot]
    length = prompts.index.shape[1]
    kinds, kind = torch.unique(latent * length + lag, return_inverse=True)
    return _Upstream(pairs, latent, kinds, kind, length)


def _edges(
    circuit: Circuit,
    prompts: Prompts,
    targets: Targets,
    upstream: _Upstream,
    summed: Tensor,
    best: Tensor,
) -> list[Edge]:
    """The edges of some kinds.

    Args:
        circuit: The two SAEs.
        prompts: The prompts.
        targets: Firings of the downstream latent.
        upstream: The active upstream latents.
        summed: Attribution of each kind, summed over the firings, (E,).
        best: Kinds to measure.
    """
    chosen = torch.isin(upstream.kind, best)
    kind = upstream.kind[chosen]
    pairs = check.Pairs(*(x[chosen] for x in upstream.pairs))
    effects = check.single_effects(circuit, prompts, targets, pairs)
    values = prompts.value[targets.prompt[pairs.row], pairs.position, pairs.slot]
    edges = []
    for i in best.tolist():
        here = kind == i
        latent, lag = divmod(int(upstream.kinds[i]), upstream.length)
        edge = Edge(
            latent=latent,
            lag=lag,
            weight=float(summed[i]) / targets.n,
            effect=float(effects[here].sum()) / targets.n,
            value=float(values[here].mean()),
            active=int(here.sum()),
        )
        edges.append(edge)
    return edges


def _marked(latents: Tensor, attribution: Tensor, wanted: int | None) -> int:
    """Position of the largest attribution, among those of the wanted latent if it is there.

    Args:
        latents: Upstream latents, (m,).
        attribution: Their attributions, (m,).
        wanted: The latent to mark; None: any.
    """
    counts = torch.ones_like(latents, dtype=torch.bool)
    if wanted is not None and bool((latents == wanted).any()):
        counts = latents == wanted
    return int((attribution.abs() * counts).argmax())


def as_dict(
    traced: TracedLatent,
    title: str,
    up: Mapping[int, Mapping[str, Any]],
    down: Mapping[int, Mapping[str, Any]],
    sites: tuple[str, str],
) -> dict[str, Any]:
    """The graph as JSON for the report.

    Args:
        traced: The graph.
        title: Its title.
        up: `rule` and `contexts` of each upstream latent.
        down: The same of the downstream latent.
        sites: Names of the two sites.
    """
    target = f"down.{traced.latent}"
    label = f"{sites[1]} #{traced.latent}"
    nodes = [_node(target, label, (1, 0), traced.value, down[traced.latent])]
    links = []
    for e in traced.edges:
        name = f"up.{e.latent}@{-e.lag}"
        node = _node(name, f"{sites[0]} #{e.latent}", (0, -e.lag), e.value, up[e.latent])
        nodes.append(node | {"active_frac": rounded(e.active / traced.n, 4)})
        weights = {"weight": rounded(e.weight, 4), "effect": rounded(e.effect, 4)}
        links.append({"from": name, "to": target, **weights})
    last_row = min((-e.lag for e in traced.edges), default=0)
    rest = (
        ("others", "all other latents", traced.others),
        ("error", "what the SAE leaves out", traced.error),
    )
    for i, (name, label, weight) in enumerate(rest, 1):
        nodes.append(_node(name, label, (0, last_row - i), 0.0, {}))
        links.append({"from": name, "to": target, "weight": rounded(weight, 4)})
    return {
        "title": title,
        "nodes": nodes,
        "edges": links,
        "firings": traced.n,
        "latent": traced.latent,
    }


def _node(
    name: str, label: str, place: tuple[int, int], value: float, about: Mapping[str, Any]
) -> dict[str, Any]:
    """A node at a column and a row; `about` holds its rule and contexts."""
    return {
        "id": name,
        "label": label,
        "column": place[0],
        "row": place[1],
        "value": rounded(value, 4),
        "rule": about.get("rule"),
        "contexts": about.get("contexts", []),
    }
