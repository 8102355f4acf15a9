"""What a fit says of itself: laws over every SAE of conf/sae."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from sae_experiments.errors import UserError
from sae_experiments.fitting.fit import OF_THE_PASS, FitReport, Sample, fit_saes
from sae_experiments.saes.base import SAE
from sae_experiments.training.loop import TrainConfig
from support.saes import NAMES, batch, config, make, rows

STEPS = 10


def fitted(sae: SAE, given: int) -> FitReport:
    """The report of a short fit to batches of ``given`` rows, which the recipe takes to have
    256.
    """
    start = rows(512, 10**6)
    sample = Sample(start, start, rows(512, 10**6 + 1))
    return fit_saes(
        {"sae": sae},
        lambda s: batch(given, s),
        config(steps=STEPS),
        sample,
        seed=0,
        dead_after=4000,
    )["sae"]


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_counts_the_rows_that_the_steps_used(name: str) -> None:
    overrides = ["sae.target_l0=null"] if name == "hierarchical" else []
    report = fitted(make(name, *overrides), 100)
    assert report.rows_per_second * report.seconds == pytest.approx(100 * STEPS)


def test_a_phase_on_a_sample_of_the_batch_counts_the_sample_alone() -> None:
    sae = make("hierarchical", "sae.target_l0=null", "sae.model.rows=32")
    report = fitted(sae, 100)
    first = round(STEPS * sae.phases()[0].fraction)
    assert report.rows_per_second * report.seconds == pytest.approx(
        100 * first + 32 * (STEPS - first)
    )


@pytest.mark.parametrize("key", OF_THE_PASS)
def test_numbers_of_the_pass_must_not_differ_between_its_saes(key: str) -> None:
    cfg = config(steps=STEPS)
    value = getattr(cfg, key)
    configs = {"one": cfg, "other": replace(cfg, **{key: value + 1})}
    saes = {name: make("topk") for name in configs}
    start = rows(512, 10**6)
    with pytest.raises(UserError) as error:
        fit_saes(
            saes,
            lambda s: batch(256, s),
            configs,
            Sample(start, start, start),
            seed=0,
            dead_after=4000,
        )
    message = str(error.value)
    assert f"{key}={value + 1} of other" in message and f"{key}={value} of one" in message
    assert "\n" not in message


def test_every_number_of_a_fit_belongs_to_the_pass_or_to_one_sae() -> None:
    from sae_experiments.fitting.spec import PER_SAE_SETTINGS

    names = {field.name for field in fields(TrainConfig)}
    assert set(OF_THE_PASS) | set(PER_SAE_SETTINGS) | {"muon_lr"} == names
    assert not set(OF_THE_PASS) & set(PER_SAE_SETTINGS)
