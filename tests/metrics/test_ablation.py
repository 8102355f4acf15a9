"""Ablations with known answers: all latents at once are zero or mean ablation, latents that do
nothing cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sae_experiments.metrics import ablation, downstream
from sae_experiments.metrics.base import EvalContext, LMSplice, Measured
from sae_experiments.models.hooks import Site
from support.metric_worlds import CPU, Given, validation_store, validation_tokens

SITE = Site("resid", 1)
OPTIONS = {
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


@pytest.fixture(scope="module")
def world(
    trained: Any, corpus: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., EvalContext]:
    store = validation_store(trained, corpus, [SITE], tmp_path_factory.mktemp("stores"))
    tokens = validation_tokens(corpus)
    return lambda sae: EvalContext(
        sae=sae,
        device=CPU,
        read=SITE,
        write=SITE,
        held_out=store,
        lm=LMSplice(trained.model, SITE, tokens),
    )


def both_signs(extra: int = 0) -> Given:
    """Positive and negative parts of every dimension: a perfect copy. ``extra`` latents fire
    and write nothing.
    """
    eye = torch.eye(16)
    return Given(
        torch.cat([eye, -eye, eye[:extra]]), w_dec=torch.cat([eye, -eye, torch.zeros(extra, 16)])
    )


def measure(ctx: EvalContext, **options: Any) -> Measured:
    return ablation.measure(ctx, **(OPTIONS | options))


@pytest.mark.parametrize(
    ("mean", "key"), [(False, "loss_recovered_zero"), (True, "loss_recovered")]
)
def test_all_latents_together_are_zero_or_mean_ablation(world, mean, key):
    ctx = world(both_signs())
    found = measure(ctx, mean=mean).scalars
    zero = Given(torch.zeros(1, 16), w_dec=torch.zeros(1, 16))
    mean_activation = ctx.held_out.rows(SITE, slice(None)).mean(0)
    zero.b_dec.data.copy_(mean_activation * mean)
    expected = downstream.measure(world(zero), windows=40, batch=8).scalars
    assert expected[key] == pytest.approx(0, abs=1e-5)
    assert found["ablate_frequent_ce_delta_bits"] == pytest.approx(
        expected["ce_delta_bits"], rel=1e-4
    )
    assert (
        found["ablate_frequent_kl"] == pytest.approx(expected["kl"], rel=1e-4)
        and found["ablate_rare_kl"] == found["ablate_frequent_kl"]
    )


def test_latents_that_write_nothing_cost_nothing(world):
    sae = Given(torch.eye(16), w_dec=torch.zeros(16, 16))
    found = measure(world(sae), groups=4)
    assert all(
        found.scalars[k] == pytest.approx(0, abs=1e-6) for k in found.scalars if "level" not in k
    )


def test_the_error_of_the_sae_stays_in(world):
    """A dictionary that rebuilds badly has effects of its own atoms only: the other dimensions
    stay as they were.
    """
    good, bad = both_signs(), Given(torch.eye(16)[:3])
    bad.b_dec.data.add_(5.0)
    bad.pre_bias = False
    one = measure(world(bad), groups=3, latents=3).arrays
    same = measure(world(good), latents=32).arrays
    assert np.isfinite(one["ablate_latent_kl_each"]).all()
    for j, kl in zip(one["ablate_latents"], one["ablate_latent_kl_each"], strict=True):
        assert kl == pytest.approx(
            same["ablate_latent_kl_each"][same["ablate_latents"].tolist().index(j)], rel=1e-3
        )


def test_levels_are_removed_where_there_are_some(world):
    sae = both_signs(4)
    sae.register_buffer("group", torch.tensor([0] * 32 + [1] * 4))
    found = measure(world(sae))
    assert found.scalars["ablate_first_level_kl"] > 0.01 and found.scalars[
        "ablate_last_level_kl"
    ] == pytest.approx(0, abs=1e-6)
    assert len(found.arrays["ablate_level_kl"]) == 2
    assert "no levels" in measure(world(both_signs())).why_null["ablate_first_level_kl"]


def given(measured: Measured) -> dict[str, float]:
    return {name: v for name, v in measured.scalars.items() if v is not None}


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_batch_size_changes_nothing(world, batch):
    assert given(measure(world(both_signs()), batch=batch, groups=3)) == pytest.approx(
        given(measure(world(both_signs()), groups=3)), rel=1e-3, abs=1e-6
    )


def test_what_cannot_be_measured_is_null_with_a_reason(world):
    no_text = measure(EvalContext(sae=Given(), device=CPU, x=torch.randn(9, 4)))
    broken = measure(world(Given(torch.eye(16) * math.nan)))
    for found in (no_text, broken):
        assert set(found.scalars) == {i.name for i in ablation.INFO} == set(found.why_null) and set(
            found.scalars.values()
        ) == {None}
    dead = measure(world(Given(torch.eye(16), b_enc=torch.full((16,), -1e6))))
    assert set(dead.scalars.values()) == {None} and "active" in dead.why_null["ablate_latent_kl"]
