"""Dictionary geometry with known answers: orthonormal, doubled, permuted, rotated and dead
dictionaries, and brute force.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sae_experiments.metrics import geometry
from sae_experiments.metrics.base import EvalContext
from sae_experiments.saes.ops import unit_rows
from support.metric_worlds import CPU, Chunked, Given

OPTIONS = {"rows": None, "match": 2048, "block": 3, "twin": 0.5, "found_again": 0.7, "seed": 0}


def directions(n: int, d: int, seed: int = 0) -> Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def measure(
    sae: Given,
    *others: Given,
    kind: type[EvalContext] = EvalContext,
    x: Tensor | None = None,
    **options,
):
    x = torch.randn(500, sae.d_in, generator=torch.Generator().manual_seed(9)) if x is None else x
    return geometry.measure(kind(sae=sae, device=CPU, x=x, replicas=others), **(OPTIONS | options))


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(3)))[0]


def test_an_orthonormal_dictionary_has_no_coherence():
    found = measure(Given(torch.eye(8))).scalars
    assert found["dict_max_cosine"] == pytest.approx(0, abs=1e-9) and found[
        "dict_coherence_ratio"
    ] == pytest.approx(0, abs=1e-9)
    assert found["dict_twin_frac"] == 0 and found["dict_encoder_cosine"] == pytest.approx(1)


def test_a_doubled_dictionary_is_all_twins():
    found = measure(Given(torch.eye(5).repeat(2, 1))).scalars
    assert found["dict_max_cosine"] == pytest.approx(1) and found["dict_twin_frac"] == 1
    assert found["dict_coherence_ratio"] == pytest.approx(5 * 10 / 90)


def test_random_directions_have_ratio_1():
    found = measure(Given(directions(400, 32))).scalars
    assert found["dict_coherence_ratio"] == pytest.approx(1, rel=0.03)
    assert found["dict_max_cosine"] == pytest.approx(found["dict_max_cosine_random"], rel=0.03)


@pytest.mark.parametrize("block", [1, 4, 100])
def test_blocks_agree_with_brute_force(block):
    atoms = unit_rows(directions(10, 4).double())
    cosines = (atoms @ atoms.t()).fill_diagonal_(-math.inf)
    nearest, squares = geometry.within(atoms, block)
    assert torch.allclose(nearest, cosines.max(1).values)
    assert squares == pytest.approx(float(cosines[cosines > -math.inf].square().sum()))


def test_a_permuted_copy_is_found_again_whole():
    rows = directions(20, 8)
    found = measure(
        Given(rows), Given(rows[torch.randperm(20, generator=torch.Generator().manual_seed(1))])
    ).scalars
    for name in ("seed_mmcs", "seed_mmcs_back", "seed_matched_cosine", "seed_found_again"):
        assert found[name] == pytest.approx(1)
    assert (
        found["seed_mmcs_random"] < 0.85
        and found["seed_matched_random"] < found["seed_mmcs_random"]
    )


def test_a_rotated_copy_is_as_far_as_a_random_dictionary():
    rows = directions(60, 24)
    found = measure(Given(rows), Given(rows @ rotation(24))).scalars
    assert (
        found["seed_mmcs"] == pytest.approx(found["seed_mmcs_random"], abs=0.05)
        and found["seed_found_again"] == 0
    )


def test_a_part_of_a_dictionary_is_found_one_way_and_not_the_other():
    rows = torch.eye(10)
    found = measure(Given(rows), Given(rows[:5])).scalars
    assert found["seed_mmcs"] == pytest.approx(0.5) and found["seed_mmcs_back"] == pytest.approx(1)
    assert found["seed_matched_cosine"] == pytest.approx(1) and found[
        "seed_found_again"
    ] == pytest.approx(0.5)


def test_matching_the_decoder_alone_is_not_enough():
    rows = torch.eye(10)
    found = measure(Given(rows), Given(rows.roll(1, 1), w_dec=rows)).scalars
    assert found["seed_matched_cosine"] == pytest.approx(1) and found["seed_found_again"] == 0


def test_several_replicas_are_averaged():
    rows = directions(12, 12)
    same, turned = Given(rows), Given(rows @ rotation(12))
    one, two = measure(Given(rows), turned).scalars, measure(Given(rows), same, turned).scalars
    assert two["seed_mmcs"] == pytest.approx((1 + one["seed_mmcs"]) / 2)


def test_dead_latents_are_left_out():
    bias = torch.zeros(8)
    bias[4:] = -100.0
    half = measure(Given(torch.cat([torch.eye(4), torch.eye(4)]), b_enc=bias))
    assert (
        half.scalars["dict_twin_frac"] == 0
        and int(torch.from_numpy(half.arrays["dict_max_cosine"]).isnan().sum()) == 4
    )


def test_the_size_of_chunks_changes_nothing():
    rows = directions(20, 8)
    assert (
        measure(Given(rows), Given(rows[:9]), kind=Chunked).scalars
        == measure(Given(rows), Given(rows[:9])).scalars
    )


def test_what_cannot_be_measured_is_null_with_a_reason():
    dead = measure(Given(torch.eye(4), b_enc=torch.full((4,), -100.0)))
    broken = measure(Given(torch.eye(4) * math.nan))
    alone = measure(Given(torch.eye(4)))
    for found in (dead, broken):
        assert set(found.scalars.values()) == {None} and set(found.why_null) == set(
            found.scalars
        ) == {i.name for i in geometry.INFO}
    assert (
        {k for k, v in alone.scalars.items() if v is None}
        == {i.name for i in geometry.ACROSS}
        == set(alone.why_null)
    )
    silent_twin = measure(Given(torch.eye(4)), Given(torch.eye(4), b_enc=torch.full((4,), -100.0)))
    assert silent_twin.why_null["seed_mmcs"] == "a replica is dead"
