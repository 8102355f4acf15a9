"""The palindrome study: its data, its tables on a known dictionary, and the whole of it from start to end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import CONF, Experiment
from drawing import drawn

from sae_experiments.config import build, compose_checked
from sae_experiments.io import UserError
from sae_experiments.progress import Console
from sae_experiments.studies import palindrome
from sae_experiments.studies.base import Context
from sae_experiments.studies.palindrome import split_ids
from sae_experiments.studies.selectivity import browser, tables
from sae_experiments.studies.strings import FLOOR, MIRROR, SYMBOLS, Strings, all_strings, rows_at, text_of
from sae_experiments.training import seed_of


def test_all_strings_and_the_floor() -> None:
    strings = all_strings()
    assert strings.shape == (26**3, 9) and len(SYMBOLS) == 29
    assert text_of(strings[0]) == "<aaa|aaa>" and text_of(strings[1]) == "<aab|baa>" and text_of(strings[-1]) == "<zzz|zzz>"
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
    [("random", 0.0, "empty split"), ("random", 1.0, "empty split"), ("random", -1, "between 0 and 1"), ("odd", 0.1, "odd")],
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
    acts = torch.stack([(letters[:, 1] == 4).float(), torch.full((len(letters),), 2.0), (letters[:, 0] == letters[:, 2]).float()], 1)
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
def test_an_sae_is_calibrated_on_training_strings_that_it_was_not_fitted_to(split: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, _ = compose_checked(CONF, ["study=palindrome", "preset=smoke", f"study.data.split={split}", "sae=topk", "study.fit.train.steps=30"])
    study, seen = build(cfg.study), {}

    def fit(saes, batch_at, configs, sample, **kwargs):
        batches = [batch_at(step).x[:, 0] for step in range(100)]
        seen.update(learned=torch.cat([*batches, sample.x[:, 0]]), held=sample.held[:, 0])
        raise KeyboardInterrupt

    monkeypatch.setattr(palindrome, "fit_saes", fit)
    train = study.data.parts(seed_of(0, "split"))[0]
    x = torch.arange(len(train), dtype=torch.float32)[:, None].expand(-1, study.width)  # a row says which string it is
    ctx = Context(folder=tmp_path, cache=tmp_path, device=torch.device("cpu"), console=Console(verbosity="quiet"))
    with pytest.raises(KeyboardInterrupt):
        study.fitted(x, {}, 0, ctx)
    learned, held = (set(seen[k].tolist()) for k in ("learned", "held"))
    assert not learned & held and len(held) == 1582 and len(learned) > 0.99 * (len(train) - 1582)
    first = train[sorted(map(int, held)), 1]
    assert len(first.unique()) == len(train[:, 1].unique()), "strings of every first letter, in either split"


SMALL = ("study=palindrome", "preset=smoke", "threads=1", "study.fit.train.steps=30", "study.train.steps=20")


def test_the_study_from_start_to_end(experiment: Experiment) -> None:
    done = experiment("--out_dir=run_0", *SMALL, tiny=False)
    assert done.returncode == 0, done.stderr
    means = experiment.json("run_0", "final_info.json")["palindrome"]["means"]
    assert {f"{m}_mean" for m in ("excess_loss", "mirror_accuracy", "explained_variance", "alive_latents")} <= set(means)
    with np.load(experiment.runs / "run_0" / "arrays" / "palindrome_0.npz") as arrays:
        assert arrays["dictionary"].shape == (512, 8, 16)
        assert arrays["selectivity"].shape == (512, 3, 26)
        attention = arrays["attention_mean"]
    assert np.allclose(attention.sum(1), 1, atol=1e-4) and np.allclose(attention, np.tril(attention))
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
        ("study.data.split=odd", "odd"),
    ],
)
def test_mistakes_are_one_line_before_training(experiment: Experiment, wrong: str, told: str) -> None:
    done = experiment("--out_dir=bad", *SMALL, wrong, tiny=False)
    assert done.returncode == 2
    assert told in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (experiment.runs / "bad").exists()


@pytest.mark.slow
def test_the_default_setting_solves_the_task(experiment: Experiment) -> None:
    done = experiment("--out_dir=run_0", "study=palindrome", "preset=laptop", tiny=False, timeout=400)
    assert done.returncode == 0, done.stderr
    means = experiment.json("run_0", "final_info.json")["palindrome"]["means"]
    assert means["mirror_accuracy_mean"] == 1.0
    assert means["excess_loss_mean"] < 0.005
    assert means["explained_variance_mean"] > 0.9969
    assert means["alive_latents_mean"] > 435
