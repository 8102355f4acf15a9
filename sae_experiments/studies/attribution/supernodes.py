"""Groups of latents that play the same role in a graph.

Two latents are alike if their edges are: the cosine of what they write to, averaged with that of
what they read from. Groups come from average-linkage clustering of the latents at one position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from sae_experiments.studies.attribution.influence import Graph

#: Distance of latents that never share a group, beyond those of opposite edges (2).
APART = 3.0


def likeness(graph: Graph, chosen: Tensor) -> Tensor:
    """Likeness (r, r) of latents (r,): mean cosine of their edges out and their edges in."""
    out = F.normalize(graph.weights[:, chosen].t(), dim=1)
    into = F.normalize(graph.weights[chosen], dim=1)
    return (out @ out.t() + into @ into.t()) / 2


def group_latents(graph: Graph, position: Tensor, kept: Tensor, least: float) -> list[Tensor]:
    """Groups of at least two latents at one position that are alike.

    Args:
        graph: The graph, before pruning.
        position: Position of each latent, (n,).
        kept: Latents to group, (n,) as booleans.
        least: Minimum mean likeness within a group, -1 to 1.

    Returns:
        Latents of each group, the group with the most influence first.
    """
    chosen = kept.nonzero().squeeze(1)
    if len(chosen) < 2:
        return []
    distance = 1 - likeness(graph, chosen).double().cpu()
    where = position[chosen].cpu()
    distance[where[:, None] != where] = APART
    distance.fill_diagonal_(0)
    distance = ((distance + distance.t()) / 2).clamp_min(0)
    tree = linkage(squareform(distance.numpy(), checks=False), "average")
    label = torch.from_numpy(fcluster(tree, 1 - least, "distance")).to(chosen.device)
    groups = [chosen[label == i] for i in label.unique()]
    return _by_influence(graph, [group for group in groups if len(group) > 1])


def _by_influence(graph: Graph, groups: Sequence[Tensor]) -> list[Tensor]:
    influence = graph.influence()[0]
    return sorted(groups, key=lambda group: -float(influence[group].sum()))
