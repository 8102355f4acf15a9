"""The palindrome study: its data, its tables on a known dictionary, and the whole of it from
start to end.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sae_experiments.config.compose import build, compose_checked
from sae_experiments.console import Console
from sae_experiments.errors import UserError
from sae_experiments.fitting.fit import RowHandling, Sample, fit_saes
from sae_experiments.models.gpt2 import build_lm
from sae_experiments.results.records import means_of
from sae_experiments.saes.base import SAE, Batch, Step
from sae_experiments.studies.base import Context
from sae_experiments.studies.palindrome import study as palindrome
from sae_experiments.studies.palindrome.selectivity import browser, explained, measure, tables
from sae_experiments.studies.palindrome.strings import (
    FLOOR,
    MIRROR,
    SYMBOLS,
    Strings,
    all_strings,
    rows_at,
    text_of,
)
from sae_experiments.studies.palindrome.study import Analysis, split_ids
from sae_experiments.training.loop import seed_of
from support.command_line import assert_is_refused, in_this_process
from support.common import CONF, Experiment
from support.drawing import drawn


def test_all_strings_and_the_floor() -> None:
    strings = all_strings()
    assert strings.shape == (26**3, 9) and len(SYMBOLS) == 29
    assert (
        text_of(strings[0]) == "<aaa|aaa>"
        and text_of(strings[1]) == "<aab|baa>"
        and text_of(strings[-1]) == "<zzz|zzz>"
    )
    assert len({tuple(row) for row in strings.tolist()}) == 26**3
    assert pytest.approx(1.2218, abs=1e-4) == FLOOR == 3 * math.log(26) / 8
    x, y = split_ids(strings)
    assert text_of(x[1]) == "<aab|baa" and text_of(y[1]) == "aab|baa>"
    assert text_of(y[1][MIRROR]) == "baa"


def test_random_split_covers_every_first_letter_and_the_alphabetical_one_does_not() -> None:
    train, test = Strings(split="random", test_frac=0.1).parts(3)
    assert (len(train), len(test)) == (15818, 1758)
    together = torch.cat([train, test])
    assert len(torch.unique(together, dim=0)) == 26**3
    assert len(test[:, 1].unique()) == 26
    assert torch.equal(Strings(split="random", test_frac=0.1).parts(3)[1], test)
    assert not torch.equal(Strings(split="random", test_frac=0.1).parts(4)[1], test)
    train, test = Strings(split="alphabetical", test_frac=0.1).parts(3)
    assert not set(test[:, 1].tolist()) - {SYMBOLS.index(c) for c in "xyz"}


@pytest.mark.parametrize(
    ("split", "frac", "told"),
    [
        ("random", 0.0, "empty split"),
        ("random", 1.0, "empty split"),
        ("random", -1, "between 0 and 1"),
        ("odd", 0.1, "odd"),
    ],
)
def test_bad_splits_are_one_line(split: str, frac: float, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Strings(split=split, test_frac=frac)


def test_batches_are_epochs_in_an_order_of_their_own() -> None:
    first = torch.cat([rows_at(10, step, 5, 0) for step in (0, 1)])
    second = torch.cat([rows_at(10, step, 5, 0) for step in (2, 3)])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert first.tolist() != second.tolist()


def test_selectivity_of_a_latent_that_means_one_letter() -> None:
    letters = all_strings()[:, 1:4]
    acts = torch.stack(
        [
            (letters[:, 1] == 4).float(),
            torch.full((len(letters),), 2.0),
            (letters[:, 0] == letters[:, 2]).float(),
        ],
        1,
    )
    table, share = tables(acts, letters)
    assert table.shape == (3, 3, 26)
    p = 1 / 26
    assert table[0, 1, 4].item() == pytest.approx(math.sqrt((1 - p) / p), rel=1e-3)
    assert share[0].tolist() == pytest.approx([0, 1, 0], abs=1e-4)
    assert not table[1].any() and not share[1].any()  # a constant means nothing
    assert float(share[2].max()) < 1e-6  # equality of two letters is in neither alone
    shown = browser(acts, all_strings(), table, share, torch.tensor([p, 1.0, p]), 3)
    assert (shown[0]["position"], shown[0]["letter"]) == (2, "e")
    assert [text[2] for text, _ in shown[0]["strings"]] == ["e"] * 3


@pytest.mark.parametrize("split", ["random", "alphabetical"])
def test_an_sae_is_calibrated_on_training_strings_that_it_was_not_fitted_to(
    split: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, _ = compose_checked(
        CONF,
        [
            "study=palindrome",
            "preset=smoke",
            f"study.data.split={split}",
            "sae=topk",
            "study.fit.train.steps=30",
        ],
    )
    study, seen = build(cfg.study), {}

    def fit(saes, batch_at, configs, sample, **kwargs):
        batches = [batch_at(step).x[:, 0] for step in range(100)]
        seen.update(learned=torch.cat([*batches, sample.x[:, 0]]), held=sample.held[:, 0])
        raise KeyboardInterrupt

    monkeypatch.setattr(palindrome, "fit_saes", fit)
    train = study.data.parts(seed_of(0, "split"))[0]
    x = torch.arange(len(train), dtype=torch.float32)[:, None].expand(
        -1, study.width
    )  # a row says which string it is
    ctx = Context(
        folder=tmp_path,
        cache=tmp_path,
        device=torch.device("cpu"),
        console=Console(verbosity="quiet"),
    )
    with pytest.raises(KeyboardInterrupt):
        study.fitted(x, {}, 0, ctx)
    learned, held = (set(seen[k].tolist()) for k in ("learned", "held"))
    assert not learned & held and len(held) == 1582 and len(learned) > 0.99 * (len(train) - 1582)
    first = train[sorted(map(int, held)), 1]
    assert len(first.unique()) == len(train[:, 1].unique()), (
        "strings of every first letter, in either split"
    )


def test_two_definitions_of_explained_variance() -> None:
    x = torch.tensor([[0.0, 10.0], [2.0, 10.0], [4.0, 13.0]])
    about_vector, about_number = explained(x, x - x.mean(0))
    assert about_vector == pytest.approx(0), "the mean vector explains nothing ..."
    assert (
        about_number == pytest.approx(1 - (8 + 6) / float((x - x.mean()).square().sum()))
        and about_number > 0.8
    ), "... but most of all entries"
    assert explained(x, torch.ones_like(x)) == pytest.approx((1 - 6 / 14, 1.0)), (
        "a constant error is an error by the first alone"
    )
    assert explained(x, torch.zeros_like(x)) == (1.0, 1.0)
    assert explained(torch.ones(3, 2), torch.zeros(3, 2)) == (None, None)


class Fixed(SAE):
    """Codes that are given, and a decoder that gives ``error`` less than the input."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :4]


def test_two_definitions_of_alive() -> None:
    ids = all_strings()
    codes = torch.full((len(ids), 4), -0.1)
    codes[-5:, 1] = 0.01  # above zero on a few test strings, below on average
    codes[:, 2] = 1.0
    codes[: len(ids) - 100, 3] = 1.0  # never on a test string
    sae = Fixed(d_in=8 * 16, d_sae=4)
    x = torch.cat([codes, torch.randn(len(ids), 124)], 1)
    found = measure(sae, x, ids, 100, Analysis(strongest=2, samples=1, selective=0.5)).scalars
    assert (
        found["alive_latents"],
        found["alive_on_average_latents"],
        found["sae_l0"],
    ) == pytest.approx((2, 1, 1.05))
    moved = measure(
        sae,
        x,
        ids,
        100,
        Analysis(strongest=2, samples=1, selective=0.5),
        mean=torch.linspace(0, 50, 128),
    ).scalars
    assert moved["explained_variance"] == pytest.approx(found["explained_variance"], abs=1e-4), (
        "about the mean vector: a shift changes nothing"
    )
    assert moved["explained_variance_entries"] > found["explained_variance_entries"]


# ------------------------------------------------------------------------------------------------
# as published


@pytest.fixture(scope="module")
def published() -> Any:
    """The study as ``preset=original`` composes it."""
    return build(compose_checked(CONF, ["preset=original", "study=palindrome"])[0].study)


def test_the_published_language_model_has_embeddings_of_its_own(published: Any) -> None:
    made = build_lm(published.lm, len(SYMBOLS), seed=0)
    assert made.lm_head.weight is not made.transformer.wte.weight and not torch.equal(
        made.lm_head.weight, made.transformer.wte.weight
    )
    for table in (made.transformer.wte, made.transformer.wpe, made.lm_head):
        assert table.weight.std().item() == pytest.approx(0.2, rel=0.15)
    plain = build(compose_checked(CONF, ["preset=laptop", "study=palindrome"])[0].study)
    made = build_lm(plain.lm, len(SYMBOLS), seed=0)
    assert (
        made.lm_head.weight is made.transformer.wte.weight
        and made.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.15)
    )


def test_the_published_sae_loss_is_elementwise_on_raw_vectors_and_raw_codes(published: Any) -> None:
    """A step of the fit has the gradient of ``mean (x - xhat)^2 + 1e-3 sum KL(0.05 || mean
    z)``, everything in the vectors' own units.
    """
    (sae_spec,) = published.saes.values()
    assert published.fit.scale == "none" and not published.center
    x = 0.3 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) + 0.2
    sae = sae_spec.seeded(128, 128, 0)
    sae.begin("train", x, x)
    step = Step(
        phase="train",
        progress=0.5,
        dead=torch.zeros(512, dtype=torch.bool),
        generator=torch.Generator(),
    )
    total = sae.loss(Batch(x, x), step).total
    z = torch.nn.functional.gelu((x - sae.b_dec) @ sae.W_enc.t() + sae.b_enc)
    rate = z.mean(0).clamp(1e-6, 1 - 1e-6)
    kl = 0.05 * torch.log(0.05 / rate) + 0.95 * torch.log(0.95 / (1 - rate))
    by_hand = torch.nn.functional.mse_loss(z @ sae.W_dec + sae.b_dec, x) + 1e-3 * kl.sum()
    assert total.item() == pytest.approx(by_hand.item(), rel=1e-5)
    weights = list(sae.parameters())
    for found, wanted in zip(
        torch.autograd.grad(total, weights), torch.autograd.grad(by_hand, weights), strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-7)


def test_the_published_fit_leaves_units_and_decoder_lengths_alone(published: Any) -> None:
    (sae_spec,) = published.saes.values()
    x = 0.3 * torch.randn(512, 128, generator=torch.Generator().manual_seed(0)) + 0.2
    seen = []

    def fitted(scale: str) -> SAE:
        sae = sae_spec.seeded(128, 128, 0)
        loss = sae.loss
        sae.loss = lambda batch, step: (seen.append(batch.x), loss(batch, step))[1]
        cfg = replace(published.fit.train, steps=30, lr=1e-2)
        fit_saes(
            {"sae": sae},
            lambda _: Batch(x, x),
            cfg,
            Sample(x, x, x),
            seed=0,
            dead_after=10**9,
            handling=RowHandling(scale),
        )
        return sae

    sae = fitted(published.fit.scale)
    assert all(torch.equal(rows, x) for rows in seen), "the loss sees the vectors themselves"
    lengths = sae.W_dec.norm(dim=1)
    assert float((lengths - 1).abs().max()) > 0.02, "decoder rows have the lengths that they learn"
    seen.clear()
    fitted("spread")
    assert not torch.allclose(seen[0], x)


SMALL = (
    "study=palindrome",
    "preset=smoke",
    "threads=1",
    "study.fit.train.steps=30",
    "study.train.steps=20",
)


def test_the_study_from_start_to_end(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    status = in_this_process(experiment, "--out_dir=run_0", *SMALL, tiny=False)
    assert status == 0, capsys.readouterr().err
    means = means_of(experiment.json("run_0", "final_info.json")["palindrome"])
    assert {
        f"{m}_mean"
        for m in ("excess_loss", "mirror_accuracy", "explained_variance", "alive_latents")
    } <= set(means)
    with np.load(experiment.runs / "run_0" / "arrays" / "palindrome_0.npz") as arrays:
        assert arrays["dictionary"].shape == (512, 8, 16)
        assert arrays["selectivity"].shape == (512, 3, 26)
        attention = arrays["attention_mean"]
    assert np.allclose(attention.sum(1), 1, atol=1e-4) and np.allclose(
        attention, np.tril(attention)
    )
    assert len(experiment.json("run_0", "features", "palindrome_0.json")) == 512
    assert experiment.json("run_0", "manifest.json")["label"] == "kl_rate"
    done, empty = drawn(experiment.runs / "run_0", "palindrome_", experiment.here)
    assert len(done) == 4 and not empty


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("study.fit.calibration_rows=15800", "use at most"),
        ("study.data.test_frac=0", "empty split"),
        ("study.lm.n_layer=2", "n_layer=2"),
        ("study.fit.scale=odd", "fit.scale='odd'"),
        ("study.data.split=odd", "odd"),
    ],
)
def test_mistakes_are_one_line_before_training(
    experiment: Experiment, capsys: pytest.CaptureFixture[str], wrong: str, told: str
) -> None:
    assert_is_refused(experiment, capsys, told, *SMALL, wrong, tiny=False)


@pytest.mark.slow
def test_the_default_setting_solves_the_task(experiment: Experiment) -> None:
    done = experiment(
        "--out_dir=run_0", "study=palindrome", "preset=laptop", tiny=False, timeout=400
    )
    assert done.returncode == 0, done.stderr
    means = means_of(experiment.json("run_0", "final_info.json")["palindrome"])
    assert means["mirror_accuracy_mean"] == 1.0
    assert means["excess_loss_mean"] < 0.005
    assert means["explained_variance_mean"] > 0.9969
    assert means["alive_latents_mean"] > 435
