"""Worlds with planted features: their statistics, dictionaries that are the truth or chance,
and the study end to end.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.metrics import f1_score

from sae_experiments.errors import UserError
from sae_experiments.metrics import recovery
from sae_experiments.metrics.base import EvalContext
from sae_experiments.metrics.recovery import Truth
from sae_experiments.studies.ground_truth.world import World
from support.command_line import assert_is_refused, in_this_process
from support.metric_worlds import CPU, Chunked, Given
from support.planted import recipe

OPTIONS = {"rows": None, "min_fires": 5, "found": 0.9, "seed": 0}


def oracle(world: World) -> Given:
    """A dictionary that is the truth; it can read its features off only where they are
    orthogonal.
    """
    return Given(world.directions, b_enc=torch.full((len(world.directions),), -1.5))


def measure(world: World, sae: Given, kind: type[EvalContext] = EvalContext, n: int = 6000):
    acts = world.acts(n, 7)
    return recovery.measure(
        kind(
            sae=sae,
            device=CPU,
            x=world.rows(acts, 8),
            extras={"truth": Truth(world.directions, acts)},
        ),
        **OPTIONS,
    )


def orthogonal(seed: int = 0) -> World:
    world = World(recipe(width=80), seed, CPU)
    world.directions = torch.linalg.qr(world.directions)[0]
    return world


def test_the_truth_scores_1_and_a_random_dictionary_little():
    world = orthogonal()
    found = measure(world, oracle(world)).scalars
    for name in ("truth_mcc", "truth_uniqueness", "truth_recovered_frac"):
        assert found[name] == pytest.approx(1)
    assert found["truth_f1"] > 0.95
    chance = measure(
        world,
        Given(
            torch.nn.functional.normalize(
                torch.randn(80, 80, generator=torch.Generator().manual_seed(5)), dim=1
            )
        ),
    ).scalars
    assert (
        chance["truth_mcc"] == pytest.approx(chance["truth_mcc_random"], abs=0.03)
        and chance["truth_mcc"] < 0.35
    )
    assert chance["truth_recovered_frac"] == 0 and chance["truth_f1"] < 0.5


def test_signs_order_and_chunks_do_not_matter_and_missing_latents_do():
    world = orthogonal()
    plain = measure(world, oracle(world)).scalars
    assert measure(world, oracle(world), Chunked).scalars == pytest.approx(plain)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(2))
    moved = Given(
        world.directions[order], w_dec=-world.directions[order], b_enc=torch.full((80,), -1.5)
    )
    assert measure(world, moved).scalars["truth_mcc"] == pytest.approx(1)
    half = Given(world.directions[:40], b_enc=torch.full((40,), -1.5))
    found = measure(world, half).scalars
    assert found["truth_mcc"] == pytest.approx(1), "no dictionary of 40 can hold more"
    assert found["truth_recovered_frac"] == pytest.approx(0.5) and found["truth_uniqueness"] == 1
    bias = torch.full((80,), -1.5)
    bias[40:] = -1e6
    assert measure(world, Given(world.directions, b_enc=bias)).scalars[
        "truth_mcc"
    ] == pytest.approx(0.5), "dead latents count"
    twice = measure(world, Given(world.directions[:40].repeat(2, 1))).scalars
    assert twice["truth_uniqueness"] == pytest.approx(0.5)


def test_f1_agrees_with_scikit_learn():
    chance = np.random.default_rng(0)
    on, fires = chance.random((300, 4)) < 0.3, chance.random((300, 6)) < 0.4
    expected = [max(f1_score(on[:, g], fires[:, j]) for j in range(6)) for g in range(4)]
    found = recovery.best_f1(
        sparse.csr_matrix(on.astype(float)), sparse.csr_matrix(fires.astype(float))
    )
    np.testing.assert_allclose(found, expected)


def test_f1_of_latents_is_against_the_feature_they_point_to():
    chance = np.random.default_rng(1)
    on, fires = chance.random((300, 4)) < 0.3, chance.random((300, 6)) < 0.4
    nearest = np.array([0, 3, 3, 1, 2, 0])
    expected = [f1_score(on[:, g], fires[:, j]) for j, g in enumerate(nearest)]
    found = recovery.nearest_f1(
        sparse.csr_matrix(on.astype(float)), sparse.csr_matrix(fires.astype(float)), nearest
    )
    np.testing.assert_allclose(found, expected)


def test_what_cannot_be_measured_is_null_with_a_reason():
    world = orthogonal()
    unknown = recovery.measure(EvalContext(sae=Given(), device=CPU, x=torch.randn(9, 4)), **OPTIONS)
    dead = measure(world, Given(world.directions, b_enc=torch.full((80,), -1e6)))
    broken = measure(world, Given(world.directions * torch.nan))
    for found in (unknown, dead, broken):
        assert set(found.scalars) == {i.name for i in recovery.INFO} == set(found.why_null) and set(
            found.scalars.values()
        ) == {None}


# ------------------------------------------------------------------------------------------------
# the world


def test_features_fire_as_often_as_the_recipe_says():
    world = World(recipe(), 0, CPU)
    acts = world.acts(60_000, 3)
    density = (acts > 0).double().mean(0).numpy()
    free = np.array(world.free)
    np.testing.assert_allclose(density[free], world.free_probability.numpy(), atol=0.008)
    assert world.free_probability.max() == pytest.approx(
        0.3
    ) and world.free_probability.min() == pytest.approx(0.01)
    for i, p in enumerate(world.structure.parent):
        if p >= 0:
            assert density[i] == pytest.approx(density[p] * 0.8 / 3, rel=0.3, abs=0.002)


def test_children_come_with_their_parent_only_one_at_a_time_and_scaled():
    world = World(recipe(spread=0.0), 1, CPU)
    on = world.acts(20_000, 3) > 0
    for i, children in zip(world.inner(), world.children, strict=True):
        assert not (on[:, children] & ~on[:, i : i + 1]).any() and on[:, children].sum(1).max() <= 1
    assert set(np.round(world.acts(500, 3).unique().tolist(), 4)) == {
        0.0,
        4.5,
    }, "without spread all magnitudes are equal"
    sizes = World(recipe(), 1, CPU).acts(20_000, 3)
    child, parent = int(world.children[0][0]), world.inner()[0]
    both = sizes[:, child] > 0
    assert np.corrcoef(sizes[both, child], sizes[both, parent])[0, 1] > 0.5


def test_rows_are_a_function_of_the_seed_and_sums_of_directions():
    world, again = World(recipe(), 4, CPU), World(recipe(), 4, CPU)
    acts = world.acts(50, 9)
    assert torch.equal(acts, again.acts(50, 9)) and not torch.equal(acts, world.acts(50, 10))
    assert torch.allclose(world.rows(acts, 1), acts @ world.directions) and torch.allclose(
        world.directions.norm(dim=1), torch.ones(80)
    )
    assert not torch.equal(World(recipe(), 5, CPU).directions, world.directions)


@pytest.mark.parametrize(
    "bad",
    [
        {"p_min": 0.0},
        {"p_max": 1.0},
        {"child": 1.5},
        {"features": 10},
        {"width": 0},
        {"correlation": 1.0},
    ],
)
def test_recipes_that_cannot_work_are_refused(bad):
    with pytest.raises(
        UserError, match=f"study.world.*{next(iter(bad)) if 'features' not in bad else 'features'}"
    ):
        recipe(**bad)


def test_the_study_runs_end_to_end_and_again_from_the_cache(experiment, capsys):
    args = (
        "study=ground_truth",
        "sae=[batch_topk,random]",
        "preset=smoke",
        "study.train.steps=30",
        "study.held_out_rows=600",
        "seeds=[0,1]",
        "workers=1",
        "report=false",
    )
    first = in_this_process(experiment, *args, "--out_dir=g", tiny=False)
    assert first == 0, capsys.readouterr().err
    found = experiment.json("g", "final_info.json")
    assert set(found) == {"planted.batch_topk", "planted.random"}
    assert len(found["planted.batch_topk"]["final_info_dict"]["truth_mcc"]) == 2
    assert in_this_process(experiment, *args, "--out_dir=h", tiny=False) == 0
    assert experiment.json("h", "final_info.json") == found


def test_an_sae_that_needs_a_language_model_is_refused(experiment, capsys):
    args = ("study=ground_truth", "sae=end_to_end", "preset=smoke")
    assert_is_refused(experiment, capsys, "needs a language model", *args, tiny=False)
