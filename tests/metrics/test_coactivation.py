"""Co-activation against numpy's correlation coefficients, and pairs with known relations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sae_experiments.metrics import coactivation
from sae_experiments.metrics.base import EvalContext
from support.metric_worlds import CPU, Chunked, Given

OPTIONS = {
    "rows": None,
    "min_fires": 5,
    "block": 512,
    "partners": 3,
    "strong": 0.2,
    "contained": 0.9,
    "larger": 3,
}


def measure(x: np.ndarray, kind: type[EvalContext] = EvalContext, **options):
    x = torch.from_numpy(np.asarray(x, np.float32))
    return coactivation.measure(
        kind(sae=Given(d_in=x.shape[1]), device=CPU, x=x), **(OPTIONS | options)
    )


def codes(n: int = 600, m: int = 40, seed: int = 0) -> np.ndarray:
    chance = np.random.default_rng(seed)
    return (
        chance.random((n, m))
        * (chance.random((n, m)) < chance.uniform(0.05, 0.6, m))
        * (1 + (np.arange(n) % 3 == 0)[:, None])
    )


@pytest.mark.parametrize("block", [1, 7, 512])
def test_blocks_agree_with_correlation_coefficients(block):
    x = codes()
    found = measure(x, block=block, partners=39)
    off = ~np.eye(40, dtype=bool)
    phi, pearson = np.corrcoef((x > 0).T.astype(float)), np.corrcoef(x.T)
    assert found.scalars["coact_phi_rms"] == pytest.approx(
        np.sqrt(np.square(phi[off]).mean()), rel=1e-6
    )
    assert found.scalars["coact_pearson_rms"] == pytest.approx(
        np.sqrt(np.square(pearson[off]).mean()), rel=1e-5
    )
    assert found.scalars["coact_strong_frac"] == pytest.approx((np.abs(phi[off]) > 0.2).mean())
    apart = np.abs(
        found.arrays["coact_phi_hist"] - np.histogram(phi[off], coactivation.BIN_EDGES)[0]
    ).sum()
    assert apart <= 8, "but for a few values on an edge"
    ours = found.arrays["coact_partner_phi"]
    np.testing.assert_allclose(
        np.abs(ours), -np.sort(-np.abs(np.where(off, phi, 0)), axis=1)[:, :39], atol=1e-9
    )


def test_equal_opposite_and_independent_latents():
    chance = np.random.default_rng(0)
    a = chance.random(4000) < 0.5
    found = measure(np.stack([a, a, ~a, chance.random(4000) < 0.3], 1))
    assert (
        found.arrays["coact_partner_phi"][0, :2] == pytest.approx([1, -1])
        and abs(found.arrays["coact_partner_phi"][3, 0]) < 0.05
    )
    assert set(found.arrays["coact_partners"][0, :2]) == {1, 2}


def test_a_child_points_at_its_parent_and_not_the_other_way_round():
    parent = np.arange(1000) % 2 == 0
    child = np.arange(1000) % 10 == 0
    found = measure(np.stack([parent, child, np.arange(1000) % 3 == 0], 1))
    assert (
        found.arrays["coact_parent"].tolist() == [-1, 0, -1]
        and found.arrays["coact_containment"][1] == 1
    )
    assert found.scalars["coact_contained_frac"] == pytest.approx(1 / 3)


def test_constant_and_rare_latents_do_no_harm():
    x = np.zeros((100, 4))
    x[:, 0], x[:50, 1], x[::2, 2], x[:3, 3] = 1, 1, 1, 1
    found = measure(x)
    assert all(math.isfinite(v) for v in found.scalars.values())
    assert (
        found.arrays["coact_partners"][3].tolist() == [-1, -1]
        and np.isnan(found.arrays["coact_partner_phi"][3]).all()
    )


def test_the_size_of_chunks_and_the_unit_of_a_latent_change_nothing():
    x = codes()
    plain = measure(x).scalars
    assert measure(x, Chunked).scalars == plain
    assert measure(x * np.linspace(0.01, 100, 40)).scalars == pytest.approx(plain, rel=1e-4)


def test_what_cannot_be_measured_is_null_with_a_reason():
    for bad in (np.zeros((50, 3)), np.full((50, 3), np.nan)):
        found = measure(bad)
        assert set(found.scalars.values()) == {None} and set(found.why_null) == {
            i.name for i in coactivation.INFO
        }
