"""Laws that every SAE of conf/sae obeys: a new variant is tested by having a YAML file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy import sparse
from torch import nn

from sae_experiments.errors import UserError
from sae_experiments.fitting.fit import Sample, fit_saes
from sae_experiments.fitting.laws import LAWS
from sae_experiments.metrics.codes import decoded
from sae_experiments.saes import base, ops
from sae_experiments.saes.base import SAE, Units
from sae_experiments.saes.matryoshka import Matryoshka
from sae_experiments.saes.pattern import Pattern
from support.saes import (
    L0,
    NAMES,
    D,
    M,
    batch,
    config,
    make,
    rows,
    sae_spec,
    step,
    subject,
    trained,
)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaN included."""
    return a.numpy().tobytes() == b.numpy().tobytes()


every_sae = pytest.mark.parametrize("name", NAMES)


@every_sae
@pytest.mark.parametrize("law", LAWS)
def test_law(name, law):
    assert LAWS[law](subject(name)) == ""


@every_sae
def test_what_latents_contribute_along_a_direction_sums_to_the_reconstruction(name):
    """In units of the activations: the fit folds its input scale into the weights, so that
    decoder rows are not of length 1 afterwards.
    """
    sae = trained(name, n_train=40)
    with torch.no_grad():
        if name == "hierarchical":
            sae.top.b_dec.zero_()  # what the top's bias writes belongs to no latent
    acts, direction = (
        sae.encode(rows(64, 1)),
        torch.randn(D, generator=torch.Generator().manual_seed(0)),
    )
    parts = sae.contributions(acts, direction)
    assert parts.shape == acts.shape and bool((parts[acts == 0] == 0).all())
    torch.testing.assert_close(
        parts.sum(1), (sae.decode(acts) - sae.b_dec) @ direction, rtol=1e-4, atol=1e-5
    )


@every_sae
def test_a_sparse_code_is_decoded_as_the_same_code_written_out(name):
    sae = trained(name, n_train=40)
    sizes = torch.randn(64, sae.d_sae, generator=torch.Generator().manual_seed(0))
    rare, common = sizes * (sizes > 2), sizes * (sizes > 0)
    for acts in (rare, common, torch.zeros_like(sizes)):
        codes = sparse.csr_matrix(acts.numpy())
        torch.testing.assert_close(decoded(sae, codes), sae.decode(acts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.02, 50.0])
@every_sae
def test_decoder_rows_are_all_in_the_units_of_the_activations(name, scale):
    """What multiplies codes by decoder rows, or compares their lengths, may not find one part
    of the latents in other units than the rest (tied weights leave their rows as they are, and
    scale the code).
    """
    sae = trained(name, n_train=40)
    before = sae.W_dec.norm(dim=1)
    units = Units(torch.zeros(D), torch.full((D,), 1 / scale))
    sae.rescale(units, units)
    factor = sae.W_dec.norm(dim=1) / before
    torch.testing.assert_close(
        factor, torch.full_like(factor, 1.0 if name == "tied" else scale), rtol=1e-4, atol=0
    )


def gradients(name, prepare=lambda sae: None):
    """The loss of one batch and its gradients; ``prepare`` sees the SAE first."""
    sae = make(name).train()
    sae.begin("train", rows(1024, 3), rows(1024, 3))
    prepare(sae)
    loss = sae.loss(batch(), step(sae))
    if any(g.params for phase in sae.phases() for g in phase.groups):
        loss.total.backward()
    return loss.total.item(), {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}


def agree(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    assert one[1].keys() == other[1].keys()
    for key, g in one[1].items():
        assert (g - other[1][key]).norm() <= 1e-4 * g.norm() + 1e-7, key


@every_sae
def test_sparse_and_dense_paths_agree_in_loss_and_gradients(name, monkeypatch):
    """Patterns are turned into masks on the dense side, so the same code meets both kinds of
    arithmetic.
    """

    def as_masks(sae):
        plain = sae.support
        sae.support = lambda pre: (
            s.dense(torch.ones_like(s.col, dtype=pre.dtype)) > 0
            if isinstance(s := plain(pre), Pattern)
            else s
        )

    if isinstance(make(name), Matryoshka):
        pytest.skip(
            "decode groups from the pattern itself; test_sae_math compares them with separate dense"
            " decodes"
        )
    monkeypatch.setattr(ops, "SPARSE_BELOW", 1.1)
    sparse = gradients(name)
    monkeypatch.setattr(ops, "SPARSE_BELOW", 0.0)
    agree(sparse, gradients(name, as_masks))


@every_sae
@pytest.mark.parametrize("rows_a_block", [7, 40])
def test_a_batch_in_blocks_of_rows_gives_the_loss_and_gradients_of_the_whole(
    name, rows_a_block, monkeypatch
):
    monkeypatch.setattr(ops, "SPARSE_BELOW", 1.1)
    whole = gradients(name)
    seen = []

    def watch(sae):
        plain = sae.support
        sae.support = lambda pre: (seen.append(len(pre)), plain(pre))[1]
        monkeypatch.setattr(base, "BLOCK", rows_a_block * sae.d_sae)

    agree(whole, gradients(name, watch))
    if name in ("topk", "standard", "jumprelu"):
        assert seen[0] == rows_a_block, "it was made in blocks"


@every_sae
def test_bf16_is_chosen_for_wide_sparse_codes_where_the_processor_has_it(name, monkeypatch):
    sae = sae_spec(name).build(D, D)
    assert sae_spec(name).matmul_precision == sae.matmul_precision == "auto"
    assert sae.matmul_dtype == torch.float32, "small"
    monkeypatch.setattr(ops, "BF16_FROM", 1)
    for native in (True, False):
        monkeypatch.setattr(ops, "cpu_has_bf16", lambda native=native: native)
        fast = native and sae.supports_bf16 and sae.always_sparse
        assert sae.matmul_dtype == (torch.bfloat16 if fast else torch.float32)


@every_sae
@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_coarse_product_decides_what_is_active_and_leaves_values_exact(
    name, in_blocks, monkeypatch
):
    if not make(name).supports_bf16:
        with pytest.raises(UserError, match="sae.matmul_precision=bf16"):
            sae_spec(name, "sae.matmul_precision=bf16").build(D, D)
        return
    monkeypatch.setattr(ops, "SPARSE_BELOW", 1.1)
    assert sae_spec(name, "sae.matmul_precision=bf16").build(D, D).matmul_dtype == torch.bfloat16
    sae, plain = make(name).train(), make(name).train()
    sae.matmul_precision = "bf16"
    if in_blocks:
        monkeypatch.setattr(base, "BLOCK", 7 * sae.d_sae)
    coarse, exact = sae.training_forward(batch()), plain.training_forward(batch())
    pattern = coarse.codes.pattern
    rounded = nn.functional.linear(
        sae.encoder_input(batch().x).bfloat16(), sae.W_enc.bfloat16()
    ).float()
    assert not torch.allclose(
        coarse.active_pre, pattern.gather(rounded.detach() + sae.bias()), atol=1e-5
    ), "bf16 was asked for and would show"
    torch.testing.assert_close(
        coarse.active_pre,
        pattern.gather(sae.pre_acts(batch().x).contiguous()),
        rtol=1e-5,
        atol=1e-5,
    )
    both = (pattern.dense(torch.ones_like(coarse.active_pre)) > 0) & (
        exact.codes.pattern.dense(torch.ones_like(exact.active_pre)) > 0
    )
    assert int(both.sum()) > 0.97 * len(exact.active_pre)
    monkeypatch.setattr(ops, "SPARSE_BELOW", 0.0)
    dense = sae.training_forward(batch())
    if (
        dense.codes.pattern is None
    ):  # the selections of the top-k family are patterns, however many are active
        torch.testing.assert_close(
            dense.active_pre,
            sae.pre_acts(batch().x) * (dense.active_pre != 0),
            rtol=1e-5,
            atol=1e-5,
        )
    assert torch.equal(sae.eval().encode(batch().x), plain.eval().encode(batch().x)), (
        "what is trained is used in float32"
    )


@every_sae
def test_folding_the_scale_changes_nothing_but_units(name):
    sae = make(name).eval()
    x = rows(64, 4)
    units = Units(torch.linspace(-3, 3, D), torch.full((D,), 0.37))
    scaled = units.apply(x)
    before_acts, before = sae.encode(scaled), units.undo(sae(scaled))
    sae.rescale(units, units)
    after_acts = sae.encode(x)
    assert ((before_acts != 0) == (after_acts != 0)).all()
    torch.testing.assert_close(sae(x), before, rtol=1e-4, atol=1e-5)
    if (
        name != "tied"
    ):  # a tied matrix cannot take a factor and its inverse: its codes change units too
        torch.testing.assert_close(after_acts, before_acts, rtol=1e-4, atol=1e-5)


@every_sae
def test_decoder_rows_stay_at_length_one(name):
    sae = make(name).train()
    if not sae.unit_decoder:
        pytest.skip("this variant's decoder is free")
    optimizer = torch.optim.Adam(list(sae.parameters()), lr=1e-2)
    for seed in range(10):
        loss = sae.loss(batch(256, seed), step(sae))
        if not loss.total.requires_grad:
            pytest.skip("nothing learns")
        loss.total.backward()
        sae.before_update()
        if sae.W_dec.grad is not None:
            radial = (sae.W_dec.grad * sae.W_dec.data).sum(1).abs()
            assert bool((radial <= 1e-5 * sae.W_dec.grad.norm(dim=1).clamp_min(1e-3)).all())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            sae.after_update(loss.extra, step(sae))
    # A hierarchical SAE's W_dec is in the units of the activations; its levels keep unit rows.
    levels = [part.W_dec for part in sae.parts] if name == "hierarchical" else [sae.W_dec]
    norms = torch.cat([rows.norm(dim=1) for rows in levels])
    torch.testing.assert_close(norms, torch.ones(M), rtol=0, atol=1e-5)


def test_what_is_fitted_beside_an_sae_does_not_change_it():
    names = ["batch_topk", "standard", "orthogonal"]

    def fit(chosen: list[str]) -> dict[str, SAE]:
        saes = {n: make(n) for n in chosen}
        start = rows(2048, 9)
        fit_saes(
            saes,
            lambda s: batch(128, s),
            config(steps=40),
            Sample(start, start, rows(2048, 10)),
            seed=3,
            dead_after=1000,
        )
        return saes

    together = fit(names)
    for name in names:
        alone = fit([name])[name]
        for key, value in alone.state_dict().items():
            assert same(value, together[name].state_dict()[key]), (name, key)


@every_sae
def test_an_l0_at_or_above_the_width_is_refused(name: str) -> None:
    """Every variant knows what it was asked for, so that it can be refused, and missed aloud."""
    asked = replace(sae_spec(name), d_sae=M)
    with torch.device("meta"):
        assert asked.build(D, D).fixed_l0 == (None if name == "kl_rate" else pytest.approx(L0))
        for d_sae in (L0, L0 - 1):
            with pytest.raises(UserError, match="target_l0|k=|k_start|latents"):
                replace(asked, d_sae=d_sae).build(D, D)
