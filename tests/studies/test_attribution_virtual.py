"""Virtual weights against the graphs of prompts, which they are means of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_experiments.studies.attribution.heads import split, targets_of
from sae_experiments.studies.attribution.local import LocalModel
from sae_experiments.studies.attribution.virtual import (
    VirtualWeightRows,
    VirtualWeights,
    interference,
    strongest,
)
from support.attribution_worlds import CASES, world


def stays(local: LocalModel, layer: int) -> tuple[Tensor, Tensor]:
    """Active latents of a layer, and what reaches them without passing a head, (R, n)."""
    chosen = (local.nodes.layer == layer).nonzero().squeeze(1)
    target, source = torch.ones(len(chosen), local.nodes.n).nonzero(as_tuple=True)
    parts = split(local, targets_of(local, chosen), target, source)
    return chosen, parts[:, 0].view(len(chosen), -1)


def means_over_prompts(lm: torch.nn.Module, sae: torch.nn.Module, ids: Tensor) -> np.ndarray:
    """Attributions along the residual path (F, F), weighted by the target's activation."""
    total, weight = torch.zeros(sae.d_sae, sae.d_sae).double(), torch.zeros(sae.d_sae).double()
    for prompt in ids.split(1):
        local = LocalModel(lm, sae, prompt)
        nodes = local.nodes
        number = nodes.layer * sae.per_layer + nodes.latent
        weight.index_add_(0, number, nodes.value.double())
        for layer in range(local.n_layer):
            chosen, edges = stays(local, layer)
            for target, row in zip(chosen.tolist(), edges.double(), strict=True):
                total[number[target]].index_add_(0, number, row * nodes.value[target])
    return (total / weight.clamp_min(1e-12)[:, None]).numpy()


@pytest.mark.parametrize(("kind", "cross"), CASES)
def test_expected_weights_are_means_of_edges_that_pass_no_head(kind: str, cross: bool) -> None:
    lm, sae, ids = world(kind, cross=cross)
    wanted = means_over_prompts(lm, sae, ids)
    found = VirtualWeights(lm, sae, ids, batch=2)
    latents = torch.arange(sae.d_sae)
    into, out_of = found.into(latents), found.out_of(latents)
    assert np.abs(wanted).max() > 0.05
    np.testing.assert_allclose(into.expected, wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(out_of.expected.T, wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(out_of.plain.T, into.plain, rtol=1e-5, atol=1e-9)
    some = torch.tensor([sae.d_sae - 9, 3, 37])
    np.testing.assert_allclose(found.into(some).plain, into.plain[some.numpy()])
    np.testing.assert_allclose(found.out_of(some).expected, out_of.expected[some.numpy()])


def test_a_plain_weight_is_an_edge_at_the_mean_scale() -> None:
    lm, sae, ids = world()
    local = LocalModel(lm, sae, ids[:1])
    nodes = local.nodes
    number = nodes.layer * sae.per_layer + nodes.latent
    found = VirtualWeights(lm, sae, ids)
    plain = torch.from_numpy(found.into(number).plain)[:, number]
    chosen, edges = stays(local, 3)
    here = nodes.position[chosen, None] == nodes.position
    scale = local.frozen.clean[3].rstd_2[0, nodes.position[chosen]]
    expected = plain[chosen] * nodes.value * scale / found.rstd[:, 3].mean()
    assert int(here.sum()) > 50
    torch.testing.assert_close(edges[here], expected[here])


def test_the_strongest_are_listed_and_interference_is_counted() -> None:
    plain = np.array([[0.0, 3.0, -2.0, 1.0]])
    weights = VirtualWeightRows(
        plain, np.array([[0.0, 0.0, -0.5, 0.9]]), np.array([[9.0, 0.0, 4.0, 7.0]])
    )
    assert strongest(weights, 3) == [[[3, 0.9, 1.0], [2, -0.5, -2.0]]]
    assert interference(weights)["virtual_never_share"] == 1.0
    nothing = VirtualWeightRows(*(np.zeros((1, 4)) for _ in range(3)))
    assert interference(nothing) == {"virtual_never_share": None, "virtual_rank_r": None}
