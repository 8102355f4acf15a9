"""Worlds of SynthSAEBench: sampling level by level is exact, and rates are as defined."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sae_experiments.errors import UserError
from sae_experiments.metrics.recovery import Truth
from sae_experiments.saes.types import Codes
from sae_experiments.studies.ground_truth.synth import (
    BLOCK,
    Synth,
    SynthWorld,
    conditional_rates,
    nominal_rates,
    orthogonalised,
)
from support.metric_worlds import CPU, Given


def recipe(**changes: Any) -> Synth:
    """A small world in which children compete and parents are often silent."""
    small = {"width": 16, "features": 24, "trees": 1, "p_max": 0.6, "p_min": 0.1, "depth": 2}
    return Synth(**(small | {"rank": 3, "correlation": 0.35, "spread": 2.0} | changes))


def node_by_node(world: SynthWorld, rows: int, seed: int) -> np.ndarray:
    """The definition, slowly: draw every feature of every row, then walk the trees in Python."""
    chance, r = np.random.default_rng(seed), world.recipe
    common = chance.standard_normal((rows, r.rank))
    score = common @ world.loadings.numpy().T
    score += chance.standard_normal(score.shape) * world.own.numpy()
    size = world.mean.numpy() + world.deviation.numpy() * chance.standard_normal(score.shape)
    acts = np.where(score > world.threshold.numpy(), np.maximum(size, 0), 0)

    def below(parent: int, level: int) -> None:
        if level == r.depth:
            return
        first = r.starts[level + 1] + r.branching * (parent - r.starts[level])
        children = list(range(first, first + r.branching))
        acts[:, children] *= (acts[:, parent] / world.mean[parent].item())[:, None]
        for row in np.flatnonzero((acts[:, children] > 0).sum(1) > 1):
            firing = [child for child in children if acts[row, child] > 0]
            stays = chance.choice(firing)
            for child in firing:
                if child != stays:
                    acts[row, child] = 0
        for child in children:
            below(child, level + 1)

    for root in range(r.trees):
        below(root, 0)
    return acts


def z_scores(one: np.ndarray, other: np.ndarray, n: int) -> np.ndarray:
    """Differences of two frequencies from n rows each, in standard errors of their difference."""
    pooled = (one + other) / 2
    error = np.sqrt(2 * np.maximum(pooled * (1 - pooled), 1 / n) / n)
    return (one - other) / error


def test_marginals_and_all_pairs_are_those_of_the_definition():
    n = 40_000
    world = recipe().draw(3, CPU)
    fast = world.acts(n, 5).dense().double().numpy()
    slow = node_by_node(world, n, 7)
    on, expected = (fast > 0).astype(float), (slow > 0).astype(float)
    assert np.abs(z_scores(on.mean(0), expected.mean(0), n)).max() < 4
    joint, joint_expected = on.T @ on / n, expected.T @ expected / n
    apart = ~np.eye(world.recipe.features, dtype=bool)
    z = z_scores(joint, joint_expected, n)[apart]
    assert np.abs(z).max() < 4.7 and z.std() < 1.3, "of 276 pairs"
    siblings = joint[1:5, 1:5][~np.eye(4, dtype=bool)]
    assert not siblings.any() and joint[0, 1:5].sum() > 0.1, "children exclude each other"
    # Magnitudes given firing, and how they go with the parent's.
    for feature in range(21):
        mean, mean_expected = (a[a[:, feature] > 0, feature].mean() for a in (fast, slow))
        spread = slow[slow[:, feature] > 0, feature].std()
        few = max(2, min(on[:, feature].sum(), expected[:, feature].sum()))
        assert abs(mean - mean_expected) < 4.5 * spread * math.sqrt(2 / few), feature
    child = on[:, 1] > 0
    rows = expected[:, 1] > 0
    with_parent = np.corrcoef(fast[child, 0], fast[child, 1])[0, 1]
    assert with_parent == pytest.approx(np.corrcoef(slow[rows, 0], slow[rows, 1])[0, 1], abs=0.05)


def test_a_wrong_sampler_would_be_noticed():
    """The comparison above has the power to tell a world without correlations from one with."""
    n = 40_000
    one, other = recipe().draw(3, CPU), recipe(correlation=0.0).draw(3, CPU)
    on, off = ((w.acts(n, 5).dense().numpy() > 0).astype(float) for w in (one, other))
    assert np.abs(z_scores(on.T @ on / n, off.T @ off / n, n)).max() > 8


def test_rates_are_as_defined():
    world = recipe(features=30, trees=1)
    p = nominal_rates(world)
    assert p[0] == pytest.approx(0.6) and p[-1] == pytest.approx(0.1)
    assert (p.diff() < 0).all() and world.starts == [0, 1, 5, 21]
    rate = conditional_rates(world, p)
    assert torch.equal(rate[21:], p[21:]) and rate[0] == p[0]
    shares = p[1:5] / p[0]
    assert rate[2] == pytest.approx(min(1, float(shares[1] * (1 + shares.sum() - shares[1]))))
    shares = p[9:13] / p[2]  # the children of feature 2
    assert rate[9] == pytest.approx(min(1, float(shares[0] * (1 + shares[1:].sum()))))


def test_the_published_world_has_its_published_numbers():
    """The true L0, and its parts by level, of arXiv 2602.14687."""
    full = Synth(width=8, features=16384, trees=128, p_max=0.4)
    world = full.draw(0, CPU)
    assert full.starts == [0, 128, 640, 2688, 10880]
    assert world.nominal[127] == pytest.approx(0.033, abs=5e-4)
    assert world.nominal.sum() == pytest.approx(59, abs=0.3)
    fires = world.acts(3000, 1).fires.double() / 3000
    levels = [float(fires[a:b].sum()) for a, b in zip(full.starts, full.starts[1:], strict=False)]
    assert levels == pytest.approx([8.2, 7.3, 7.3, 7.1], rel=0.04)
    assert float(fires[10880:].sum()) == pytest.approx(4.5, rel=0.04)
    assert float(fires[:4096].sum()) == pytest.approx(25.1, rel=0.03)


def test_rows_are_a_function_of_the_seed_and_sums_of_directions():
    world, again = recipe().draw(4, CPU), recipe().draw(4, CPU)
    acts = world.acts(BLOCK + 50, 9)
    assert isinstance(acts, Codes) and torch.equal(acts.dense(), again.acts(BLOCK + 50, 9).dense())
    assert not torch.equal(acts.dense(), world.acts(BLOCK + 50, 10).dense())
    expected = acts.dense() @ world.directions + world.bias
    assert torch.allclose(world.rows(acts), expected, atol=1e-5)
    assert world.bias.norm() == pytest.approx(0.5)
    assert not torch.equal(recipe().draw(5, CPU).directions, world.directions)


def test_directions_become_more_orthogonal_and_keep_their_length():
    start = torch.nn.functional.normalize(torch.randn(60, 12, generator=torch.Generator()), dim=1)
    end = orthogonalised(start, 100, lr=1e-2)
    assert torch.allclose(end.norm(dim=1), torch.ones(60))
    squares = [float((v @ v.t()).square().sum()) for v in (start, end)]
    assert squares[1] < 0.98 * squares[0]
    v = start.clone().requires_grad_()
    products = v @ v.t()
    off = products[~torch.eye(60, dtype=torch.bool)].square().sum()
    (off + 60 * (products.diagonal() - 1).square().sum()).backward()
    length = start.square().sum(1, keepdim=True)
    mine = 4 * (start @ (start.t() @ start) - length * start + 60 * (length - 1) * start)
    assert torch.allclose(v.grad, mine, atol=1e-3), "the gradient without the (G, G) matrix"
    assert orthogonalised(start, 0) is start


@pytest.mark.parametrize("n", [20, 64])
def test_sparse_and_dense_truth_are_the_same(n):
    world = recipe().draw(2, CPU)
    acts = world.acts(64, 1)
    one, other = (Truth(world.directions, a).active(n) for a in (acts, acts.dense()))
    assert one.shape == (n, 24) and (one != other).nnz == 0
    assert Given(world.directions).d_sae == 24


@pytest.mark.parametrize("bad", [{"p_min": 0.0}, {"p_max": 1.0}, {"trees": 2}, {"rank": 0}])
def test_recipes_that_cannot_work_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        recipe(**bad)


def test_the_generator_of_sae_lens_has_the_same_rates():
    sae_lens = pytest.importorskip("sae_lens", reason="the extra `peers` is not installed")
    from sae_lens.synthetic import ActivationGenerator
    from sae_lens.synthetic.hierarchy import HierarchyConfig, generate_hierarchy

    assert sae_lens
    world, n = recipe().draw(3, CPU), 40_000
    config = HierarchyConfig(
        total_root_nodes=1,
        branching_factor=4,
        max_depth=2,
        mutually_exclusive_portion=1.0,
        scale_children_by_parent=True,
    )
    tree = generate_hierarchy(24, config)
    nominal = world.nominal.float()
    rates = (nominal * tree.compute_probability_correction_factors(nominal)).clamp(max=1)
    torch.testing.assert_close(rates, conditional_rates(world.recipe, world.nominal).float())
    theirs = ActivationGenerator(
        24,
        rates,
        std_firing_magnitudes=world.deviation,
        mean_firing_magnitudes=world.mean,
        modify_activations=tree.modifier,
        correlation_matrix=(world.loadings, world.own.square()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = (theirs.sample(n).numpy() > 0).astype(float)
    on = (world.acts(n, 5).dense().numpy() > 0).astype(float)
    assert np.abs(z_scores(on.mean(0), expected.mean(0), n)).max() < 4
    assert np.abs(z_scores(on.T @ on / n, expected.T @ expected / n, n)).max() < 4.7
