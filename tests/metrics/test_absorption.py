"""Absorption with known answers: rows made by hand, a dictionary that absorbs one letter, and
one that does not.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_experiments.metrics import absorption
from sae_experiments.metrics.base import EvalContext
from support.metric_worlds import CPU, Chunked, Given, ctx, play

OPTIONS = {
    "rows": None,
    "n_train": 1500,
    "n_test": 800,
    "min_positives": 20,
    "skip": 0,
    "block": 4,
    "test_frac": 0.5,
    "strength": 10.0,
    "min_f1": 0.8,
    "min_gain": 0.08,
    "max_main": 10,
    "min_parents": 1,
    "seed": 0,
}
TEXT = play(9000)


def by_hand(
    contribution: list[float], main: list[int], projection: float = 1.0
) -> tuple[bool, float]:
    c = np.array([contribution])
    full, part = absorption.absorbed(
        np.abs(c), c, np.full(len(contribution), 0.5), np.array([projection]), np.array(main)
    )
    return bool(full[0]), float(part[0])


@pytest.mark.parametrize(
    ("contribution", "full", "fraction"),
    [
        ([1.0, 0.0, 0.0], False, 0.0),  # the main latent does it all
        ([0.0, 1.0, 0.0], True, 1.0),  # another does
        ([0.0, 0.3, 0.0], False, 0.0),  # nobody does
        ([0.5, 0.5, 0.0], False, 0.5),
        ([0.2, 0.5, 0.4], False, 0.8),  # what others give beyond the projection does not count
        ([0.0, 0.2, 0.3], False, 1.0),  # two others together
        ([1.2, 0.9, 0.0], False, 0.0),
        ([-0.1, 0.9, 0.0], False, 1.0),
    ],
)
def test_rows_made_by_hand(contribution, full, fraction):
    assert by_hand(contribution, [0]) == (full, pytest.approx(fraction))


def test_only_latents_that_point_the_same_way_absorb():
    z = np.array([[0.0, 1.0]])
    full, part = absorption.absorbed(z, z, np.array([1.0, 0.01]), np.array([1.0]), np.array([0]))
    assert not full[0] and part[0] == 0


def one_hot(text: str) -> list[np.ndarray]:
    """A direction for vowels, one for each vowel, one for the rest, and some chance."""
    low = np.array(list(text.lower()))
    vowel = np.isin(low, list("aeiou"))
    return [
        vowel * 1.0,
        *[(low == v) * 0.3 for v in "aeiou"],
        (~vowel) * 1.0,
        np.random.default_rng(0).random(len(text)) * 0.01,
    ]


def dictionary(absorbs: str) -> Given:
    """Latent 0: a vowel, but for ``absorbs``, whose latents hold the direction of vowels as
    well.
    """
    w_enc, w_dec, bias = torch.zeros(7, 8), torch.zeros(7, 8), torch.zeros(7)
    w_enc[0, 0] = w_dec[0, 0] = 1
    for i, v in enumerate("aeiou", 1):
        w_enc[i, i], w_dec[i, i] = 1 / 0.3, 0.3
        if v in absorbs:
            w_dec[i, 0] = 1.0
            w_enc[0, i] = -10.0  # silent where that letter is read
    w_enc[6, 6] = w_dec[6, 6] = 1
    return Given(w_enc, w_dec=w_dec, b_enc=bias)


def of_vowels(sae: Given, kind: type[EvalContext] = EvalContext) -> dict[str, float]:
    found = absorption.measure(ctx(TEXT, one_hot, sae, kind=kind), **OPTIONS)
    at = found.arrays["absorption_names"].tolist().index("vowel")
    return {k: float(found.arrays[f"absorption_{k}"][at]) for k in absorption.Parent._fields}


def test_a_letter_that_is_absorbed_is_counted_and_no_other():
    share = sum(c in "uU" for c in TEXT) / sum(c.lower() in "aeiou" for c in TEXT)
    clean, absorbing = of_vowels(dictionary("")), of_vowels(dictionary("u"))
    assert clean["full"] == 0 and clean["fraction"] < 0.02 and clean["main_recall"] == 1
    assert absorbing["full"] == pytest.approx(share, abs=0.03) and absorbing[
        "main_recall"
    ] == pytest.approx(1 - share, abs=0.03)
    assert absorbing["fraction"] == pytest.approx(share, abs=0.03) and absorbing["probe_f1"] > 0.99


def test_a_letter_that_matters_enough_is_a_main_latent_instead():
    found = of_vowels(dictionary("e"))
    assert found["main_latents"] == 2 and found["full"] == 0 and found["main_recall"] == 1


def test_the_size_of_chunks_and_the_order_of_latents_change_nothing():
    plain, order = dictionary("u"), torch.tensor([3, 0, 5, 6, 1, 2, 4])
    moved = Given(plain.W_enc[order], w_dec=plain.W_dec[order])
    assert of_vowels(plain, Chunked) == of_vowels(plain)
    assert of_vowels(moved) == pytest.approx(of_vowels(plain))


def test_what_cannot_be_measured_is_null_with_a_reason():
    names = {i.name for i in absorption.INFO}
    no_text = absorption.measure(
        EvalContext(sae=Given(), device=CPU, x=torch.randn(9, 4)), **OPTIONS
    )
    few = absorption.measure(ctx(TEXT, one_hot, dictionary("")), **OPTIONS | {"min_parents": 30})
    broken = absorption.measure(
        ctx(TEXT, lambda t: [np.full(len(t), np.nan)] * 8, dictionary("")), **OPTIONS
    )
    for found in (no_text, few, broken):
        assert set(found.scalars) == names == set(found.why_null) and set(
            found.scalars.values()
        ) == {None}
    assert "fewer than 30" in few.why_null["absorption_full"]
    blind = absorption.measure(
        ctx(TEXT, lambda t: list(np.random.default_rng(0).random((8, len(t)))), dictionary("")),
        **OPTIONS,
    )
    assert set(blind.scalars.values()) == {None}, "the activation shows no parent"


def test_a_silent_dictionary_absorbs_nothing():
    silent = Given(torch.eye(8), b_enc=torch.full((8,), -100.0))
    found = of_vowels(silent)
    assert found["full"] == 0 and found["fraction"] == 0 and found["main_recall"] == 0
