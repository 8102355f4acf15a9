"""Groups of latents that are alike, and interventions on whole groups."""

from __future__ import annotations

import pytest
import torch

from sae_experiments.studies.attribution.checks import removals
from sae_experiments.studies.attribution.influence import Graph, prune
from sae_experiments.studies.attribution.interventions import Interventions
from sae_experiments.studies.attribution.supernodes import group_latents, likeness
from support.attribution_worlds import graph_of, local_model


def made_graph() -> tuple[Graph, torch.Tensor]:
    """Latents 0 and 1 have the same edges, 2 the same at another position, 3 opposite ones."""
    into = torch.tensor([[2.0, 1.0], [4.0, 2.0], [2.0, 1.0], [-2.0, -1.0]])
    weights = torch.zeros(6, 6)
    weights[:4, 4:] = into  # from two tokens
    weights[4:, :4] = torch.tensor([[1.0, 3.0, 1.0, -1.0], [-1.0, -3.0, -1.0, 1.0]])
    return Graph(weights, torch.tensor([0.5, 0.4]), 0), torch.tensor([1, 1, 0, 1])


def test_latents_with_the_same_edges_at_one_position_are_a_group() -> None:
    graph, position = made_graph()
    everything = torch.ones(4, dtype=torch.bool)
    like = likeness(graph, torch.arange(4))
    torch.testing.assert_close(like[0], torch.tensor([1.0, 1.0, 1.0, -1.0]))
    for least in (-0.9, 0.5, 1.0 - 1e-6):
        groups = group_latents(graph, position, everything, least)
        assert [group.tolist() for group in groups] == [[0, 1]]
    assert group_latents(graph, position, everything & (position == 0), 0.5) == []
    together = group_latents(graph, position, everything, -1.0)
    assert [group.tolist() for group in together] == [[0, 1, 3]]


def test_groups_of_a_graph_are_apart_and_alike() -> None:
    local, adjacency = local_model()
    graph = graph_of(local, adjacency)
    kept = prune(graph, 0.95, 0.98)[0][: graph.n]
    groups = group_latents(graph, local.nodes.position, kept, 0.3)
    assert len(groups) > 3
    members = torch.cat(groups)
    assert len(members.unique()) == len(members) and bool(kept[members].all())
    influence = graph.influence()[0]
    sizes = [float(influence[group].sum()) for group in groups]
    assert sizes == sorted(sizes, reverse=True)
    for group in groups:
        assert len(group) > 1 and len(local.nodes.position[group].unique()) == 1
        like = likeness(graph, group)
        pairs = like[~torch.eye(len(group), dtype=torch.bool)]
        assert float(pairs.mean()) >= 0.3 - 1e-9


@pytest.mark.parametrize("multiple", [0.0, 2.0])
def test_a_clamped_set_moves_everything_by_the_sum_of_its_columns_if_norms_are_held(
    multiple: float,
) -> None:
    local, adjacency = local_model()
    made = Interventions(local, adjacency, memory_mb=1e-1)
    chance = torch.Generator().manual_seed(0)
    sets = torch.rand(20, local.nodes.n, generator=chance) < 0.05
    assert made.batch < len(sets) and bool((sets.sum(1) > 1).all())
    predicted = made.direct(sets, multiple)
    measured = made.measure(sets, multiple, free=False, hold_norms=True)
    torch.testing.assert_close(measured.latents, predicted.latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measured.logits, predicted.logits, rtol=1e-4, atol=1e-5)
    one_by_one = sum(made.direct(made.one_each(sets[3].nonzero()[:, 0]), multiple).latents.unbind())
    torch.testing.assert_close(predicted.latents[3], one_by_one)
    later = made.later(sets)
    assert not bool((later & sets).any())
    assert not bool((predicted.latents != 0)[~later & ~sets].any())


def test_a_removed_group_changes_the_next_token_as_its_rerun_says() -> None:
    local, adjacency = local_model()
    made = Interventions(local, adjacency)
    groups = [torch.arange(0, local.nodes.n, 7), torch.tensor([3])]
    found = removals(made, groups)
    assert len(found) == 2 and removals(made, []) == []
    measured = made.measure(made.members(groups), 0.0, free=True).logits[:, 0]
    assert [one["measured"] for one in found] == pytest.approx(measured.tolist())
    assert found[0]["before"] == pytest.approx(float(local.logits.probability[0]))
    assert abs(found[0]["after"] - found[0]["before"]) > 1e-3
    everything = made.next_tokens(made.members(groups), 0.0)
    torch.testing.assert_close(everything.exp().sum(1), torch.ones(2, dtype=torch.float64))
