"""The unit of the data, their mean and their shape do not matter: laws over all SAEs of
conf/sae.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_experiments import load_sae, save_sae
from sae_experiments.errors import UserError
from sae_experiments.fitting.fit import Sample, fit_saes, units_of
from sae_experiments.saes.base import SAE, Batch
from support.interchange import EXPORTABLE
from support.saes import L0, NAMES, D, config, downstream, effect, make, rows, trained
from support.scaled import OFFSET, SD, numbers

every_sae = pytest.mark.parametrize("name", NAMES)

Map = Callable[[Tensor], Tensor]


def _itself(x: Tensor) -> Tensor:
    return x


def fitted(
    name: str,
    there: Map = lambda x: x,
    back: Map = lambda x: x,
    target: Map | None = None,
    **settings: Any,
) -> SAE:
    """An SAE of rows mapped by ``there``; ``back`` undoes it for the stand-in of the language
    model.
    """
    sae, start, held = make(name, **settings), there(rows(2048, 10)), there(rows(4096, 11))
    if target is None or name == "end_to_end":
        target = _itself

    def batch_at(step: int) -> Batch:
        x = there(rows(128, step))
        rest = downstream(x)._replace(effect=lambda tokens, recon: effect(tokens, back(recon)))
        return Batch(x, target(x), None, rest)

    fit_saes(
        {name: sae},
        batch_at,
        config(steps=60, batch_size=128),
        Sample(start, target(start), held),
        seed=0,
        dead_after=4000,
    )
    return sae


def close(
    found: tuple[float, float, float], expected: tuple[float, float, float], rel: float
) -> None:
    fvu, l0, dead = expected
    assert found[0] == pytest.approx(fvu, rel=rel)
    assert found[1] == pytest.approx(l0, rel=rel)
    assert found[2] == pytest.approx(dead, abs=0.03)


@pytest.fixture(scope="module")
def plain() -> Callable[[str], tuple[float, float, float]]:
    found: dict[str, tuple[float, float, float]] = {}

    def of(name: str) -> tuple[float, float, float]:
        if name not in found:
            found[name] = numbers(fitted(name), rows(4096, 77))
        return found[name]

    return of


@every_sae
def test_an_offset_of_1000_standard_deviations_changes_nothing(name, plain):
    sae = fitted(name, lambda x: x + OFFSET, lambda x: x - OFFSET)
    close(numbers(sae, rows(4096, 77) + OFFSET), plain(name), 0.05)


@every_sae
def test_the_unit_of_the_data_changes_nothing(name, plain):
    factor = 2.0 ** (20 if NAMES.index(name) % 2 else -20)
    sae = fitted(name, lambda x: x * factor, lambda x: x / factor)
    close(numbers(sae, rows(4096, 77) * factor), plain(name), 1e-3)


@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder", "standard", "jumprelu", "gated"])
def test_inputs_and_targets_have_their_own_mean_and_unit(name):
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(4)))[0]
    one = fitted(name, target=lambda x: x @ turn)
    two = fitted(
        name, lambda x: 3 * x + OFFSET, target=lambda x: 1e-3 * ((x - OFFSET) / 3) @ turn - 0.7
    )
    x = rows(4096, 77)
    moved = 3 * x + OFFSET
    y = 1e-3 * ((moved - OFFSET) / 3) @ turn - 0.7
    close(numbers(two, moved, y), numbers(one, x, x @ turn), 0.05)


@pytest.mark.parametrize("name", ["tied", "lista", "hierarchical"])
def test_an_sae_that_rebuilds_what_it_reads_is_told_when_it_should_not(name):
    with pytest.raises(UserError, match=r"sae\.write=null"):
        fitted(name, target=lambda x: 2 * x)


def test_robust_units_do_not_see_a_hundredth_of_huge_rows():
    x = rows(4000, 5)
    spoilt = x.clone()
    spoilt[::100, 3] += 100 * SD
    clean, found = (units_of(v, "x", scale="robust") for v in (x, spoilt))
    torch.testing.assert_close(found.centre, clean.centre, atol=0.02 * SD, rtol=0)
    torch.testing.assert_close(found.scale, clean.scale, rtol=0.03, atol=0)
    assert float(units_of(spoilt, "x").scale[0] / clean.scale[0]) < 0.2, "the mean square sees them"


def test_constant_rows_and_unknown_ways_to_scale():
    units = units_of(torch.full((5, 2), 0.1), "x")
    assert units.scale.tolist() == pytest.approx([1 / (0.1 * 2**0.5)] * 2)
    for x, said in ((torch.zeros(5, 2), "zero"), (torch.full((5, 2), torch.nan), "non-finite")):
        with pytest.raises(UserError, match=said):
            units_of(x, "rows")
    with pytest.raises(UserError, match=r"fit\.scale='median' is not one of spread, robust, none"):
        units_of(torch.ones(5, 2), "x", scale="median")
    assert units_of(rows(9, 0), "x", scale="none").scale.tolist() == [1.0] * D


@every_sae
def test_any_number_of_leading_dimensions(name):
    sae, x = trained(name, n_train=20), rows(24, 6)
    acts = sae.encode(x)
    for shape in ((2, 12), (2, 3, 4), (1, 24), (24,)):
        there = x.view(*shape, D)
        torch.testing.assert_close(sae.encode(there), acts.view(*shape, -1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            sae.pre_acts(there), sae.pre_acts(x).view(*shape, -1), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            sae.decode(acts.view(*shape, -1)),
            sae.decode(acts).view(there.shape),
            rtol=1e-5,
            atol=1e-6,
        )
        torch.testing.assert_close(
            sae.contributions(there_acts := sae.encode(there), x[0]).view(24, -1),
            sae.contributions(acts, x[0]),
            rtol=1e-4,
            atol=1e-5,
        )
        torch.testing.assert_close(sae(there), sae(x).view(there.shape), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            sae.reconstruct(there, there_acts), sae(there), rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(sae(x[0]), sae(x[:1])[0], rtol=1e-5, atol=1e-6)
    assert sae.decode(acts[0]).shape == (D,)
    assert sae.encode(x[:0]).shape == (0, sae.d_sae) and sae(x[:0].view(2, 0, D)).shape == (2, 0, D)


@every_sae
def test_other_types_are_read_and_wrong_widths_named(name):
    sae, x = trained(name, n_train=20), rows(24, 6)
    torch.testing.assert_close(sae(x.half()), sae(x.half().float()))
    torch.testing.assert_close(sae.encode(x.double().numpy()), sae.encode(x))
    assert torch.isfinite(trained(name, n_train=20).bfloat16()(x)).all()
    for call, width in (
        (sae.encode, "d_in"),
        (sae, "d_in"),
        (sae.pre_acts, "d_in"),
        (sae.decode, "d_sae"),
    ):
        with pytest.raises(UserError, match=f"do not fit {width}="):
            call(torch.zeros(3, 7))


@pytest.mark.parametrize("name", EXPORTABLE)
@pytest.mark.parametrize("pre_bias", [True, False])
def test_a_directory_holds_the_mean(name, pre_bias, tmp_path):
    """Where b_dec is subtracted it holds the mean; else the encoder's bias does, and loses
    digits that a sum in float32 has not.
    """
    sae = fitted(name, lambda x: x + OFFSET, lambda x: x - OFFSET, pre_bias=pre_bias)
    x = rows(4096, 77) + OFFSET
    save_sae(sae, tmp_path / "sae", reference=x[:64], metadata={})
    loaded, weights = (
        load_sae(tmp_path / "sae"),
        load_file(tmp_path / "sae" / "sae_weights.safetensors"),
    )
    close(numbers(loaded, x), numbers(sae, x), 1e-3)
    seen = x - weights["b_dec"] if pre_bias else x  # as sae-lens computes it
    pre = seen @ weights["W_enc"] + weights.get("b_enc", weights.get("b_gate"))
    torch.testing.assert_close(pre, loaded.pre_acts(x), rtol=1e-3, atol=1e-3 * float(pre.std()))


def test_the_l0_asked_for_is_met_far_from_the_origin():
    sae = fitted("batch_topk", lambda x: x + OFFSET, lambda x: x - OFFSET)
    assert numbers(sae, rows(16384, 78) + OFFSET)[1] == pytest.approx(L0, rel=0.03)
