"""The noise of an evaluation is over text: nothing where documents are alike, and no smaller
for more latents or concepts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sae_experiments.metrics import ablation, absorption, downstream, probing, rules
from sae_experiments.metrics.base import EvalContext, LMSplice, Measured
from sae_experiments.metrics.noise import Grouped, noise_over, resampled_auc, resampled_means
from sae_experiments.metrics.text import concepts, labels
from sae_experiments.models.hooks import Site
from support.metric_worlds import CPU, LENGTH, Given, ctx, play, validation_store, validation_tokens

BLOCK = 4
RULES = {
    "rows": None,
    "latents": None,
    "min_fires": 20,
    "threshold": 0.1,
    "block": BLOCK,
    "keep": 0.9,
    "most": 2,
    "gain": 0.01,
    "seeds": 3,
    "shuffled": 0,
    "interpretable": 0.5,
    "longest": 2,
    "min_count": 5,
    "seed": 0,
}
ABSORPTION = {
    "rows": None,
    "n_train": 10**6,
    "n_test": 10**6,
    "min_positives": 20,
    "skip": 0,
    "block": BLOCK,
    "test_frac": 0.5,
    "strength": 10.0,
    "min_f1": 0.5,
    "min_gain": 0.5,
    "max_main": 1,
    "min_parents": 1,
    "seed": 0,
}
PROBING = {
    "rows": None,
    "k": [1],
    "floors": [],
    "ceilings": [],
    "n_train": 1000,
    "n_test": 10**6,
    "min_positives": 20,
    "skip": 0,
    "block": BLOCK,
    "test_frac": 0.5,
    "strengths": [1.0],
    "bootstrap": 40,
    "seed": 0,
}
ABLATION = {
    "rows": None,
    "windows": 40,
    "batch": 8,
    "latents": 8,
    "per_latent": 40,
    "min_fires": 5,
    "groups": 1,
    "mean": False,
    "seed": 0,
}
#: One document: a rule that is right in parts of it only.
DOCUMENT = play(BLOCK * LENGTH - 2, seed=3) + "\n\n"
ALIKE, UNLIKE = (
    text + "\n" for text in (DOCUMENT * 40, play(40 * len(DOCUMENT)))
)  # the last window has a character after it


def fires(copies: int) -> Callable[[str], list[np.ndarray]]:
    """Four latents that fire on part of what their rule can say, and ``copies`` of them all."""

    def columns(text: str) -> list[np.ndarray]:
        low, odd = np.array(list(text.lower())), np.arange(len(text)) % len(DOCUMENT) % 3 == 0
        return [
            np.isin(low, list(group)) * (odd | np.isin(low, list("th"))) * 1.0
            for group in ("aeiou", "st", "nh", " w")
        ] * copies

    return columns


@pytest.mark.parametrize(
    "name",
    [
        "rule_f1",
        "rule_interpretable_frac",
        "rule_precision",
        "rule_recall",
        "concept_phi",
        "concept_matched_frac",
    ],
)
@pytest.mark.parametrize("copies", [1, 6])
def test_rules_and_concepts(name: str, copies: int) -> None:
    measured = rules_of(copies)
    assert measured[0].noise[name] == pytest.approx(0, abs=1e-12), "documents that are alike"
    if name in (
        "rule_f1",
        "rule_precision",
        "rule_recall",
        "concept_phi",
    ):  # a share of four latents moves with the rules' own chance
        assert measured[1].noise[name] > 1e-3
        assert measured[1].noise[name] == pytest.approx(rules_of(1)[1].noise[name], rel=0.2), (
            "copies of a latent are no more text"
        )


_KNOWN: dict[int, list[Measured]] = {}


def rules_of(copies: int) -> list[Measured]:
    """On documents that are alike, and on others."""
    if copies not in _KNOWN:
        _KNOWN[copies] = [
            rules.measure(ctx(text, fires(copies), Given(d_in=4 * copies)), **RULES)
            for text in (ALIKE, UNLIKE)
        ]
    return _KNOWN[copies]


def test_absorption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vowels alone, all of whose rows are looked at; the main latent does not know u."""
    monkeypatch.setattr(absorption, "PARENTS", ("vowel",))

    def columns(text):
        return [
            np.isin(list(text.lower()), list(group)) * 1.0
            for group in ("aeio", "u", "bcdfghjk", "lmnpqrst")
        ]

    sae = Given(torch.eye(4))
    alike, unlike = (
        absorption.measure(ctx(text, columns, sae), **ABSORPTION) for text in (ALIKE, UNLIKE)
    )
    for name in ("absorption_full", "absorption_fraction", "absorption_main_recall"):
        assert alike.noise[name] == pytest.approx(0, abs=1e-12)
    assert unlike.noise["absorption_main_recall"] > 1e-3


def test_absorption_of_several_concepts_on_one_text() -> None:
    chance = np.random.default_rng(0)
    shown = absorption.PositiveRows(
        np.repeat(np.arange(20), 30),
        *(chance.random((3, 600)) + np.repeat(chance.normal(size=20), 30)),
    )
    one, many = (absorption._noise([shown] * n, np.arange(20)) for n in (1, 25))
    assert one == pytest.approx(many) and min(one.values()) > 0.05


def test_probes_of_concepts_in_other_documents_are_resampled_with_the_rest() -> None:
    chance, document = np.random.default_rng(0), np.repeat(np.arange(20), 30)
    scores, labels = (
        chance.normal(size=600) + np.repeat(chance.normal(size=20), 30),
        chance.random(600) < 0.5,
    )
    part = document > 0
    whole, some = (
        resampled_auc(scores[at], labels[at], document[at], 300, 0, among=np.arange(20))
        for at in (part | True, part)
    )
    assert np.corrcoef(whole, some)[0, 1] > 0.8


@pytest.mark.parametrize("copies", [1, 12])
def test_probes_of_many_concepts_promise_no_less_noise(
    copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One concept under several names, each in a group of its own."""
    made = ctx(UNLIKE, fires(1), Given(d_in=4))
    vowel = next(c for c in concepts.bank(made.symbols) if c.name == "vowel")
    measured = {}
    for n in (1, copies):
        monkeypatch.setattr(
            labels,
            "bank",
            lambda symbols, n=n: [replace(vowel, name=f"{i}", group=f"{i}") for i in range(n)],
        )
        measured[n] = probing.measure(made, **PROBING).noise["probe_auc_char_k1"]
    assert measured[copies] == pytest.approx(measured[1], rel=0.3)


@pytest.fixture(scope="module")
def windows_at(
    trained: Any, corpus: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[np.ndarray], EvalContext]:
    def made(starts: np.ndarray) -> EvalContext:
        site = Site("resid", 1)
        store = validation_store(trained, corpus, [site], tmp_path_factory.mktemp("stores"), starts)
        tokens = validation_tokens(corpus)
        sae = Given(torch.cat([torch.eye(16), -torch.eye(16)]))
        return EvalContext(
            sae=sae,
            device=CPU,
            read=site,
            write=site,
            held_out=store,
            lm=LMSplice(trained.model, site, tokens),
        )

    return made


def test_effects_of_latents(windows_at: Callable[[np.ndarray], EvalContext]) -> None:
    alike = ablation.measure(windows_at(np.full(40, 32)), **ABLATION).noise
    unlike = ablation.measure(windows_at(np.arange(0, 640, 16)), **ABLATION).noise
    for name in ("ablate_latent_ce_delta_bits", "ablate_latent_kl"):
        assert alike[name] == pytest.approx(0, abs=1e-6) and unlike[name] > 1e-4


def test_it_is_the_spread_over_texts_that_were_really_drawn() -> None:
    """30 latents that share the moods of 40 documents: independent latents would promise a
    fifth of the true spread.
    """
    chance, means, promised = np.random.default_rng(0), [], []
    document = np.repeat(np.arange(40), 5)
    for _ in range(200):
        mood = chance.normal(size=40)
        parts = [
            Grouped(mood[document] + 0.3 * chance.normal(size=200), document) for _ in range(30)
        ]
        means.append(np.mean([p.values.mean() for p in parts]))
        promised.append(noise_over(resampled_means(parts, 40)))
    assert np.mean(promised) == pytest.approx(np.std(means), rel=0.15)


def test_a_sample_without_any_document_of_a_part_leaves_the_part_out() -> None:
    parts = [Grouped(np.ones(3), np.zeros(3, int)), Grouped(np.zeros(9), np.repeat([1, 2, 3], 3))]
    resampled = resampled_means(parts, 4)
    assert np.isnan(resampled[:, 0]).any() and set(
        np.unique(resampled[~np.isnan(resampled[:, 0]), 0])
    ) == {1.0}
    assert np.isfinite(noise_over(resampled)) and noise_over(np.full((5, 2), np.nan)) == 0


def test_bootstrap_samples_on_which_an_ablation_costs_nothing_are_left_out():
    """Half of the windows cost nothing to ablate: a sample of these alone recovers no share."""
    clean = np.array([1.0, 1.0])
    losses = {
        "clean": clean,
        "spliced": clean + np.array([0.0, 0.1]),
        "mean": clean + np.array([0.0, 0.5]),
        "zero": clean + np.array([-1e-9, 1.0]),
        "kl": np.array([0.0, 0.1]),
    }
    scalars = downstream._summary({name: float(part.mean()) for name, part in losses.items()})
    noise = downstream._noise(losses, scalars.scalars)
    assert set(noise) == set(downstream.FORMULAS)
    assert all(np.isfinite(error) for error in noise.values())
    # The other samples recover the same share each, 0.8 and 0.9.
    assert noise["loss_recovered"] == pytest.approx(0, abs=1e-6)
    assert noise["loss_recovered_zero"] == pytest.approx(0, abs=1e-6)
