"""Code lengths with known answers: coins, uniform values, Gaussians and codes that cost nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import sparse

from sae_experiments.metrics import coding, compression
from sae_experiments.metrics.base import EvalContext, LMSplice, Measured
from sae_experiments.metrics.codes import decoded, sparse_codes
from sae_experiments.metrics.rate_distortion import rise, windows_of
from sae_experiments.models.hooks import Site
from support.metric_worlds import CPU, Chunked, Given, validation_store, validation_tokens
from support.saes import rows, trained

OPTIONS = {"rows": None, "steps": [4, 2, 1, 0.5, 0.25, 0.125, 0.01], "tolerance": 0.05, "block": 50}
OPTIONS |= {"entries": 10**9, "keep": [0.5, 1], "limit": 0.1, "windows": 16, "batch": 8}

WITH_A_MODEL = {
    "code_bits_ce",
    "code_ce_delta_bits",
    "bits_per_char",
    "bits_per_char_bottom",
    "bits_per_char_top",
}


def h2(f: float) -> float:
    return -f * math.log2(f) - (1 - f) * math.log2(1 - f)


def coins(n: int, m: int, f: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((n, m)) < f).astype(np.float32)


def measure(
    x: np.ndarray, sae: Given | None = None, kind: type[EvalContext] = EvalContext, **options
):
    return compression.measure(
        kind(sae=sae or Given(d_in=x.shape[1]), device=CPU, x=torch.from_numpy(x)),
        **(OPTIONS | options),
    )


@pytest.mark.parametrize("f", [0.02, 0.2, 0.5])
def test_independent_coins_cost_their_entropy_and_nothing_for_values(f):
    found = measure(coins(20_000, 30, f)).scalars
    assert found["code_support_bits"] == pytest.approx(30 * h2(f), rel=0.01)
    assert found["code_support_bits_bernoulli"] == pytest.approx(30 * h2(f), rel=0.01)
    assert found["code_value_bits"] == pytest.approx(0, abs=0.05) and found[
        "code_fvu"
    ] == pytest.approx(0, abs=1e-9)
    assert found["code_bits"] == found["code_support_bits"] + found["code_value_bits"]


def test_the_uniform_support_code_is_a_binomial_coefficient():
    codes = np.zeros((10, 12), np.float32)
    codes[:, :3] = 1
    found = coding.support_bits(sparse.csr_matrix(codes), sparse.csr_matrix(codes))
    assert found["code_support_bits_uniform"] == pytest.approx(
        math.log2(math.comb(12, 3)) + math.log2(12)
    )
    assert found["code_support_bits_bernoulli"] == 0, (
        "latents that always or never fire carry nothing"
    )


def test_uniform_values_cost_the_logarithm_of_the_number_of_bins():
    values = sparse.csr_matrix(
        np.random.default_rng(0).uniform(0.001, 1.732, (20_000, 1)).astype(np.float32)
    )  # root mean square 1
    bits, rebuilt = coding.Quantiser(values, values).at(1.732 / 8)
    assert bits == pytest.approx(3, abs=0.02)
    assert float(np.square((values - rebuilt).data).mean()) == pytest.approx(
        (1.732 / 8) ** 2 / 12, rel=0.05
    )


def test_values_never_seen_in_training_cost_finitely_many_bits_and_are_rebuilt_to_half_a_bin():
    train, test = (
        sparse.csr_matrix(np.array(v, np.float32)[:, None]) for v in ([1, 1, 1, 1], [5.3, 1, -2, 1])
    )
    bits, rebuilt = coding.Quantiser(train, test).at(0.5)
    assert 0 < bits < 20 and np.abs((test - rebuilt).toarray()).max() <= 0.25 + 1e-6


def test_water_filling_has_its_closed_forms():
    assert coding.water_filling(np.full(8, 2.0), 0.25) == pytest.approx(8 * 0.5 * math.log2(4))
    assert coding.water_filling(np.array([4.0, 1.0]), 2 / 5) == pytest.approx(
        0.5 * math.log2(4 / 1)
    )
    assert coding.water_filling(np.array([4.0, 1.0, 0.0]), 1.0) == 0


def test_the_dense_code_of_a_gaussian_costs_a_quarter_bit_above_its_bound_at_high_rate():
    x = np.random.default_rng(0).normal(size=(100_000, 2)).astype(np.float32)
    found = coding.landmarks(x, 0.01, 2)
    assert found["code_bits_pca"] == pytest.approx(2 * 0.5 * math.log2(100), rel=0.01)
    assert found["code_bits_dense"] - found["code_bits_pca"] == pytest.approx(2 * 0.254, abs=0.03)
    assert found["code_bits_alphabet"] == 1


def test_finer_steps_cost_more_and_lose_less():
    x = np.abs(np.random.default_rng(0).normal(size=(4000, 6))).astype(np.float32) * coins(
        4000, 6, 0.5
    )
    found = measure(x)
    assert (np.diff(found.arrays["code_curve_bits"]) > 0).all() and (
        np.diff(found.arrays["code_curve_fvu"]) < 0
    ).all()


def test_order_and_unit_of_the_latents_and_the_size_of_chunks_change_nothing():
    x = np.abs(np.random.default_rng(0).normal(size=(2000, 6))).astype(np.float32) * coins(
        2000, 6, 0.5
    )
    sae = Given(torch.eye(6)[[3, 1, 0, 5, 4, 2]] * 7, w_dec=torch.eye(6)[[3, 1, 0, 5, 4, 2]] / 7)
    plain = given(measure(x))
    assert given(measure(x, sae)) == pytest.approx(plain, rel=1e-3)
    assert given(measure(x, kind=Chunked)) == pytest.approx(plain, rel=1e-9)


def given(measured: Measured) -> dict[str, float]:
    return {name: v for name, v in measured.scalars.items() if v is not None}


QUANTISED = {
    "code_bits",
    "code_value_bits",
    "code_step",
    "code_fvu",
    "code_bits_pca",
    "code_bits_dense",
}


@pytest.mark.parametrize(
    "steps", [[4], [4, 2], [2, 1, 0.5], [0.5, 4, 1], [1, 0.25, 0.125], [0.125, 0.03125]]
)
@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("kept", [3, 5, 6])
def test_a_code_length_is_that_of_a_quantiser_within_the_tolerance_or_null(steps, tolerance, kept):
    """``kept`` of six dimensions have a latent: the SAE leaves FVU 1/2, 1/6 and 0."""
    x = np.abs(np.random.default_rng(0).normal(size=(1000, 6))).astype(np.float32) * coins(
        1000, 6, 0.5
    )
    sae = Given(torch.eye(6)[:kept])
    found = measure(x, sae, steps=steps, tolerance=tolerance)
    tail = x[np.arange(1000) // OPTIONS["block"] % 2 == 1]
    exact = float(np.square(tail[:, kept:]).sum() / np.square(tail - tail.mean(0)).sum())
    fine = found.arrays["code_curve_fvu"] <= (1 + tolerance) * exact + 1e-6
    if not fine.any():
        assert {k for k in QUANTISED if found.scalars[k] is None} == QUANTISED
        assert all("finer" in found.why_null[k] for k in QUANTISED)
    else:
        assert found.scalars["code_step"] == max(found.arrays["code_curve_step"][fine])
        assert found.scalars["code_fvu"] <= (1 + tolerance) * exact + 1e-6
    assert found.scalars["code_support_bits"] is not None, "the support needs no quantiser"


@pytest.mark.parametrize(
    ("steps", "tolerance"), [([2], 0.05), ([1, 0.1], 0.05), ([4, 0.5, 0.01], 0.3)]
)
def test_the_same_for_the_cross_entropy(steps, tolerance, trained, corpus, tmp_path):
    site = Site("resid", 1)
    store = validation_store(trained, corpus, [site], tmp_path)
    tokens = validation_tokens(corpus)
    eye = torch.eye(16)[:12]
    sae = Given(torch.cat([eye, -eye]))
    ctx = EvalContext(
        sae=sae,
        device=CPU,
        read=site,
        write=site,
        held_out=store,
        lm=LMSplice(trained.model, site, tokens),
    )
    found = compression.measure(
        ctx, **(OPTIONS | {"steps": steps, "tolerance": tolerance, "block": 16})
    )
    whole = found.arrays["code_ce_keep"] == 1
    test = np.arange(640) // 16 % 2 == 1
    window = windows_of(ctx, test, 16, 8)
    exact = rise(ctx, window, sparse_codes(ctx, None)[test], lambda z: decoded(sae, z), None, 8)
    fine = found.arrays["code_ce_ce"][whole] <= exact + tolerance * abs(exact)
    if fine.any():
        assert (
            found.scalars["code_ce_delta_bits"] == found.arrays["code_ce_ce"][whole][fine.argmax()]
        )
        assert found.scalars["code_bits_ce"] == found.arrays["code_ce_bits"][whole][fine.argmax()]
    else:
        assert found.scalars["code_bits_ce"] is None is found.scalars["code_ce_delta_bits"]
        assert "finer" in found.why_null["code_bits_ce"]
    assert fine.any() == (len(steps) > 1)


def test_what_cannot_be_measured_is_null_with_a_reason():
    names = {i.name for i in compression.INFO}
    x = coins(400, 4, 0.5)
    for bad in (np.zeros_like(x), np.full_like(x, np.nan), np.ones_like(x), x[:20]):
        found = measure(bad)
        assert set(found.scalars) == names == set(found.why_null) and set(
            found.scalars.values()
        ) == {None}
    assert (
        measure(x).why_null.keys()
        == {k for k, v in measure(x).scalars.items() if v is None}
        == {"code_bits_alphabet", "code_bits_pca", "code_bits_dense"} | WITH_A_MODEL
    )


@pytest.mark.parametrize("name", ["topk", "standard"])
def test_outlier_rows_do_not_make_a_coarse_quantiser_good_enough(name):
    sae, x = trained(name), rows(4000, 3)
    far = x.clone()
    far[60::1000] *= 1e3  # among the rows that are sent
    plain, beside = (
        compression.measure(EvalContext(sae=sae, device=CPU, x=each), **OPTIONS).scalars
        for each in (x, far)
    )
    assert beside["code_step"] == plain["code_step"]
    assert beside["code_fvu"] == pytest.approx(plain["code_fvu"], rel=0.02)
    assert beside["code_bits"] == pytest.approx(plain["code_bits"], rel=0.02)
