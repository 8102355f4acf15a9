"""Parts of edges by the head that carries them."""

from __future__ import annotations

import torch

from sae_experiments.studies.attribution.heads import (
    edge_heads,
    n_parts,
    name_of,
    split,
    targets_of,
)
from sae_experiments.studies.attribution.influence import prune
from sae_experiments.studies.attribution.local import LocalModel
from support.attribution_worlds import every_world, graph_of, local_model


def parts_of(local: LocalModel, rows: torch.Tensor) -> torch.Tensor:
    """Parts (R, parts, S) of everything but biases that goes into rows of the adjacency."""
    n = local.sources.positions.stop
    target, source = torch.ones(len(rows), n).nonzero(as_tuple=True)
    parts = split(local, targets_of(local, rows), target, source)
    return parts.view(len(rows), n, -1).transpose(1, 2)


def parts_into(local: LocalModel, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of a layer, and the parts (R, parts, S) of what goes into them, biases aside."""
    chosen = (local.nodes.layer == layer).nonzero().squeeze(1)
    return chosen, parts_of(local, chosen)


@every_world
def test_the_parts_of_an_edge_sum_to_it(kind: str, cross: bool, skip: bool) -> None:
    local, adjacency = local_model(kind, cross, skip)
    columns = slice(0, local.sources.positions.stop)
    for layer in range(local.n_layer):
        chosen, parts = parts_into(local, layer)
        torch.testing.assert_close(parts.sum(1), adjacency.weights[chosen][:, columns])
        later = 1 + (layer + 1) * local.frozen.blocks[0].n_head
        assert not bool(parts[:, later:].any())
        # No head, no other position.
        latents = parts[:, 0, local.sources.latents] != 0
        elsewhere = local.nodes.position[chosen, None] != local.nodes.position
        assert not bool((latents & elsewhere).any())
    parts = parts_of(local, torch.arange(local.nodes.n, len(adjacency.weights)))
    torch.testing.assert_close(parts.sum(1), adjacency.weights[local.nodes.n :][:, columns])
    through = parts[:, :, : local.sources.tokens.stop].abs().amax((0, 2))
    assert bool((through > 1e-4).all())


def test_a_head_that_is_silenced_takes_its_part_of_the_edges_along() -> None:
    local, adjacency = local_model()
    layer, head = 2, 1
    chosen, parts = parts_into(local, layer)
    local.frozen.clean[layer].weights[0, head] = 0
    without = local.adjacency().weights[chosen]
    part = parts[:, 1 + layer * local.frozen.blocks[0].n_head + head]
    columns = slice(0, local.sources.positions.stop)
    assert float(part.abs().max()) > 1e-2
    torch.testing.assert_close(adjacency.weights[chosen][:, columns] - without[:, columns], part)


def test_every_edge_of_a_pruned_graph_is_split() -> None:
    local, adjacency = local_model(memory_mb=0.5)
    assert local.batch < local.nodes.n
    graph = graph_of(local, adjacency)
    _, edges = prune(graph, 0.8, 0.9)
    parts = edge_heads(local, edges)
    assert parts.shape == (int(edges.sum()), n_parts(local))
    torch.testing.assert_close(parts.sum(1), graph.weights[edges])


def test_heads_are_named_by_block_and_number() -> None:
    local, _ = local_model()
    names = [name_of(local, i) for i in range(n_parts(local))]
    assert names[:4] == [None, "block 1 head 1", "block 1 head 2", "block 2 head 1"]
    assert names[-1] == "block 4 head 2"
