"""Removing virtual weights takes from a latent what reaches it along the residual path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sae_experiments.models.frozen import FrozenModel
from sae_experiments.saes.cross_layer import EveryLayer
from sae_experiments.studies.attribution import removal
from sae_experiments.studies.attribution.heads import split, targets_of
from sae_experiments.studies.attribution.local import LocalModel
from sae_experiments.studies.attribution.virtual import VirtualWeights
from support.attribution_worlds import CASES, world

every_case = pytest.mark.parametrize(("kind", "cross"), CASES)


def pre_acts(sae: EveryLayer, frozen: FrozenModel, removed: list[Tensor]) -> list[Tensor]:
    """Pre-activations of every layer's latents in a run without some weights."""
    seen: list[Tensor] = []
    plain = sae.is_active

    def spy(layer: int, pre: Tensor) -> Tensor:
        seen.append(pre)
        return plain(layer, pre)

    sae.is_active = spy
    try:
        frozen.held(removal.without(sae, frozen, removed))
    finally:
        del sae.is_active
    return seen


def ranked(kind: str, cross: bool) -> tuple[nn.Module, EveryLayer, Tensor, removal.Ranked]:
    lm, sae, ids = world(kind, cross=cross)
    return lm, sae, ids, removal.rank(VirtualWeights(lm, sae, ids), 0)


@every_case
def test_without_a_weight_removed_the_run_is_the_frozen_replacement(kind: str, cross: bool) -> None:
    lm, sae, ids, every = ranked(kind, cross)
    frozen = FrozenModel(lm, ids)
    shape = (len(ids), ids.shape[1])
    plain = frozen.held(sae.replacement(shape)).logits
    for order in removal.ORDERS:
        kept = frozen.held(removal.without(sae, frozen, every.removed(order, 0.0))).logits
        torch.testing.assert_close(kept, plain)
    gone = frozen.held(removal.without(sae, frozen, every.removed("size", 1.0))).logits
    assert (gone - plain).abs().max() > 1e-2


@every_case
def test_a_target_loses_the_edges_that_pass_no_head(kind: str, cross: bool) -> None:
    lm, sae, ids, every = ranked(kind, cross)
    prompt = ids[:1]
    local = LocalModel(lm, sae, prompt)
    frozen = FrozenModel(lm, prompt)
    nothing, everything = (every.removed("size", share) for share in (0.0, 1.0))
    # Codes of the first layer have no error before them: they are those of the clean run.
    lost = pre_acts(sae, frozen, nothing)[1] - pre_acts(sae, frozen, everything)[1]
    nodes = local.nodes
    chosen = (nodes.layer == 1).nonzero().squeeze(1)
    target, source = torch.ones(len(chosen), nodes.n).nonzero(as_tuple=True)
    parts = split(local, targets_of(local, chosen), target, source)
    wanted = parts[:, 0].view(len(chosen), -1).sum(1)
    assert wanted.abs().max() > 1e-3
    position, latent = nodes.position[chosen], nodes.latent[chosen]
    torch.testing.assert_close(lost[0, position - frozen.n_begin, latent], wanted.to(lost))


def test_orders_put_small_weights_first_and_count_each_once() -> None:
    lm, sae, ids, every = ranked("gpt2", True)
    assert every.n_weights == removal.count_weights(sae) == sum(w.numel() for w in every.weights)
    into = VirtualWeights(lm, sae, ids).into(torch.arange(sae.d_sae))
    for order, table in (("size", into.plain), ("expected", into.expected)):
        places = every.places[order]
        assert sorted(torch.cat([p.flatten() for p in places]).tolist()) == list(
            range(every.n_weights)
        )
        by_target = torch.cat([place.t().flatten() for place in places]).numpy()
        rows = [table[sae.latents_of(k), : k * sae.per_layer].ravel() for k in range(sae.n_sites)]
        size = np.abs(np.concatenate(rows))
        assert (np.diff(size[np.argsort(by_target)]) >= 0).all()
    half = every.removed("random", 0.5)
    removed = sum(int((part != 0).sum()) for part in half)
    assert removed == round(0.5 * every.n_weights)


def test_the_number_is_the_last_share_before_the_loss_rises() -> None:
    shares = np.array([0.0, 0.5, 0.9, 1.0])
    curves = {"virtual_removed": shares}
    rises = {"expected": [0, -0.01, 0.005, 0.4], "size": [0, 0.02, 0.001, 0.4], "random": [0] * 4}
    curves |= {f"virtual_rise_{order}": np.array(rise) for order, rise in rises.items()}
    assert removal.numbers(curves) == {
        "virtual_removable_expected": 0.9,
        "virtual_removable_size": 0.0,
        "virtual_removable_random": 1.0,
        "virtual_worth": 0.4,
    }


def test_losses_are_those_of_the_runs() -> None:
    lm, sae, ids = world("gpt2", cross=True)
    virtual = VirtualWeights(lm, sae, ids)
    x, y = ids[:, :-1], ids[:, 1:]
    curves = removal.measure(virtual, x, y, 0)
    frozen = FrozenModel(lm, x)

    def loss(logits: Tensor) -> float:
        log_p = logits[:, 1:].log_softmax(-1)
        return -float(log_p.gather(2, y[:, 1:, None]).mean()) / np.log(2)

    plain = loss(frozen.held(sae.replacement((len(x), x.shape[1]))).logits)
    every = removal.rank(virtual, 0)
    for order in removal.ORDERS:
        rise = curves[f"virtual_rise_{order}"]
        assert rise[0] == 0 and len(rise) == len(removal.SHARES)
        for i in (3, len(rise) - 1):
            removed = every.removed(order, removal.SHARES[i])
            run = frozen.held(removal.without(sae, frozen, removed))
            assert rise[i] == pytest.approx(loss(run.logits) - plain, abs=1e-5)
