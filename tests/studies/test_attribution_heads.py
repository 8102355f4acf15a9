"""Parts of edges by the head that carries them."""

from __future__ import annotations

import torch

from sae_experiments.studies.attribution.heads import edge_heads, head_rows, n_parts, name_of
from sae_experiments.studies.attribution.influence import prune
from sae_experiments.studies.attribution.local import LocalModel
from support.attribution_worlds import every_world, graph_of, local_model


def parts_into(local: LocalModel, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of a layer, and the parts (R, parts, S) of what goes into them."""
    chosen = (local.nodes.layer == layer).nonzero().squeeze(1)
    vectors, _ = local.read_vectors(layer, chosen)
    return chosen, head_rows(local, layer, local.nodes.position[chosen], vectors)


@every_world
def test_the_parts_of_an_edge_sum_to_it(kind: str, cross: bool, skip: bool) -> None:
    local, adjacency = local_model(kind, cross, skip)
    for layer in range(local.n_layer):
        chosen, parts = parts_into(local, layer)
        torch.testing.assert_close(parts.sum(1), adjacency.weights[chosen])
        later = 1 + (layer + 1) * local.frozen.blocks[0].n_head
        assert not bool(parts[:, later:].any())
        # No head, no other position.
        latents = parts[:, 0, local.sources.latents] != 0
        elsewhere = local.nodes.position[chosen, None] != local.nodes.position
        assert not bool((latents & elsewhere).any())
    at = torch.full((len(local.logits.token),), local.length - 1)
    parts = head_rows(local, local.n_layer, at, local.logit_vectors()[0])
    torch.testing.assert_close(parts.sum(1), adjacency.weights[local.nodes.n :])
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
    assert float(part[:, columns].abs().max()) > 1e-2
    torch.testing.assert_close(
        adjacency.weights[chosen][:, columns] - without[:, columns], part[:, columns]
    )


def test_every_edge_of_a_pruned_graph_is_split() -> None:
    local, adjacency = local_model()
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
