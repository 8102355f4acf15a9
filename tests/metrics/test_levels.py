"""Metrics of levels on made data: correlations, permutation tests, autocorrelation, detection
of concepts, rates; and one whole small run.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import sparse

from sae_experiments.metrics.base import EvalContext
from sae_experiments.metrics.levels import effect as levels_effect
from sae_experiments.metrics.levels import meaning as levels_meaning
from sae_experiments.metrics.levels import measure as levels
from sae_experiments.metrics.levels.paths import levels_of, only
from sae_experiments.metrics.probing import Sample, Task
from sae_experiments.metrics.rate_distortion import Rated, bits_at, effect_sizes, strongest
from support.drawing import drawn
from support.metric_worlds import CPU, Given, ctx, play
from support.saes import batch, make

LEVELS = {"rows": None, "min_fires": 5, "pairs": 10, "map_top": 4, "map_bottom": 4, "relatives": 2}
MEANING = {
    "rows": None,
    "n_train": 400,
    "n_test": 400,
    "min_positives": 10,
    "skip": 0,
    "block": 4,
    "test_frac": 0.5,
    "thresholds": 5,
    "limit": 0.2,
    "fires": 5,
    "permutations": 200,
    "longest": 3,
    "min_count": 3,
    "predictable": 0.1,
    "order_rows": 4096,
    "seed": 0,
}


class Grouped(Given):
    """Latents with a group each: an SAE of two nested levels."""

    def __init__(self, groups: list[int]) -> None:
        super().__init__(d_in=len(groups))
        self.register_buffer("group", torch.tensor(groups))


def correlated(n: int = 4000) -> np.ndarray:
    """Four columns: two below (independent), two above: a noisy copy of the first, and a coin
    of its own.
    """
    chance = np.random.default_rng(0)
    values = chance.exponential(1.0, (n, 4)) * (chance.random((n, 4)) < 0.3)
    values[:, 2] = values[:, 0] * (1 + 0.1 * chance.random(n))
    return values.astype(np.float32)


def measured(x: np.ndarray, groups: list[int], **options):
    # Every row counts: exponential values among zeros may pass for outliers.
    ctx = EvalContext(sae=Grouped(groups), device=CPU, x=torch.from_numpy(x), outliers="keep")
    return levels.measure(ctx, **(LEVELS | options))


def test_the_inner_group_of_a_nested_sae_is_its_top():
    found = levels_of(Grouped([0, 1, 1, 0]))
    assert found["top"].tolist() == [0, 3] and found["bottom"].tolist() == [1, 2]
    assert list(levels_of(Grouped([0, 1, 2]))) == list(levels_of(Given(d_in=3))) == ["all"]


def test_one_level_of_a_nested_sae_decodes_without_the_other():
    sae, acts = Grouped([0, 1, 1, 0]), torch.rand(5, 4)
    assert torch.equal(only(sae, acts, "top"), acts * torch.tensor([1.0, 0, 0, 1]))


def test_sparsities_and_correlations_are_those_of_the_matrix():
    x = correlated()
    found = measured(x, [1, 1, 0, 0]).scalars
    assert found["bottom_sparsity"] == pytest.approx(float((x[:, :2] == 0).mean()), abs=1e-6)
    r = np.corrcoef(x.T)
    across = r[2:, :2]
    assert found["cross_pearson_rms"] == pytest.approx(math.sqrt((across**2).mean()), rel=1e-4)
    assert found["top_pearson_rms"] == pytest.approx(abs(r[2, 3]), rel=1e-3)
    phi = np.corrcoef((x > 0).T)
    assert found["cross_phi_rms"] == pytest.approx(math.sqrt((phi[2:, :2] ** 2).mean()), rel=1e-4)
    assert found["cross_fan_in"] == pytest.approx(0.5)
    best = [np.abs(row).max() ** 2 for row in across]
    assert found["cross_explained_1"] == pytest.approx(float(np.mean(best)), rel=1e-3)


def test_a_copy_is_redundant_and_a_coin_is_not():
    found = measured(correlated(), [1, 1, 0, 0])
    shared = found.arrays["levels_redundancy"]
    assert shared[0] > 0.95 and shared[1] < 0.01
    assert found.scalars["cross_redundant_frac"] == 0.5
    p = float((correlated()[:, 0] > 0).mean())
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert found.scalars["cross_mutual_information_bits"] == pytest.approx(entropy / 4, rel=0.02)
    assert (
        found.scalars["cross_value_information_bits"]
        > found.scalars["cross_mutual_information_bits"]
    ), "values say more than firing"
    assert found.scalars["cross_coherence"] == 0, "the atoms are unit vectors of their own"


def test_what_an_sae_lacks_is_null_with_a_reason():
    for groups in ([0, 0, 0, 0], [1, 1, 0, 0]):
        found = measured(correlated(), groups)
        nulls = {k for k, v in found.scalars.items() if v is None}
        assert nulls == set(found.why_null) and "gate_mean" in nulls
        assert ("cross_redundancy" in nulls) == (max(groups) == 0)
    assert set(measured(np.full((50, 4), np.nan, np.float32), [1, 1, 0, 0]).scalars.values()) == {
        None
    }


# --------------------------------------------------------------------------------------------------
# meaning


def test_the_autocorrelation_length_of_a_known_process():
    """A Markov chain of two states with flip probability f has r(l) = (1 - 2f)^l."""
    chance, length = np.random.default_rng(0), 128
    columns = []
    for flip in (0.02, 0.1, 0.5):
        state = (
            np.cumsum(chance.random((600, length)) < flip, axis=1) + chance.integers(0, 2, (600, 1))
        ) % 2
        columns.append(state.reshape(-1))
    found = levels_meaning.autocorrelation_lengths(
        sparse.csr_matrix(np.stack(columns, 1).astype(np.float32)), length, block=2
    )
    assert found[0] == pytest.approx(-1 / math.log(0.96), rel=0.06)
    assert found[1] == pytest.approx(-1 / math.log(0.8), rel=0.06)
    assert found[2] == pytest.approx(1 - 1 / math.e, abs=0.03), "interpolated between lags 0 and 1"


def test_a_constant_latent_has_no_autocorrelation_and_a_steady_one_the_longest():
    z = np.zeros((4 * 32, 2), np.float32)
    z[: 2 * 32, 1] = 1  # on in half of the windows, throughout
    found = levels_meaning.autocorrelation_lengths(sparse.csr_matrix(z), 32)
    assert np.isnan(found[0]) and found[1] == 31


def test_variance_by_character():
    chance = np.random.default_rng(1)
    chars = chance.integers(0, 20, 20_000)
    z = np.stack(
        [(chars == 3) * 2.0, chance.random(20_000), (chars < 10) + chance.normal(0, 0.5, 20_000)], 1
    )
    found = levels_meaning.variance_by_group(sparse.csr_matrix(z.astype(np.float32)), chars)
    assert found == pytest.approx([1, 0, 0.5], abs=0.02)


def test_permutation_tests_by_hand():
    values = np.array([1.0, 1, 1, 1, 3, 3, 3, 3, np.nan])
    gap, p = levels_meaning.permutation_test(values, np.arange(4, 9), np.arange(4), 999, 0)
    assert gap == 2 and p == pytest.approx(2 / math.comb(8, 4), abs=0.012)
    gap, p = levels_meaning.permutation_test(
        np.tile([1.0, 2.0], 6), np.arange(6), np.arange(6, 12), 99, 0
    )
    assert gap == 0 and p == 1
    assert levels_meaning.permutation_test(values, np.array([8]), np.arange(4), 9, 0) == (
        None,
        None,
    )


def test_detectors_score_one_and_coins_nothing():
    chance = np.random.default_rng(2)
    label = chance.random(8000) < 0.5
    z = np.stack(
        [
            label * (1 + chance.random(8000)),
            chance.random(8000) * (chance.random(8000) < 0.3),
            label * 1.0 + 0.3,
            ~label * 1.0,
        ],
        1,
    )
    rows = chance.permutation(8000)
    halves = [
        np.concatenate([part[label[part]][:1500], part[~label[part]][:1500]])
        for part in (rows[:4000], rows[4000:])
    ]
    task = Task(None, *(Sample(part, label[part]) for part in halves))
    found = levels_meaning.detection(sparse.csr_matrix(z.astype(np.float32)), [task], 7)[0]
    assert found[0] == 1 and found[1] == 0 and found[2] == 1, (
        "always on, but stronger where the concept holds"
    )
    assert found[3] == 0, "a latent that is off where the concept holds does not detect it"


def test_latents_get_the_level_of_what_they_detect():
    text = play(24_000)

    def latents(text: str) -> list[np.ndarray]:
        vowels = np.array([c in "aeiouAEIOU" for c in text], float)
        coin = np.random.default_rng(0).random(len(text)) < 0.3
        return [vowels, _position(text) >= 5, _column(text) > 40, coin]

    made = ctx(text, latents, Grouped([1, 1, 0, 0]))
    found = levels_meaning.measure(made, **MEANING)
    assert np.nan_to_num(found.arrays["meaning_semantic_level"]).tolist() == [1, 2, 3, 0]
    assert found.arrays["meaning_concept"].tolist() == [
        "vowel",
        "fifth letter or later",
        "column above 40",
        "",
    ]
    assert (
        found.scalars["semantic_level_bottom"] == 1.5
        and found.scalars["semantic_level_top"] == 3
        and found.scalars["semantic_level_gap"] == 1.5
    )
    assert found.scalars["semantic_frac_none_top"] == 0.5
    assert found.scalars["char_variance_bottom"] > found.scalars["char_variance_top"]
    assert (
        found.scalars["autocorrelation_length_top"] > found.scalars["autocorrelation_length_bottom"]
    )
    nulls = {k for k, v in found.scalars.items() if v is None}
    assert nulls == set(found.why_null)


def _position(text: str) -> np.ndarray:
    out, n = [], 0
    for c in text:
        n = n + 1 if c.isascii() and c.isalpha() else 0
        out.append(n)
    return np.array(out, float)


def _column(text: str) -> np.ndarray:
    out, n = [], 0
    for c in text:
        n += 1
        out.append(n)
        n = 0 if c == "\n" else n
    return np.array(out, float)


# --------------------------------------------------------------------------------------------------
# rates and effects


def test_the_rate_at_a_limit_lies_between_the_points_beside_it():
    points = [
        Rated(1, 4, 10, 1.0),
        Rated(1, 2, 20, 0.1),
        Rated(1, 1, 40, 0.001),
        Rated(0.5, 1, 30, 0.5),
    ]
    assert bits_at(points, 0.1) == pytest.approx(20)
    assert bits_at(points, 0.01) == pytest.approx(30), (
        "half way in the logarithm; the point that others beat is not used"
    )
    assert bits_at(points, 1e-4) is None and bits_at(points, 2.0) is None


def test_the_strongest_entries_of_a_row_are_kept():
    z = sparse.csr_matrix(
        np.array([[1.0, 3, 2, 0], [0, 0, 5, 1], [0, 0, 0, 0], [0, 7, 0, 0]], np.float32)
    )
    kept = strongest(z, 0.5, np.array([10.0, 1, 1, 1]), rows=3).toarray()
    assert kept.tolist() == [
        [1, 3, 0, 0],
        [0, 0, 5, 0],
        [0, 0, 0, 0],
        [0, 7, 0, 0],
    ], "half of three is two, and the first latent weighs ten times"


def test_a_latents_effect_is_the_length_of_what_it_adds():
    rows = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    sae = Given(torch.eye(2), rows)
    codes = sparse.csr_matrix(np.array([[1.0, 0], [2, 1]], np.float32))
    found = effect_sizes(codes, lambda z: sae.decode(torch.from_numpy(z.toarray())))
    assert found == pytest.approx([5, 1], rel=1e-5)


def test_without_a_language_model_effects_are_null_with_a_reason():
    found = levels_effect.measure(
        EvalContext(sae=Grouped([0, 1]), device=CPU, x=torch.eye(2)),
        windows=4,
        batch=2,
        mean_rows=4,
    )
    assert set(found.scalars.values()) == {None} and set(found.why_null) == {
        i.name for i in levels_effect.INFO
    }


def test_a_level_is_taken_out_in_three_ways_and_the_honest_ones_are_shown():
    sae = make("hierarchical", "sae.target_l0=null", d_sae=60)
    sae.joined.fill_(True)
    sae.gate_bias.data.normal_(0, 2)
    acts = sae.encode(batch(32).x)
    z1, z2 = sae.split(acts)
    mean = acts.mean(0)
    bottom, top = mean.split(list(sae.widths))
    changes = levels_effect._changes(sae, mean)

    def mixed(below, above, gates):
        return sae.bottom.decode(gates * below + (1 - gates) * sae.predict(above) * sae.scale)

    nothing, usual = torch.zeros_like(z2), torch.ones(len(z2), 1) * top
    wanted = {
        "ablate_top_frozen": mixed(z1, nothing, sae.gates(z2)),
        "ablate_top_mean": mixed(z1, usual, sae.gates(usual)),
        "ablate_top": mixed(z1, nothing, sae.gates(nothing)),
        "ablate_bottom_mean": mixed(torch.ones(len(z1), 1) * bottom, z2, sae.gates(z2)),
    }
    for name, recon in wanted.items():
        assert torch.allclose(changes[name](acts), recon, atol=1e-5), name
    assert not torch.allclose(wanted["ablate_top_frozen"], wanted["ablate_top"], atol=1e-3), (
        "the gates matter"
    )
    shown = {info.name for info in levels_effect.INFO if info.shown}
    assert {
        f"{name}_ce_delta_bits"
        for name in ("ablate_bottom_mean", "ablate_top_mean", "ablate_top_frozen")
    } <= shown
    assert not {"ablate_bottom_ce_delta_bits", "ablate_top_ce_delta_bits"} & shown


# --------------------------------------------------------------------------------------------------
# all of it


def test_a_small_run_measures_draws_and_tells_the_tree(experiment, tmp_path):
    metrics = "metric=[levels,levels_meaning,levels_effect,compression,downstream]"
    run = experiment(
        "sae=hierarchical",
        "--out_dir=h",
        "sae.expansion=4",
        "sae.target_l0=null",
        metrics,
        "metric.compression.block=64",
        "seeds=[0]",
    )
    assert run.returncode == 0, run.stderr
    metrics = experiment.json("h", "cells", "text8_0.json")["metrics"]
    assert metrics["frozen_identical"] == 1 and 0 < metrics["gate_mean"] < 1
    assert {
        p: 0 < metrics[f"fvu_after_{p}"] < 3 for p in ("bottom", "top", "both")
    } == dict.fromkeys(("bottom", "top", "both"), True)
    assert all(
        metrics[f"ablate_{level}_kl"] > 0 and metrics[f"splice_{level}_kl"] > 0
        for level in ("bottom", "top")
    )
    assert metrics["code_bits_ce"] > 0
    features = {f["latent"]: f for f in experiment.json("h", "features", "text8_0.json")}
    tops = [f for f in features.values() if f["level"] == "top"]
    assert tops and all(
        features[child]["level"] == "bottom" for top in tops for child, _ in top["children"]
    )
    assert all(
        features[parent]["level"] == "top"
        for f in features.values()
        for parent, _ in f.get("parents", [])
    )
    done, empty = drawn(experiment.runs / "h", "hierarchy_", tmp_path)
    assert (
        set(done)
        == {
            "hierarchy_training",
            "hierarchy_map",
            "hierarchy_meaning",
            "hierarchy_rate",
            "hierarchy_effect",
        }
        and not empty
    )
