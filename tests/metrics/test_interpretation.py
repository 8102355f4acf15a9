"""n-gram tables, rules and contexts with known answers: latents that are a function of the last
characters, and latents that are chance.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import sparse

from sae_experiments.metrics import rules
from sae_experiments.metrics.base import EvalContext
from sae_experiments.metrics.codes import Text, read_text
from sae_experiments.metrics.text import ngrams
from sae_experiments.metrics.text.contexts import contexts_of, quantile_rows, top_rows
from sae_experiments.metrics.text.ngrams import simulate
from sae_experiments.metrics.text.patterns import (
    LAGS,
    Matcher,
    Pattern,
    count,
    elements_of,
    generalise,
    literal_at,
    pack,
    quality,
    spell,
    unpack,
)
from support.metric_worlds import CPU, LENGTH, Chunked, Given, ctx, play

NGRAMS = {
    "rows": None,
    "longest": 4,
    "min_fires": 10,
    "min_count": 3,
    "predictable": 0.1,
    "block": 4,
}
RULES = {
    "rows": None,
    "latents": None,
    "min_fires": 10,
    "threshold": 0.1,
    "block": 4,
    "keep": 0.9,
    "most": 3,
    "gain": 0.01,
    "seeds": 6,
    "shuffled": 2,
    "interpretable": 0.5,
    "longest": 4,
    "min_count": 3,
    "seed": 0,
}
TEXT = play(12_000)


def suffix(*wanted: str):
    """A latent for each wanted string: 1 where it was just read within the window."""
    return lambda text: [
        np.array([text[max(t + 1 - len(w), t - t % LENGTH) : t + 1] == w for t in range(len(text))])
        * 1.0
        for w in wanted
    ]


def chance(n: int, p: float = 0.1):
    return lambda text: list((np.random.default_rng(0).random((n, len(text))) < p) * 1.0)


# ------------------------------------------------------------------------------------------------
# n-grams


def test_a_latent_that_is_an_n_gram_has_that_order_and_r2_1():
    found = ngrams.measure(ctx(TEXT, suffix("e", "th", "the", "hat ")), **NGRAMS)
    assert found.arrays["ngram_order"].tolist() == [1, 2, 3, 4]
    assert found.arrays["ngram_r2"].max(1) == pytest.approx([1, 1, 1, 1], abs=0.05)
    assert (
        found.scalars["ngram_order"] == 2.5
        and found.scalars["ngram_predictable_frac"] == 1
        and found.scalars["ngram_score"] > 0.97
    )


def test_a_latent_that_is_chance_cannot_be_predicted():
    found = ngrams.measure(ctx(TEXT, chance(4)), **NGRAMS).scalars
    assert (
        found["ngram_r2"] < 0.02
        and abs(found["ngram_score"]) < 0.15
        and found["ngram_predictable_frac"] == 0
        and found["ngram_order"] is None
    )


def test_tables_agree_with_a_dictionary_filled_row_by_row():
    world = ctx(
        TEXT[:3000],
        lambda t: list(
            np.abs(np.random.default_rng(1).normal(size=(3, len(t)))) * (np.array(list(t)) != "e")
        ),
    )
    text = read_text(world, None)
    z = world.held_out.x.numpy().astype(float)
    found = simulate(sparse.csr_matrix(z), text, longest=3, min_fires=1, min_count=3, block=4)
    train, chars, offset = text.blocks(4) % 2 == 0, text.chars.tolist(), text.offset
    tables: dict[tuple, list[np.ndarray]] = {}
    for t in np.flatnonzero(train):
        for n in range(0, min(3, offset[t] + 1) + 1):
            tables.setdefault(tuple(chars[t + 1 - n : t + 1]), []).append(z[t])
    for order in (1, 2, 3):
        predicted = []
        for t in np.flatnonzero(~train):
            n = min(order, offset[t] + 1)
            while n and len(tables.get(tuple(chars[t + 1 - n : t + 1]), [])) < 3:
                n -= 1
            predicted.append(np.mean(tables[tuple(chars[t + 1 - n : t + 1])], axis=0))
        actual = z[~train]
        expected = 1 - np.square(actual - predicted).sum(0) / np.square(
            actual - actual.mean(0)
        ).sum(0)
        np.testing.assert_allclose(found.r2[:, order - 1], expected, rtol=1e-6)


def test_characters_before_the_window_are_not_used():
    text = Text(np.arange(8, dtype=np.uint32), np.arange(8, dtype=np.uint32), 4, np.array([0]))
    assert ngrams.suffixes(text, 3)[2][1].tolist() == [False, False, True, True] * 2


def test_n_grams_do_not_depend_on_the_size_of_chunks():
    plain = ngrams.measure(ctx(TEXT, suffix("e", "th")), **NGRAMS).scalars
    assert ngrams.measure(ctx(TEXT, suffix("e", "th"), kind=Chunked), **NGRAMS).scalars == plain


# ------------------------------------------------------------------------------------------------
# rules


def described(features, sae=None, kind: type[EvalContext] = EvalContext, **options):
    found = rules.measure(ctx(TEXT, features, sae, kind=kind), **(RULES | options))
    return found, {f["latent"]: f for f in found.features or []}


def test_a_latent_that_is_a_suffix_is_described_by_it():
    found, by = described(suffix("th", "ing", "e"))
    assert [by[j]["rule"] for j in range(3)] == ["th", "ing", "e"] or all(
        by[j]["f1"] == 1 for j in range(3)
    )
    assert (
        found.scalars["rule_f1"] == pytest.approx(1)
        and found.scalars["rule_interpretable_frac"] == 1
    )
    assert [by[j]["order"] for j in range(3)] == [2, 2, 1], "ng is always ing in this text"
    assert by[2]["lift"] == pytest.approx(len(TEXT) / TEXT.count("e"), rel=0.1)


def test_a_union_of_two_suffixes_needs_two_patterns():
    def both(text: str) -> list[np.ndarray]:
        return [sum(suffix("ou", "ea")(text)), *suffix("x")(text)]

    _, by = described(both)
    assert by[0]["f1"] > 0.97 and " or " in by[0]["rule"]


def test_a_class_and_a_state_are_named():
    def columns(text: str) -> list[np.ndarray]:
        upper = np.array([c.isupper() for c in text])
        line = np.array(
            [len(text[:t].rsplit("\n", 1)[-1]) < 3 and text[t] != "\n" for t in range(len(text))]
        )
        return [upper * 1.0, line * 1.0, np.zeros(len(text))]

    _, by = described(columns)
    assert (
        by[0]["rule"] == "[upper]"
        and by[0]["concept"] == "upper case"
        and by[0]["phi"] == pytest.approx(1)
    )
    assert "first 3 characters of a line" in by[1]["rule"] and by[1]["f1"] > 0.99 and 2 not in by


def test_a_latent_that_is_chance_has_no_good_rule_and_shuffled_ones_neither():
    found, by = described(chance(3))
    for feature in by.values():
        if "f1" in feature:
            assert ("rule" in feature) == (feature["f1"] >= rules.LEAST_F1)
            assert ("weak_rule" in feature) == (feature["f1"] < rules.LEAST_F1)
    assert (
        found.scalars["rule_f1"] < 0.3
        and found.scalars["concept_phi"] < 0.1
        and found.scalars["rule_interpretable_frac"] == 0
    )
    found, _ = described(suffix("th", "ing", "e"))
    assert found.scalars["rule_f1_null"] < 0.3 < found.scalars["rule_f1"]


def test_rules_do_not_depend_on_chunks_or_units():
    plain, _ = described(suffix("th", "ing", "e"))
    chunked, _ = described(suffix("th", "ing", "e"), kind=Chunked)
    scaled, _ = described(suffix("th", "ing", "e"), Given(torch.eye(3) * 50))
    assert chunked.scalars == plain.scalars and scaled.scalars == plain.scalars


def test_what_rules_say_about_latents_is_json():
    found, by = described(suffix("th", "ing", "e"))
    assert json.loads(json.dumps(found.features, allow_nan=False)) == found.features
    assert all(set(f) == set(by[0]) for f in found.features)


def test_contexts_stay_inside_their_window_and_are_the_strongest():
    text = Text(
        np.arange(97, 105, dtype=np.uint32), np.arange(8, dtype=np.uint32), 4, np.array([0])
    )
    values = np.array([0, 3, 0, 2, 5, 0, 0, 4.0])
    assert (
        top_rows(text, values, 5).tolist() == [4, 1]
        and quantile_rows(values, 2).tolist() == [4, 3]
        and not len(quantile_rows(values * 0, 2))
    )
    assert contexts_of(text, values, np.array([4]), 9, 2) == [
        {"before": "", "at": "e", "after": "fg", "acts": [5.0, 0, 0], "row": 4}
    ]


@pytest.mark.parametrize("metric", [(ngrams, NGRAMS), (rules, RULES)], ids=["ngrams", "rules"])
def test_what_cannot_be_measured_is_null_with_a_reason(metric):
    module, options = metric
    for world in (
        EvalContext(sae=Given(), device=CPU, x=torch.randn(50, 4)),
        ctx(TEXT, lambda t: [np.full(len(t), math.nan)] * 2),
        ctx(TEXT, lambda t: [np.zeros(len(t))] * 2),
        ctx(TEXT[:70], chance(2)),
    ):
        found = module.measure(world, **options)
        assert set(found.scalars) == {i.name for i in module.INFO} == set(found.why_null) and set(
            found.scalars.values()
        ) == {None}


# ------------------------------------------------------------------------------------------------
# patterns


def test_packed_positions_agree_with_booleans():
    chance = np.random.default_rng(0)
    a, b = chance.random((2, 1001)) < 0.3
    assert (
        np.array_equal(unpack(pack(a), 1001), a)
        and count(pack(a)) == a.sum()
        and count(np.stack([pack(a), pack(b)])).tolist() == [a.sum(), b.sum()]
    )
    hits = (a & b).sum()
    assert quality(pack(a), pack(b)) == pytest.approx(
        (hits / a.sum(), hits / b.sum(), 2 * hits / (a.sum() + b.sum()))
    )
    assert quality(pack(a & ~a), pack(b)) == (0, 0, 0)


def test_a_pattern_matches_where_a_slow_reader_says():
    text, symbols = "the cat, the hat\nthat", sorted(set("the cat, the hat\nthat"))
    elements, offset = elements_of(symbols), np.arange(len(text)) % 7
    names = [e.name for e in elements]
    chars, rows = np.array([ord(c) for c in text]), np.arange(len(text))
    matcher = Matcher(elements, chars, offset, np.stack([rows % 2 == 0]), rows)
    pattern = Pattern((names.index("h"), names.index("consonant"), *[0] * (LAGS - 2)))
    slow = [text[t] == "h" and offset[t] >= 1 and text[t - 1] in "cnhtsr" for t in rows]
    alone, with_state = unpack(matcher.match([pattern, pattern._replace(state=0)]), len(text))
    assert alone.tolist() == slow
    assert with_state.tolist() == [s and t % 2 == 0 for t, s in enumerate(slow)]
    assert (
        spell([pattern, Pattern((0, names.index(" "), *[0] * 4), 0)], elements, ["even"])
        == "[consonant]h or ␣. (even)"
    )


def _generalised_slowly(
    matcher: Matcher, literal: Pattern, target: np.ndarray, keep: float
) -> Pattern:
    """What `generalise` does, for one pattern and one choice at a time."""
    pattern, best = literal, (literal, quality(matcher.match([literal])[0], target).f1)
    while True:
        before = quality(matcher.match([pattern])[0], target).precision
        found = None
        for lag, element in enumerate(pattern.elements):
            for wider in matcher.elements[element].wider:
                elements = (*pattern.elements[:lag], wider, *pattern.elements[lag + 1 :])
                now = quality(matcher.match([Pattern(elements)])[0], target)
                if now.precision >= keep * before and (found is None or now.f1 > found[1]):
                    found = (Pattern(elements), now.f1)
        if found is None:
            return best[0]
        pattern = found[0]
        best = found if found[1] >= best[1] else best


def test_patterns_that_are_widened_together_are_those_widened_one_by_one():
    text = TEXT[:3000]
    symbols = sorted(set(text))
    elements, offset = elements_of(symbols), np.arange(len(text)) % 32
    chars, rows = np.array([ord(c) for c in text]), np.arange(len(text))
    matcher = Matcher(elements, chars, offset, np.zeros((0, len(text)), bool), rows)
    index = {next(iter(e.symbols)): i for i, e in enumerate(elements) if len(e.symbols) == 1}
    chance = np.random.default_rng(0)
    after_space = np.array([t > 0 and text[t - 1] == " " for t in rows])
    for target in (after_space, after_space & (chance.random(len(text)) < 0.3)):
        found_at = chance.choice(np.flatnonzero(target), 8)
        literals = [literal_at(index, chars, 32, int(row)) for row in found_at]
        together = generalise(matcher, literals, pack(target), 0.9)
        slowly = [_generalised_slowly(matcher, p, pack(target), 0.9) for p in literals]
        assert together == slowly
    assert generalise(matcher, [], pack(after_space), 0.9) == []


def test_counting_bits_without_numpy_2_gives_the_same(monkeypatch):
    bits = pack(np.random.default_rng(0).random((3, 777)) < 0.4)
    expected = count(bits)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert np.array_equal(count(bits), expected)
