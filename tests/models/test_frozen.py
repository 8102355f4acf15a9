"""Language models of every layout with attention weights and norms held."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.models.begin import as_given
from sae_experiments.models.frozen import FrozenModel
from sae_experiments.models.hooks import Site, activations, capture, spliced
from support.attribution_worlds import BEGUN, LAYOUTS, language_model, prompts, world

every_model = pytest.mark.parametrize("kind", ["gpt2", *LAYOUTS, "llama plain" + BEGUN])
#: Some layouts norm and attend in single precision whatever their weights.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@every_model
@pytest.mark.parametrize("norms", [False, True])
def test_the_models_own_mlps_give_its_own_logits(kind: str, norms: bool) -> None:
    lm, ids = language_model(kind), prompts(kind, 3)
    frozen = FrozenModel(lm, ids)
    own = [clean.mlp_out[:, frozen.n_begin :] for clean in frozen.clean]
    run = frozen.held(lambda k, _: own[k], norms=norms)
    wanted = lm(input_ids=ids).logits
    torch.testing.assert_close(frozen.soft_capped(run.logits)[:, frozen.n_begin :], wanted, **CLOSE)
    sites = [Site("mlp_in", k + 1) for k in range(len(own))]
    for k, x in enumerate(activations(lm, ids, sites).values()):
        torch.testing.assert_close(run.mlp_in[k][:, frozen.n_begin :], x, **CLOSE)


@every_model
def test_what_is_added_freely_is_added_to_the_real_model(kind: str) -> None:
    """Each MLP writes its own output for the changed stream, and what is added to it."""
    lm, ids = language_model(kind), prompts(kind, 1)
    frozen = FrozenModel(lm, ids)
    n_layer = len(frozen.clean)
    more = noise(n_layer, 3, *ids.shape[1:], frozen.embedded.shape[2])
    more = torch.nn.functional.pad(more, (0, 0, frozen.n_begin, 0))
    run, clean = frozen.free(list(more)), frozen.free(list(0 * more))
    torch.testing.assert_close(clean.logits[:, 0], frozen.logits[:, -1].expand(3, -1), **CLOSE)
    assert float((run.logits - clean.logits).abs().max()) > 0.1
    given: dict[Site, Tensor] = {}
    for k in range(n_layer):
        site = Site("mlp_out", k + 1)
        with spliced(lm, given), capture(lm, [site]) as seen:
            lm(input_ids=ids.expand(3, -1), use_cache=False)
        given[site] = seen[site] + more[k][:, frozen.n_begin :]
    with spliced(lm, given):
        wanted = lm(input_ids=ids.expand(3, -1), use_cache=False).logits
    torch.testing.assert_close(frozen.soft_capped(run.logits[:, 0]), wanted[:, -1], **CLOSE)


@every_model
def test_with_everything_held_logits_are_linear_in_what_mlps_write(kind: str) -> None:
    lm, ids = language_model(kind), prompts(kind, 2)
    frozen = FrozenModel(lm, ids)
    a, b = noise(2, 2, *ids.shape[1:], frozen.embedded.shape[2])
    none, one, other, both = (
        frozen.held(lambda k, _, y=y: (k + 1) * y).logits for y in (0 * a, a, b, a + b)
    )
    torch.testing.assert_close(one + other - none, both, rtol=1e-8, atol=1e-8)


def test_a_begin_token_is_held_back_only_inside_the_context() -> None:
    kind = "llama plain" + BEGUN
    lm, ids = language_model(kind), prompts(kind, 2)
    begun = lm(input_ids=ids).logits
    with as_given(lm):
        plain = lm(input_ids=ids).logits
    assert torch.equal(lm(input_ids=ids).logits, begun) and not torch.equal(plain, begun)


def test_blocks_that_do_something_else_are_refused() -> None:
    lm, _, ids = world()
    handle = lm.transformer.h[1].attn.register_forward_hook(lambda m, a, out: (2 * out[0], out[1]))
    try:
        with pytest.raises(UserError, match="do not compute its logits"):
            FrozenModel(lm, ids)
    finally:
        handle.remove()
