"""Noise of one size: what each kind is, and what the metric says about codes whose stability is
known.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sae_experiments.errors import UserError
from sae_experiments.metrics.base import EvalContext
from sae_experiments.metrics.robustness import curves
from sae_experiments.metrics.robustness import measure as robustness
from sae_experiments.metrics.robustness.margins import confirmed, crosstalk, has_margins, radii
from sae_experiments.metrics.robustness.noise import NoiseSource
from sae_experiments.metrics.robustness.sums import Distributions, Sums
from sae_experiments.saes.base import Codes
from sae_experiments.saes.ops import unit_rows
from sae_experiments.saes.pattern import Pattern
from sae_experiments.saes.purified import perturb
from sae_experiments.saes.purified.perturb import SHARED, TYPES, NoiseModel
from support.common import CONF
from support.metric_worlds import CPU, Given, ctx, play
from support.saes import NAMES, make, trained
from support.saes import rows as sparse_rows

D, N = 12, 20_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Rows with very different variances a direction, and a mean."""
    return torch.randn(N, D, generator=generator(3)) @ torch.diag(2.0 ** -torch.arange(D)) + 5


@pytest.fixture(scope="module")
def cloud(rows) -> NoiseModel:
    return NoiseModel(D).learn(rows)


def options(**changes):
    found = OmegaConf.to_container(OmegaConf.load(CONF / "metric" / "robustness.yaml"))
    small = {
        "rows": 2048,
        "type_rows": 512,
        "curve_rows": 256,
        "min_fires": 5,
        "margin_rows": 64,
        "windows": 4,
        "block": 2,
        "structure_latents": 50,
    }
    return {k: v for k, v in found.items() if not k.startswith("_")} | small | changes


def test_the_cloud_knows_mean_radius_and_covariance(rows, cloud):
    torch.testing.assert_close(cloud.mean, rows.mean(0))
    assert cloud.radius.item() == pytest.approx(
        (rows - rows.mean(0)).norm(dim=1).mean().item(), rel=1e-5
    )
    covariance = torch.cov(rows.t())
    torch.testing.assert_close(
        cloud.root @ cloud.root.t(), covariance / covariance.trace(), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("kind", SHARED)
def test_shared_directions_have_mean_square_length_one_and_the_right_covariance(cloud, kind):
    found = cloud.directions(kind, N, generator())
    assert found.square().sum(1).mean().item() == pytest.approx(1, rel=0.03)
    expected = cloud.root @ cloud.root.t() if kind == "covariance" else torch.eye(D) / D
    torch.testing.assert_close(found.t() @ found / N, expected, rtol=0.1, atol=0.01)
    if kind == "uniform":
        assert found.abs().max().item() <= math.sqrt(3 / D)


def test_mask_removes_squared_size_eps_of_the_centred_row():
    rows = torch.randn(N, D, generator=generator(4)) + 5
    cloud = NoiseModel(D).learn(rows)
    delta = cloud.mask(rows, 0.3, generator())
    gone = delta != 0
    torch.testing.assert_close(
        (rows + delta)[gone], cloud.mean.expand_as(rows)[gone], rtol=0, atol=1e-5
    )
    assert delta.square().sum().item() == pytest.approx(
        0.09 * (rows - cloud.mean).square().sum().item(), rel=0.03
    )


def test_steps_towards_another_row_have_the_asked_for_length_and_do_not_go_past_it(rows, cloud):
    other = rows.roll(1, 0)
    delta = cloud.towards(rows, other, 0.1, beyond=True)
    torch.testing.assert_close(delta.norm(dim=1), torch.full((N,), 0.1 * cloud.radius.item()))
    swap = cloud.towards(rows, other, 50.0, beyond=False)
    torch.testing.assert_close(rows + swap, other, rtol=0, atol=1e-4)
    assert bool((cloud.towards(rows, rows, 0.1, beyond=True) == 0).all())


def test_attacks_have_the_asked_for_length_and_harm_more_than_chance(cloud, rows):
    sae = Given(torch.randn(40, D, generator=generator(1)))
    x, reach = rows[:500], 0.3
    chance = unit_rows(torch.randn(500, D, generator=generator())) * reach

    @torch.no_grad()
    def harm(delta):
        return float((sae.encode(x + delta) - sae.encode(x)).square().sum())

    one, many = (perturb.pgd(sae.encode, x, reach, steps, generator()) for steps in (1, 5))
    for delta in (one, many):
        assert delta.norm(dim=1).max().item() <= reach * 1.001
    torch.testing.assert_close(one.norm(dim=1), torch.full((500,), reach))
    assert harm(one) > 1.5 * harm(chance) and harm(many) > 1.02 * harm(one)


def test_shares_are_whole_numbers_that_add_up():
    counts = perturb.shares(
        {"gaussian": 0.4, "covariance": 0.2, "targeted": 0.3, "fgsm": 0.1, "mask": 0.0}, 7
    )
    assert (
        sum(counts.values()) == 7
        and list(counts) == ["gaussian", "covariance", "fgsm", "targeted"]
        and counts["gaussian"] == 3
    )
    with pytest.raises(UserError, match="gausian"):
        perturb.checked({"gausian": 1.0}, "mixture")
    with pytest.raises(UserError, match="no kind"):
        perturb.checked(dict.fromkeys(TYPES, 0.0), "mixture")


def test_rows_of_a_pattern_are_taken_in_their_order():
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    values = torch.arange(1.0, 8)
    part, place = perturb.take_rows(Pattern.from_mask(mask), torch.tensor([3, 1, 0]))
    assert part.dense(values[place]).tolist() == [[5, 6, 7], [0, 0, 0], [1, 0, 2]]


def test_targets_are_active_latents_of_the_wanted_sort():
    codes = Codes(torch.tensor([[3.0, 1.0, 0, 0], [0, 2.0, 9.0, 0], [0, 0, 0, 0]]).repeat(400, 1))
    decoder = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0], [0, 1.0], [-1.0, 0], [0.1, 1.0]]), dim=1
    )

    def chosen(**aim):
        return perturb.choose(
            codes, torch.tensor([0.5, 1.0, 0.9, 0.0]), torch.ones(4, 2), decoder, aim, generator()
        ).view(-1, 3)

    weak = chosen(weak=1.0)
    assert set(weak[:, 2].tolist()) == {-1}
    assert (weak[:, 0] == 0).float().mean() > 0.99 and (
        weak[:, 1] == 2
    ).float().mean() > 0.99  # the others are as stable as can be
    assert chosen(marginal=1.0)[0].tolist() == [1, 1, -1]
    near = chosen(confusable=1.0)
    assert (
        set(near[:, 0].tolist()) == {3}
        and set(near[:, 1].tolist()) == {1, 3}
        and set(near[:, 2].tolist()) == {-1}
    )


# ------------------------------------------------------------------------------------------------
# measures


def test_measures_by_hand():
    sums = Sums(3)
    sums.add(torch.tensor([[2.0, 0, 0], [2.0, 4.0, 0]]), torch.tensor([[1.0, 0, 0], [3.0, 0, 1.0]]))
    assert sums.change() == pytest.approx(100 * (1 + 1 + 4 + 1) / 8)
    np.testing.assert_allclose(sums.fss(), [100 * (1 - 2 / 8), 0, 0])
    np.testing.assert_allclose(sums.latent_change(), [50, 100, np.nan])
    found = sums.summary(sums.alive(1))
    assert found["jaccard"] == pytest.approx((1 + 1 / 3) / 2) and found["flips"] == pytest.approx(
        1000 * 2 / 6
    )
    assert found["flip_share"] == pytest.approx(5 / 7)
    assert (
        found["sci"] is None and found["sci_skipped"] == 2
    )  # z of the first is constant, z~ of the second is


def test_an_unchanged_code_is_perfectly_stable_and_a_disjoint_one_not_at_all():
    z = torch.rand(100, 6, generator=generator()) * (
        torch.rand(100, 6, generator=generator(1)) < 0.5
    )
    same, other = Sums(6), Sums(6)
    same.add(z, z)
    other.add(z, (z == 0).float())
    found = same.summary(same.alive(1))
    assert (
        found["fss"] == found["fss_pooled"] == 100
        and found["sci"] == pytest.approx(1)
        and found["jaccard"] == 1
        and found["change"] == 0
    )
    assert (
        other.summary(other.alive(1))["fss"] == 0 and other.summary(other.alive(1))["jaccard"] == 0
    )


def test_gaussian_change_of_a_linear_code_is_the_closed_form():
    """Identity encoder far from its thresholds: |dz| is half-normal with standard deviation eps
    R / sqrt d.
    """
    x = 10 + torch.randn(4096, 8, generator=generator())
    found = robustness.measure(
        EvalContext(sae=Given(d_in=8), device=CPU, x=x), **options(rows=None)
    ).scalars
    sigma = 0.1 * float(NoiseModel(8).learn(x).radius) / math.sqrt(8)
    assert found["rob_change"] == pytest.approx(100 * sigma * math.sqrt(2 / math.pi) / 10, rel=0.03)
    assert found["rob_flips"] == 0 and found["rob_jaccard"] == 1 and found["rob_flip_share"] == 0
    assert found["rob_crosstalk"] == pytest.approx(0, abs=1e-8) and found[
        "rob_slope"
    ] == pytest.approx(1, rel=1e-4)
    assert found["rob_change_token"] is None


@pytest.mark.parametrize("name", ["standard", "batch_topk", "topk", "jumprelu", "purified"])
def test_certified_radii_hold_by_brute_force(name):
    sae = trained(name, n_train=60)
    x = sparse_rows(200, 5)
    assert has_margins(sae) and confirmed(sae, x, 300, 0) == 1
    row, _, radius = radii(sae, x[:20])
    found = sae.encode(x[:20]) != 0
    for i in range(
        20
    ):  # nothing changes within the smallest radius of a row, in any of many directions
        least = radius[row == i].min() if bool((row == i).any()) else None
        if least is not None:
            away = unit_rows(torch.randn(200, x.shape[1], generator=generator(i))) * least * 0.999
            assert bool(((sae.encode(x[i] + away) != 0) | ~found[i]).all())


@pytest.mark.parametrize("name", NAMES)
def test_every_sae_has_radii_that_hold_or_none(name):
    sae = make(name).eval()
    assert not has_margins(sae) or confirmed(sae, sparse_rows(200, 5), 200, 0) == 1


def test_a_wrong_radius_is_not_confirmed(monkeypatch):
    sae = trained("batch_topk", n_train=60)
    from sae_experiments.metrics.robustness import margins as robustness_margins

    right = robustness_margins.radii
    monkeypatch.setattr(
        robustness_margins, "radii", lambda *a: (*right(*a)[:2], right(*a)[2] * 1.2)
    )
    assert confirmed(sae, sparse_rows(200, 5), 300, 0) < 0.1


def test_crosstalk_of_a_dictionary_with_known_gram_matrix():
    """Unit rows with cosine 0.6 and a tied encoder: a step along one moves the other by 0.6 of
    it.
    """
    rows = torch.tensor([[1.0, 0], [0.6, 0.8]])
    noises = NoiseSource(sae=Given(rows), cloud=NoiseModel(2), attack_steps=1, seed=0, alt=None)
    ratio, slope = crosstalk(noises, torch.full((50, 2), 10.0), 0.1)
    assert ratio == pytest.approx(0.36, rel=1e-3) and slope == pytest.approx(1, rel=1e-3)


def test_folds_agree_where_latents_differ_and_do_not_where_they_do_not():
    latent, noise = (
        np.random.default_rng(0).normal(size=(200, 1)),
        np.random.default_rng(1).normal(size=(200, 5)),
    )
    real, chance = (robustness._agreement(t) for t in (80 + 5 * latent + noise, 80 + noise))
    assert (
        real["fold_icc"] == pytest.approx(25 / 26, abs=0.02)
        and real["fold_rank"] > 0.9
        and real["fold_sd"] == pytest.approx(1, abs=0.1)
    )
    assert abs(chance["fold_icc"]) < 0.1 and abs(chance["fold_rank"]) < 0.1


def test_distances_between_distributions():
    z = torch.tensor([[0.0, 2.0], [1.0, 2.0], [2.0, 2.0], [3.0, 2.0]])
    found = Distributions(z, z + torch.tensor([0.5, 0.0]), np.array([0, 1]), 8)
    assert found.wasserstein == pytest.approx(
        (0.5 / 1.5 + 0) / 2
    ) and found.zero_mass == pytest.approx((-0.25 + 0) / 2)
    counts = found.arrays(np.array([50.0, 60.0]), 2)["rob_hist_counts"]
    assert counts.shape == (2, 2, 8) and counts[0, 0].sum() == 3 and counts[1].sum() == 8


def test_area_and_half_size():
    assert curves.area([0, 0.1, 1], np.array([100, 80.0, 40.0])) == pytest.approx(60)
    assert curves.size_at_half([0, 0.1, 1], np.array([100, 60.0, 40.0])) == pytest.approx(
        math.sqrt(0.1)
    )
    assert curves.size_at_half([0, 0.1], np.array([100, 60.0])) is None


def test_the_fvu_under_noise_is_that_of_the_size_asked_for():
    """The identity rebuilds the noisy row: its error is the noise, eps^2 R^2 per row."""
    x = torch.randn(2000, 8, generator=generator()) + 10
    radius = float(NoiseModel(8).learn(x).radius)
    variance = float((x - x.mean(0)).square().sum(1).mean())
    for eps in (0.1, 0.25):
        given = options(rows=None, curve_rows=2000, type_rows=2000, eps=eps)
        scalars = robustness.measure(
            EvalContext(sae=Given(d_in=8), device=CPU, x=x), **given
        ).scalars
        expected = eps**2 * radius**2 / variance
        assert scalars["rob_denoised_fvu"] == pytest.approx(expected, rel=0.05), eps


def test_broken_or_constant_input_is_null_with_a_reason():
    for x in (torch.full((256, 4), math.nan), torch.full((256, 4), 2.0)):
        found = robustness.measure(EvalContext(sae=Given(), device=CPU, x=x), **options(rows=None))
        assert set(found.scalars.values()) == {None} and set(found.why_null) == set(found.scalars)


def test_text_is_split_into_documents_and_everything_has_a_value_or_a_reason():
    found = robustness.measure(
        ctx(play(6000), lambda t: [np.array([ord(c) % m for c in t]) / m for m in (3, 5, 7, 11)]),
        **options(rows=None, min_fires=20),
    )
    assert {k for k, v in found.scalars.items() if v is None} == set(found.why_null)
    assert found.scalars["rob_fold_rank"] is not None and found.noise["rob_change"] > 0
    assert found.scalars["rob_change_pgd"] >= found.scalars["rob_change_gaussian"]
