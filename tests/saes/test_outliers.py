"""Outlier rows are found by one rule, and change nothing for the others: not a bit of any fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sae_experiments import build_sae, evaluate, fit_saes
from sae_experiments.errors import UserError
from sae_experiments.fitting import fit
from sae_experiments.fitting.fit import RowHandling, Sample
from sae_experiments.saes.base import SAE, Batch
from sae_experiments.saes.outliers import Region
from support.saes import L0, NAMES, D, config, downstream, effect, make, rows

HUGE = 300.0


def outlying(n: int = 1) -> Tensor:
    """Rows far out in two directions."""
    far = rows(n, 7)
    far[:, 0] += HUGE
    far[:, D - 1] -= HUGE
    return far


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("share", [0.0002, 0.008, 0.04])
def test_the_rule_finds_few_huge_rows_and_no_others(share: float, offset: float) -> None:
    x = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(0)) + offset
    first = round(share * len(x))
    x[:first, 3] += 200.0
    region = Region.of(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))])
    assert torch.equal(region.contains(x), torch.arange(len(x)) >= first)


def test_heavy_tails_and_rows_that_are_mostly_equal_have_no_outliers() -> None:
    g = torch.Generator().manual_seed(0)
    on = (torch.rand(20_000, 64, generator=g) < 0.02).float()
    sparse = on * torch.rand(20_000, 64, generator=g)
    assert Region.of(sparse).contains(sparse).float().mean() > 0.999
    seldom = torch.zeros(20_000, 8)
    seldom[::50] = torch.randn(400, 8, generator=g)
    assert Region.of(seldom).contains(seldom).all(), "all there is to learn is in these rows"
    assert Region.of(torch.ones(50, 8)).contains(torch.ones(50, 8)).all()


def test_a_block_of_columns_is_judged_by_itself() -> None:
    x = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))
    x[:, 8:] *= 1000.0
    x[0, 0] = 100.0
    assert int((~Region.of(x, 2).contains(x)).sum()) == 1
    assert int((~Region.of(x).contains(x)).sum()) == 0


def test_what_is_not_finite_is_no_outlier() -> None:
    x = rows(1000, 0)
    x[3, 2], x[4, 2] = torch.nan, torch.inf
    assert Region.of(rows(1000, 0)).contains(x)[3:5].all()


def fitted(name: str, beside: Callable[[Tensor], Tensor], **more: str) -> SAE:
    """An SAE fitted to rows, after `beside` has put outliers among them."""
    sae, start = make(name), beside(rows(4096, 10**6))

    def batch_at(step: int) -> Batch:
        x = rows(256, step)
        inside = torch.isin(beside(x)[:, 0], x[:, 0])
        assert int(inside.sum()) == len(x)

        def rest(tokens: Tensor, recon: Tensor) -> dict[str, Tensor]:
            assert torch.equal(recon[~inside], beside(x)[~inside]), "outliers stay as they are"
            return effect(tokens, recon[inside])

        alt = beside(x + 0.01)
        alt[0] = outlying()[0] if len(alt) > len(x) else x[0]
        return Batch(beside(x), beside(x), alt, downstream(x)._replace(effect=rest))

    fit.fit_saes(
        {name: sae},
        batch_at,
        config(steps=12, warmup_steps=2),
        Sample(start, start, beside(rows(2048, 10**6 + 1))),
        seed=0,
        dead_after=1000,
        handling=RowHandling(**more),
    )
    return sae


@pytest.mark.parametrize("name", NAMES)
def test_no_variant_is_changed_by_outliers(name: str) -> None:
    """Weights and thresholds are those of a fit without such rows, bit by bit."""
    clean = fitted(name, lambda x: x)
    spoilt = fitted(name, lambda x: torch.cat([x, outlying()]))
    for key, value in clean.state_dict().items():
        torch.testing.assert_close(
            value, spoilt.state_dict()[key], rtol=0, atol=0, equal_nan=True, msg=key
        )


def test_outliers_are_fitted_where_that_is_asked_for() -> None:
    clean = fitted("topk", lambda x: x)
    kept = fitted("topk", lambda x: torch.cat([x, outlying()]), outliers="keep")
    assert not torch.equal(clean.W_enc, kept.W_enc)
    with pytest.raises(UserError, match=r"fit\.outliers='drop' is not one of leave_out, keep"):
        fitted("topk", lambda x: x, outliers="drop")


@pytest.mark.parametrize("name", ["topk", "batch_topk", "standard"])
def test_tensors_with_outliers_fit_as_well_and_are_reported(name: str) -> None:
    x, held = rows(8192, 0), rows(4096, 1)
    spoilt = x.clone()
    spoilt[::4096] = outlying(2)
    settings = {"steps": 200, "batch_size": 256, "lr": 5e-3, "warmup_steps": 20}
    ordinary = []
    for rows_given in (x, spoilt):
        sae = build_sae(name, D, target_l0=L0, d_sae=48)
        if rows_given is x:
            report = fit_saes(sae, rows_given, **settings)["sae"]
            assert report.outliers["outliers"] == 0
        else:
            with pytest.warns(UserWarning, match="are outliers"):
                report = fit_saes(sae, rows_given, **settings)["sae"]
            assert report.outliers["outliers"] == 2
            assert report.outliers["variance_frac"] > 0.5
            assert "fit_outliers" in [one.key for one in report.warned]
        ordinary.append(evaluate(sae, held)["sae_fvu_ordinary"])
    assert ordinary[1] <= 1.05 * ordinary[0]
