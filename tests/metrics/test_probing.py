"""Probes with known answers: latents that are the concept, latents that know nothing, and the
noise of what is measured.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from sae_experiments.metrics import probing
from sae_experiments.metrics.base import EvalContext
from sae_experiments.metrics.noise import auc, noise_of, resampled_auc
from support.metric_worlds import CPU, Chunked, Given, ctx, play

OPTIONS = {
    "rows": None,
    "k": [1, 2],
    "floors": [],
    "ceilings": [],
    "n_train": 600,
    "n_test": 300,
    "min_positives": 20,
    "skip": 2,
    "block": 4,
    "test_frac": 0.4,
    "strengths": [1.0],
    "bootstrap": 20,
    "seed": 0,
}
TEXT = play(12_000)


def noise_like(text: str, n: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).random((n, len(text))))


def knows_vowels(text: str) -> list[np.ndarray]:
    return [*noise_like(text, 3), np.array([c.lower() in "aeiou" for c in text]) * 1.0]


def of_concept(found, source: str = "sae", k: str = "1", part: str = "auc") -> dict[str, float]:
    return dict(
        zip(
            found.arrays["probe_concepts"].tolist(),
            found.arrays[f"probe_{source}_k{k}_{part}"].tolist(),
            strict=True,
        )
    )


def test_a_latent_that_is_the_concept_is_found_and_scores_1():
    found = probing.measure(ctx(TEXT, knows_vowels), **OPTIONS)
    assert (
        of_concept(found)["vowel"] == 1
        and of_concept(found, part="accuracy")["vowel"] == 1
        and of_concept(found, part="f1")["vowel"] == 1
    )
    assert found.noise["probe_auc_char_k1"] < 0.05


def test_latents_that_know_nothing_score_one_half():
    found = probing.measure(ctx(TEXT, lambda t: noise_like(t, 4)), **OPTIONS)
    for name in (
        "probe_auc_char_k1",
        "probe_auc_word_k1",
        "probe_auc_struct_k2",
        "probe_auc_predictive_k1",
    ):
        assert found.scalars[name] == pytest.approx(0.5, abs=0.06), name


def test_a_concept_that_needs_two_latents_needs_k_2():
    def halves(text: str) -> list[np.ndarray]:
        vowel = (
            np.array([c.lower() in "aei" for c in text]),
            np.array([c.lower() in "ou" for c in text]),
        )
        return [*noise_like(text, 2), *(v * 1.0 for v in vowel)]

    found = probing.measure(ctx(TEXT, halves), **OPTIONS)
    assert of_concept(found, k="1")["vowel"] < 0.95 and of_concept(found, k="2")["vowel"] == 1


def test_knowing_the_character_does_not_solve_a_matched_concept():
    """One-hot characters score 1 on character concepts and a half on where in a word a
    character stands.
    """
    found = probing.measure(
        ctx(TEXT, lambda t: [np.array([x == c for x in t]) for c in sorted(set(TEXT))]),
        **OPTIONS | {"k": ["all"]},
    )
    scores = of_concept(found, k="all")
    assert scores["vowel"] == 1
    for name in (
        "word start",
        "fifth letter or later",
        "trigram the",
        "after the word the",
        "column above 40",
    ):
        assert scores[name] == pytest.approx(0.5, abs=0.09), name


def test_permuting_the_latents_or_scaling_them_changes_nothing():
    plain = probing.measure(ctx(TEXT, knows_vowels), **OPTIONS)
    order = torch.tensor([2, 0, 3, 1])
    moved = Given(torch.eye(4)[order] * torch.tensor([0.1, 3.0, 7.0, 1.0])[:, None])
    found = probing.measure(ctx(TEXT, knows_vowels, moved), **OPTIONS)
    assert found.scalars == pytest.approx(plain.scalars, abs=2e-3)


def test_batch_size_changes_nothing():
    options = OPTIONS | {"floors": [1], "ceilings": ["all"]}
    assert probing.measure(
        ctx(TEXT, knows_vowels, kind=Chunked), **options
    ).scalars == pytest.approx(
        probing.measure(ctx(TEXT, knows_vowels), **options).scalars, abs=1e-9
    )


def test_baselines_are_measured_on_the_same_tasks():
    found = probing.measure(
        ctx(TEXT, knows_vowels), **OPTIONS | {"floors": [1], "ceilings": ["all"]}
    )
    assert (
        of_concept(found, "raw", "all")["vowel"] == 1
        and of_concept(found, "raw")["vowel"] == 1
        and of_concept(found, "pca")["vowel"] > 0.95
    )
    assert found.scalars["probe_random_char_k1"] is not None


def test_a_silent_sae_scores_one_half():
    silent = Given(torch.eye(4), b_enc=torch.full((4,), -10.0))
    found = probing.measure(ctx(TEXT, knows_vowels, silent), **OPTIONS)
    assert set(of_concept(found).values()) == {0.5}


def test_what_cannot_be_measured_is_null_with_a_reason():
    without_text = probing.measure(
        EvalContext(sae=Given(), device=CPU, x=torch.randn(50, 4)), **OPTIONS
    )
    broken = probing.measure(ctx(TEXT, lambda t: [np.full(len(t), math.nan)] * 4), **OPTIONS)
    short = probing.measure(ctx(TEXT[:100], knows_vowels), **OPTIONS)
    text8 = probing.measure(ctx("the cat sat on a mat and then " * 200, knows_vowels), **OPTIONS)
    for found in (without_text, broken, short):
        assert set(found.scalars.values()) == {None} and set(found.why_null) == set(found.scalars)
    assert (
        "occurs often enough" in text8.why_null["probe_auc_struct_k1"]
        and text8.scalars["probe_auc_char_k1"] is not None
    )
    assert set(text8.scalars) <= {i.name for i in probing.INFO}


def test_balanced_samples_have_as_many_negatives_of_every_character():
    chance = np.random.default_rng(0)
    chars, label = chance.integers(0, 5, 500), chance.random(500) < 0.2
    sample = probing.balanced(label, chars, chars != 3, 1000, chance)
    positive, negative = (
        np.bincount(chars[sample.rows[sample.labels == wanted]], minlength=5)
        for wanted in (True, False)
    )
    assert (
        np.array_equal(positive, negative)
        and positive[3] == 0
        and positive.sum() == (label & (chars != 3)).sum()
    )
    assert np.array_equal(label[sample.rows], sample.labels) and len(set(sample.rows)) == len(
        sample.rows
    )


def test_the_area_under_the_curve_is_that_of_scikit_learn_with_ties_and_weights():
    chance = np.random.default_rng(0)
    labels, scores = chance.random(400) < 0.3, chance.integers(0, 9, 400) * 1.0
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    documents = np.arange(400) // 20
    mine = resampled_auc(scores, labels, documents, 50, 0)
    assert mine.mean() == pytest.approx(auc(scores, labels), abs=0.03) and 0.01 < mine.std() < 0.08
    assert auc(scores, np.ones(400, bool)) == 0.5


def test_the_noise_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    found = noise_of(
        {"sum": values, "n": np.ones(400)}, lambda s: s["sum"] / s["n"], draws=2000, seed=0
    )
    assert found == pytest.approx(values.std(ddof=1) / 20, rel=0.08)
