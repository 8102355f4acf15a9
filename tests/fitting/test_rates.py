"""The default learning rate of SAEs: its numbers, its back-off, and wide rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_experiments import build_sae, evaluate, fit_saes
from sae_experiments.errors import UserError
from sae_experiments.fitting import fit
from sae_experiments.fitting.fit import Sample
from sae_experiments.fitting.rates import (
    BackOff,
    default_lr,
    directions,
    fewest_directions,
    with_default_lrs,
)
from sae_experiments.saes.base import SAE
from sae_experiments.training.loop import Session
from support.saes import NAMES, D, batch, config, make, rows

WIDE = 256
#: Not judged by their dead latents: random and frozen ones do not learn, and the decay of
#: `encoder_decay` silences latents at any rate.
ASIDE = {"random", "frozen_decoder", "encoder_decay"}


def fits_a_tensor(name: str) -> bool:
    """Whether a variant can be fitted to one tensor of rows, which `build_sae` decides."""
    try:
        build_sae(name, WIDE, target_l0=16, d_sae=WIDE)
    except UserError:
        return False
    return True


#: The others are slow: a second each.
QUICK = ("batch_topk", "jumprelu", "standard")
ON_TENSORS = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
    for name in NAMES
    if name not in ASIDE and fits_a_tensor(name)
]


def spanned(n_directions: int, n_sites: int) -> Tensor:
    """Rows that vary equally in some directions of every site, and not around 0."""
    axes = torch.eye(n_directions).repeat_interleave(2, 0)
    axes[::2] *= -1
    return (100 + axes).repeat(1, n_sites)


def rate_for(sae: SAE, x: torch.Tensor) -> float:
    return default_lr(sae, fewest_directions(x, sae.n_sites))


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_of_every_variant_falls_with_the_root_of_the_width(name: str) -> None:
    sae, rates = make(name), []
    for width in (64, 128, 512, 1024, 2048):
        sae.d_in = width * (sae.n_sites if sae.per_site else 1)
        rates.append(rate_for(sae, spanned(32, sae.n_sites)))
    expected = [6e-3, 6e-3, 3e-3, 2.12e-3, 1.5e-3]
    assert rates == pytest.approx([sae.default_lr_factor * rate for rate in expected], rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_of_every_variant_falls_with_the_root_of_few_directions(name: str) -> None:
    sae = make(name)
    sae.d_in = 512 * (sae.n_sites if sae.per_site else 1)
    rates = [rate_for(sae, spanned(n, sae.n_sites)) for n in (1, 4, 25, 50)]
    expected = [6e-4, 1.2e-3, 3e-3, 3e-3]
    assert rates == pytest.approx([sae.default_lr_factor * rate for rate in expected], rel=0.03)


def test_the_number_of_directions_is_the_participation_ratio() -> None:
    assert directions(spanned(7, 1)) == pytest.approx(7, rel=1e-4)
    assert directions(torch.full((10, 6), 3.0)) == 6, "constant rows say nothing about directions"
    uneven = spanned(2, 1) * torch.tensor([3.0, 1.0])
    assert directions(uneven) == pytest.approx((9 + 1) ** 2 / (81 + 1), rel=1e-4)


def test_the_site_with_the_fewest_directions_decides() -> None:
    sae = make("crosscoder")
    parts = [spanned(32, 1), *[spanned(4, 1)[torch.arange(64) % 8]] * (sae.n_sites - 1)]
    sites = [torch.nn.functional.pad(part, (0, 32 - part.shape[1])) for part in parts]
    assert rate_for(sae, torch.cat(sites, 1)) == rate_for(sae, spanned(4, sae.n_sites))


def test_a_typed_rate_is_taken_as_typed() -> None:
    sae = make("topk")
    typed = config(lr=0.123)
    x = rows(64, 0)
    other = make("standard")
    saes = {"typed": sae, "default": sae, "other": other}
    given = {"typed": typed, "default": replace(typed, lr=None), "other": replace(typed, lr=None)}
    found = with_default_lrs(given, saes, x)
    assert found["typed"] is typed
    assert found["default"].lr == rate_for(sae, x)
    assert found["other"].lr == rate_for(other, x) != found["default"].lr


def test_only_saes_have_a_default_rate() -> None:
    with pytest.raises(UserError, match=r"train\.lr=null"):
        _ = config(lr=None).peak_lr


def _back_off(**changes: Any) -> BackOff:
    return BackOff(**({"steps": 2000, "firings": 100.0} | changes))


def _looks(
    back_off: BackOff, errors: list[float], l0: float = 8.0, dead: float = 0.0
) -> list[float]:
    factors = []
    for error in errors:
        back_off.look(error, l0, dead)
        factors.append(float(back_off.factor))
    return factors


def test_an_error_that_falls_leaves_the_rate_alone() -> None:
    errors = [1 / (1 + i) for i in range(50)]
    errors[30] = 9.0
    assert set(_looks(_back_off(), errors)) == {1.0}, "one odd batch is no climb"


def test_an_error_that_climbs_halves_the_rate_once_at_a_time() -> None:
    factors = _looks(_back_off(), [0.2] * 20 + [0.3] * 40)
    assert factors[19] == 1.0 and factors[-1] == 0.5, "earlier errors are forgotten then"


def test_an_error_that_climbs_as_latents_are_taken_away_leaves_the_rate_alone() -> None:
    back_off = _back_off()
    for i in range(40):
        back_off.look(0.2 * 1.05**i, 32 - 0.7 * i, 0.0)
    assert back_off.factor == 1.0


def test_latents_that_die_in_masses_halve_the_rate_as_long_as_more_die() -> None:
    back_off = _back_off()
    assert _looks(back_off, [0.2] * 30, dead=0.3)[-1] == 0.5
    assert _looks(back_off, [0.2] * 30, dead=0.3)[-1] == 0.5, "no more died"
    assert _looks(back_off, [0.2] * 30, dead=0.4)[-1] == 0.25
    assert set(_looks(_back_off(firings=1.0), [0.2] * 30, dead=0.9)) == {1.0}


def test_the_rate_does_not_fall_without_end() -> None:
    back_off = _back_off(steps=20_000)
    for i in range(1000):
        back_off.look(1.05**i, 8.0, 0.0)
    assert back_off.factor == BackOff.LEAST


class _Stopped(Exception):
    pass


def _fit(path: Path | None, stop_at: int | None) -> tuple[SAE, fit.FitReport | None]:
    """A fit whose rows lose their structure half way, so that its error climbs."""
    sae = make("topk")
    start = rows(2048, 10**6)

    def batch_at(step: int) -> Any:
        if step == stop_at:
            raise _Stopped
        given = batch(128, step)
        if step < 150:
            return given._replace(downstream=None)
        noise = torch.randn(128, D, generator=torch.Generator().manual_seed(step))
        x = given.x + noise
        return given._replace(x=x, y=x, downstream=None)

    cfg = config(steps=400, batch_size=128, lr=None, checkpoint_every_s=0.0)
    session = Session(checkpoint=path)
    sample = Sample(start, start, start)
    try:
        report = fit.fit_saes(
            {"topk": sae}, batch_at, cfg, sample, seed=0, dead_after=1000, session=session
        )["topk"]
    except _Stopped:
        return sae, None
    return sae, report


def test_a_fit_steps_back_says_so_and_resumes_with_the_same_bits(tmp_path: Path) -> None:
    whole, report = _fit(None, None)
    assert report is not None and report.lr_factor < 1
    assert report.lr == rate_for(make("topk"), rows(2048, 10**6))
    assert report.facts["lr_factor"] == report.lr_factor
    assert "fit_lr" in [one.key for one in report.warned]
    rates = [value for _, name, value in report.history if name == "lr"]
    assert max(rates) == pytest.approx(report.lr)
    assert _fit(tmp_path / "checkpoint", 333)[1] is None
    resumed, again = _fit(tmp_path / "checkpoint", None)
    assert again is not None and again.lr_factor == report.lr_factor
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def wide(n: int, seed: int) -> Tensor:
    """Sums of a few of 512 directions of width 256, whose frequencies fall as a power."""
    directions = torch.randn(2 * WIDE, WIDE, generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(directions, dim=1)
    frequency = 0.3 * torch.arange(1, 2 * WIDE + 1) ** -0.6
    g = torch.Generator().manual_seed(seed)
    on = torch.rand(n, 2 * WIDE, generator=g) < frequency
    return on * (torch.rand(n, 2 * WIDE, generator=g) + 0.5) @ directions


@pytest.mark.parametrize("name", ON_TENSORS)
def test_wide_rows_keep_their_latents_with_no_number_typed(name: str) -> None:
    sae = build_sae(name, WIDE, target_l0=16, d_sae=WIDE)
    fit_saes(sae, wide(4096, 1), steps=60, batch_size=128, warmup_steps=10)
    assert evaluate(sae, wide(2048, 2))["sae_dead_frac"] <= 0.05


@pytest.mark.parametrize("name", ["hierarchical", "end_to_end"])
def test_variants_whose_terms_change_do_not_step_back(name: str) -> None:
    sae, start = make(name), rows(1024, 0)
    assert not sae.judged_by_fvu
    cfg = config(steps=10, lr=None)
    learner = fit.SAELearner(
        name,
        sae,
        with_default_lrs({name: cfg}, {name: sae}, start)[name],
        Sample(start, start, start),
        dead_after=100,
        seed=0,
    )
    learner.watch(cfg)
    assert learner.back_off is None and learner.lr_factor() == 1.0
