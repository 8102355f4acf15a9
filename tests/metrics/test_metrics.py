"""Metrics with known answers: identity, zero, mean and scaled reconstructions, codes made by
hand, closed forms and brute force.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_experiments.metrics import downstream, reconstruction, sparsity
from sae_experiments.metrics.base import EvalContext, LMSplice, Measured, Rows
from sae_experiments.metrics.sparsity import DENSITY_EDGES, latent_entropy
from sae_experiments.models.hooks import Site, activations
from sae_experiments.models.store import Store
from sae_experiments.results.records import NOT_GIVEN, Record
from sae_experiments.saes.base import SAE
from sae_experiments.saes.outliers import Region
from support.metric_worlds import validation_store, validation_tokens

CPU = torch.device("cpu")


class Stub(SAE):
    """An SAE whose code is ``code(x)`` and whose reconstruction is ``rebuild(code)``."""

    def __init__(
        self,
        code: Callable[[Tensor], Tensor] = lambda x: x,
        rebuild: Callable[[Tensor], Tensor] = lambda z: z,
        d_sae: int = 4,
    ) -> None:
        super().__init__(d_in=4, d_sae=d_sae)
        self.code, self.rebuild = code, rebuild

    def encode(self, x: Tensor) -> Tensor:
        return self.code(x)

    def decode(self, acts: Tensor) -> Tensor:
        return self.rebuild(acts)

    def as_rows(self, x: Tensor, width: str) -> Tensor:
        return x  # of any width


class Chunked(EvalContext):
    """A ctx that gives ``size`` rows at a time."""

    size = 3

    def chunks(self, limit: int | None = None, size: int = 4096) -> Iterator[Rows]:
        return super().chunks(limit, self.size)


def gaussian(n: int = 200, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def rebuilt(
    x: Tensor, recon: Tensor, kind: type[EvalContext] = EvalContext, rows: int | None = None
) -> Measured:
    """Reconstruction metrics where row i of ``x`` is rebuilt as row i of ``recon``."""
    at = 0

    def rebuild(z: Tensor) -> Tensor:
        nonlocal at
        at += len(z)
        return recon[at - len(z) : at]

    return reconstruction.measure(kind(sae=Stub(rebuild=rebuild), device=CPU, x=x), rows=rows)


def reasons(measured: Measured) -> dict[str, str]:
    """Metrics that end as null in the record of a cell, with their reasons."""
    return Record(
        dataset="d", seed=0, metrics=measured.scalars, why_null=measured.why_null
    ).why_null


# ------------------------------------------------------------------------------------------------
# reconstruction


def test_a_perfect_copy_has_fvu_0_mse_0_cosine_1_and_ratio_1():
    x = gaussian() + 3
    found = rebuilt(x, x)
    expected = {
        "sae_fvu": 0.0,
        "sae_fvu_ordinary": 0.0,
        "sae_outlier_frac": 0.0,
        "sae_mse": 0.0,
        "sae_cosine": 1.0,
        "sae_l2_ratio": 1.0,
    }
    assert found.scalars == pytest.approx(expected, abs=1e-7)
    assert not found.why_null


def test_the_mean_as_prediction_has_fvu_1_whatever_the_mean():
    for shift in (0.0, 5.0, -1000.0):
        x = gaussian() + shift
        assert rebuilt(x, x.double().mean(0).expand_as(x)).scalars["sae_fvu"] == pytest.approx(
            1.0, rel=1e-6
        )


def test_zero_as_prediction_of_centred_rows_has_fvu_1_and_finite_cosine_and_ratio():
    x = gaussian()
    x = x - x.mean(0)
    expected = {
        "sae_fvu": 1.0,
        "sae_fvu_ordinary": 1.0,
        "sae_outlier_frac": 0.0,
        "sae_mse": float(x.square().mean()),
        "sae_cosine": 0.0,
        "sae_l2_ratio": 0.0,
    }
    assert rebuilt(x, torch.zeros_like(x)).scalars == pytest.approx(expected)


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0])
def test_a_scaled_copy_has_closed_forms(factor):
    x = gaussian()
    found = rebuilt(x, factor * x).scalars
    centred = x.double() - x.double().mean(0)
    expected = (1 - factor) ** 2 * float(x.double().square().sum() / centred.square().sum())
    assert found["sae_fvu"] == pytest.approx(expected, rel=1e-6)
    assert found["sae_cosine"] == pytest.approx(math.copysign(1, factor), rel=1e-6)
    assert found["sae_l2_ratio"] == pytest.approx(abs(factor), rel=1e-6)
    assert found["sae_mse"] == pytest.approx(
        (1 - factor) ** 2 * float(x.double().square().mean()), rel=1e-6
    )


def test_cosine_and_ratio_are_means_over_rows_computed_by_hand():
    x = torch.tensor([[3.0, 4, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0]])
    recon = torch.tensor([[4.0, 3, 0, 0], [0, 0, 1, 0], [2, 0, 0, 0]])
    found = rebuilt(x, recon).scalars
    assert found["sae_cosine"] == pytest.approx((24 / 25 + 0 + 1) / 3)
    assert found["sae_l2_ratio"] == pytest.approx((1 + 0.5 + 2) / 3)
    assert found["sae_mse"] == pytest.approx((2 + 5 + 1) / 12)


@pytest.mark.parametrize("size", [1, 7, 199])
def test_reconstruction_does_not_depend_on_the_size_of_chunks(size):
    x = gaussian() + 10
    recon = x + 0.3 * gaussian(seed=1)
    kind = type("Sized", (Chunked,), {"size": size})
    assert rebuilt(x, recon, kind).scalars == pytest.approx(rebuilt(x, recon).scalars, rel=1e-9)


def test_ordinary_rows_are_those_near_the_median():
    x = gaussian(500)
    x[::50, 1] += 1000.0
    recon = x + 0.3 * gaussian(500, seed=1)
    near = torch.arange(500) % 50 != 0
    found = rebuilt(x, recon).scalars
    assert found["sae_outlier_frac"] == pytest.approx(0.02)
    assert found["sae_fvu_ordinary"] == pytest.approx(
        rebuilt(x[near], recon[near]).scalars["sae_fvu"], rel=1e-9
    )
    assert found["sae_fvu"] < 0.01 * found["sae_fvu_ordinary"]


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_a_mean_much_larger_than_the_spread_costs_no_accuracy(offset):
    x = gaussian(5000) + offset
    recon = x + 0.1 * gaussian(5000, seed=1)
    exact = float(
        (recon.double() - x.double()).square().sum()
        / (x.double() - x.double().mean(0)).square().sum()
    )
    assert rebuilt(x, recon, Chunked).scalars["sae_fvu"] == pytest.approx(exact, rel=1e-9)


def test_fvu_does_not_depend_on_the_unit_of_the_activations():
    x = gaussian()
    recon = x + 0.3 * gaussian(seed=1)
    for unit in (1e-4, 1e4):
        assert rebuilt(x * unit, recon * unit).scalars["sae_fvu"] == pytest.approx(
            rebuilt(x, recon).scalars["sae_fvu"], rel=1e-4
        )


def test_rows_that_do_not_vary_have_a_null_fvu_with_a_reason():
    x = torch.full((50, 4), 7.3)
    found = rebuilt(x, x + 1)
    assert found.scalars["sae_fvu"] is None and "do not vary" in found.why_null["sae_fvu"]
    assert found.scalars["sae_mse"] == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["activations", "reconstruction"])
def test_numbers_that_are_not_finite_become_null_with_a_reason(bad, where):
    x, recon = gaussian(), gaussian(seed=1)
    (x if where == "activations" else recon)[3, 1] = bad
    found = reasons(rebuilt(x, recon))
    assert {"sae_fvu", "sae_mse", "sae_cosine"} <= set(found) and NOT_GIVEN not in found.values()


def test_only_the_first_rows_are_looked_at_where_a_limit_is_given():
    x, recon = gaussian(), gaussian(seed=1)
    assert rebuilt(x, recon, rows=50).scalars == rebuilt(x[:50], recon[:50]).scalars
    assert rebuilt(x, recon, rows=10_000).scalars == rebuilt(x, recon).scalars


def test_a_transcoder_is_measured_against_its_target_and_not_its_input():
    x, y = gaussian(), gaussian(seed=1)
    ctx = EvalContext(sae=Stub(rebuild=lambda z: y[: len(z)]), device=CPU, x=x, y=y)
    assert reconstruction.measure(ctx, rows=None).scalars["sae_fvu"] == 0


# ------------------------------------------------------------------------------------------------
# sparsity


def measured(
    codes: Tensor, kind: type[EvalContext] = EvalContext, entropy_latents: int = 256
) -> Measured:
    return sparsity.measure(
        kind(sae=Stub(d_sae=codes.shape[1]), device=CPU, x=codes),
        rows=None,
        entropy_latents=entropy_latents,
    )


def by_hand() -> Tensor:
    """20 rows of 6 latents: always, once, twice (a tenth), never, three times, and twice with a
    negative value.
    """
    codes = torch.zeros(20, 6)
    codes[:, 0] = 1.0
    codes[4, 1] = 2.0
    codes[[2, 9], 2] = 0.5
    codes[[1, 2, 3], 4] = torch.tensor([1.0, 2.0, 3.0])
    codes[[0, 5], 5] = torch.tensor([-1.0, 1.0])
    return codes


def test_l0_sparsity_dead_and_dense_of_codes_made_by_hand():
    found = measured(by_hand())
    assert found.scalars["sae_l0"] == pytest.approx((20 + 1 + 2 + 0 + 3 + 2) / 20)
    assert found.scalars["sae_sparsity"] == pytest.approx(1 - 1.4 / 6)
    assert found.scalars["sae_dead_frac"] == pytest.approx(1 / 6)
    assert found.scalars["sae_dense_frac"] == pytest.approx(2 / 6), (
        "dense means on more than a tenth of the rows"
    )
    np.testing.assert_allclose(found.arrays["density"], np.array([20, 1, 2, 0, 3, 2]) / 20)


def test_the_histogram_counts_every_living_latent_at_its_density():
    found = measured(by_hand())
    counts, edges = found.arrays["density_hist"], found.arrays["density_edges"]
    assert len(edges) == len(counts) + 1 and counts.sum() == 5
    for density, n in (
        (1.0, 1),
        (0.05, 1),
        (0.12, 3),
    ):  # bins are a quarter of a decade wide: 0.1 and 0.15 share one
        at = min(
            int(np.searchsorted(edges, math.log10(density), side="right")) - 1, len(counts) - 1
        )
        assert counts[at] == n
    assert np.array_equal(edges, DENSITY_EDGES) and edges[0] == -7 and edges[-1] == 0


def test_a_dead_dictionary_is_measured_and_its_entropy_is_null_with_a_reason():
    found = measured(torch.zeros(10, 4))
    assert found.scalars == {
        "sae_l0": 0.0,
        "sae_sparsity": 1.0,
        "sae_dead_frac": 1.0,
        "sae_dense_frac": 0.0,
        "sae_latent_entropy": None,
    }
    assert reasons(found) == {"sae_latent_entropy": "no latent fires"}
    assert found.arrays["density_hist"].sum() == 0


def test_a_code_in_which_everything_fires_is_measured():
    found = measured(torch.ones(10, 4)).scalars
    assert found == {
        "sae_l0": 4.0,
        "sae_sparsity": 0.0,
        "sae_dead_frac": 0.0,
        "sae_dense_frac": 1.0,
        "sae_latent_entropy": 0.0,
    }


@pytest.mark.parametrize("size", [1, 6, 19])
def test_sparsity_does_not_depend_on_the_size_of_chunks(size):
    codes = gaussian(200).relu()
    kind = type("Sized", (Chunked,), {"size": size})
    whole, chunked = measured(codes), measured(codes, kind)
    assert chunked.scalars == pytest.approx(whole.scalars, rel=1e-12)
    assert all(np.array_equal(chunked.arrays[k], whole.arrays[k]) for k in whole.arrays)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_codes_that_are_not_finite_do_not_stop_the_measurement(bad):
    codes = gaussian(100).relu()
    codes[7, 2] = codes[8, 2] = bad
    codes[:, 3] = bad
    found = measured(codes)
    assert all(v is not None and math.isfinite(v) for v in found.scalars.values())
    assert all(np.isfinite(a).all() for a in found.arrays.values())


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e3, 1e6])
def test_entropy_does_not_depend_on_the_unit_of_the_codes(unit):
    codes = gaussian(500, seed=2).relu()
    assert measured(codes * unit).scalars["sae_latent_entropy"] == pytest.approx(
        measured(codes).scalars["sae_latent_entropy"], rel=1e-2
    )


def test_entropy_is_taken_over_at_most_so_many_latents_and_all_of_them_where_they_fit():
    codes = torch.zeros(64, 10)
    codes[:, 0], codes[:32, 5] = 1.0, 1.0  # 0 bits and 1 bit
    assert measured(codes, entropy_latents=10).scalars["sae_latent_entropy"] == pytest.approx(0.5)
    assert measured(codes, entropy_latents=2).scalars["sae_latent_entropy"] == pytest.approx(
        0.5
    )  # latents 0 and 5
    assert measured(codes, entropy_latents=1).scalars["sae_latent_entropy"] == pytest.approx(
        0.0
    )  # latent 0


def h2(f: float) -> float:
    return -f * math.log2(f) - (1 - f) * math.log2(1 - f)


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        (np.zeros(100), 0.0),
        (np.full(100, 3.7), 0.0),
        (np.full(100, -1e-3), 0.0),
        (np.full(100, np.nan), 0.0),
        (np.full(100, np.inf), 0.0),
        (np.zeros(0), 0.0),
        (np.eye(1, 128)[0], h2(1 / 128)),
        (np.r_[np.zeros(50), np.full(50, 2.0)], 1.0),
        (np.r_[np.full(10, np.nan), np.zeros(50), np.full(50, 2.0), np.full(7, np.inf)], 1.0),
        (np.r_[np.full(20, 1.0), np.full(20, 2.0)], 1.0 + 1 / (2 * 40 * math.log(2))),
        (np.linspace(1, 2, 64_000), 6.0),
        (np.r_[np.zeros(64_000), np.linspace(1, 2, 64_000)], 1.0 + 0.5 * 6.0),
        (
            np.r_[np.zeros(60), np.repeat([1.0, 2, 3, 4], 10)],
            h2(0.4) + 0.4 * (2 + 3 / (2 * 40 * math.log(2))),
        ),
    ],
    ids=[
        "zero",
        "constant",
        "small constant",
        "NaN",
        "inf",
        "empty",
        "one-hot",
        "on or off",
        "among NaN and inf",
        "two values",
        "uniform",
        "half uniform",
        "four values",
    ],
)
def test_the_entropy_of_a_latent_is_right(values, bits):
    assert latent_entropy(values.astype(np.float32)) == pytest.approx(bits, abs=2e-3)
    assert latent_entropy(values.astype(np.float64)) == pytest.approx(bits, abs=2e-3)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e30, 1e38])
@pytest.mark.parametrize("seed", range(3))
def test_the_entropy_of_any_latent_is_finite_and_within_its_bounds(seed, scale):
    chance = np.random.default_rng(seed)
    values = (
        (chance.standard_normal(300) * chance.integers(0, 2, 300) * scale)
        .clip(-3e38, 3e38)
        .astype(np.float32)
    )
    values[chance.integers(0, 300, 5)] = np.nan
    assert 0 <= latent_entropy(values) <= 7


def test_values_apart_by_rounding_only_count_as_constant():
    values = np.float32(1000.0) * (
        1 + np.finfo(np.float32).eps * np.array([0, 1] * 50, dtype=np.float32)
    )
    assert 0 <= latent_entropy(values) <= 1.1


# ------------------------------------------------------------------------------------------------
# downstream

SITE = Site("resid", 1)


@pytest.fixture(scope="module")
def held_out(trained: Any, corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    sites = [SITE, Site("mlp_in", 2), Site("mlp_out", 2)]
    return validation_store(trained, corpus, sites, tmp_path_factory.mktemp("stores"))


@pytest.fixture
def splice(trained: Any, corpus: Any, held_out: Store) -> Callable[..., Measured]:
    """Downstream metrics of a stub."""

    def measure(
        sae: SAE,
        *,
        read: Site = SITE,
        write: Site = SITE,
        windows: int = 40,
        batch: int = 8,
        region: Region | None = None,
        outliers: str = "leave_out",
    ) -> Measured:
        tokens = validation_tokens(corpus)
        ctx = EvalContext(
            sae=sae,
            device=CPU,
            read=read,
            write=write,
            held_out=held_out,
            lm=LMSplice(trained.model, write, tokens),
            outliers=outliers,
            extras={} if region is None else {"region": region},
        )
        return downstream.measure(ctx, windows=windows, batch=batch)

    return measure


def test_a_perfect_copy_costs_nothing_and_recovers_everything(splice):
    found = splice(Stub()).scalars
    assert found["ce_spliced"] == pytest.approx(found["ce_clean"], rel=1e-7)
    assert found["ce_delta_bits"] == pytest.approx(0, abs=1e-6) and found["kl"] == pytest.approx(
        0, abs=1e-6
    )
    assert found["loss_recovered"] == pytest.approx(1) and found[
        "loss_recovered_zero"
    ] == pytest.approx(1)


def test_zero_is_zero_ablation(splice):
    found = splice(Stub(rebuild=torch.zeros_like)).scalars
    assert found["loss_recovered_zero"] == pytest.approx(0, abs=1e-9)
    assert found["ce_delta_bits"] > 0.1 and found["kl"] > 0.05


def test_the_mean_activation_is_mean_ablation(splice, held_out):
    mean = held_out.rows(SITE, slice(None)).mean(0)
    found = splice(Stub(rebuild=lambda z: mean.expand_as(z))).scalars
    assert found["loss_recovered"] == pytest.approx(0, abs=1e-6)


def test_outliers_stay_as_they_are_where_the_fit_left_them_out(splice, held_out):
    zeros = Stub(rebuild=torch.zeros_like)
    x = held_out.rows(SITE, slice(None))
    region = Region.of(x)
    nothing = region._replace(limits=torch.zeros(1))
    assert splice(zeros, region=nothing).scalars["ce_delta_bits"] == pytest.approx(0, abs=1e-6)
    every = splice(zeros)
    assert every.warnings == [], "activations of this model have no outliers"
    half = region._replace(limits=(x - region.centre).norm(dim=1).median()[None])
    some = splice(zeros, region=half)
    assert 0.01 < some.scalars["ce_delta_bits"] < every.scalars["ce_delta_bits"]
    (told,) = some.warnings
    assert told.key == "ce_spliced" and 0.4 < told.value < 0.6 and "stay as they are" in told.says
    kept = splice(zeros, region=half, outliers="keep")
    assert kept.scalars == every.scalars and kept.warnings == []


def test_halfway_lies_between(splice):
    found = splice(
        Stub(
            rebuild=lambda z: (
                z + 0.5 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
            )
        )
    ).scalars
    assert 0.02 < found["loss_recovered"] < 0.98 and found["kl"] > 0
    assert found["ce_delta_bits"] == pytest.approx(
        (found["ce_spliced"] - found["ce_clean"]) / math.log(2)
    )


def test_downstream_losses_equal_those_computed_by_hand(splice, trained, corpus, held_out):
    """Window by window and block by block, without hooks; the first position has no context and
    is left out.
    """
    body, head = trained.model.transformer, trained.model.lm_head

    def rebuild(z: torch.Tensor) -> torch.Tensor:
        return 0.7 * z + 0.1

    sums, n = {"clean": 0.0, "spliced": 0.0, "zero": 0.0, "kl": 0.0}, 0
    with torch.no_grad():
        for start in held_out.starts[:9]:
            x, y = (corpus.windows("val", np.array([start + shift]), 16) for shift in (0, 1))
            h = body.h[0](body.wte(x) + body.wpe(torch.arange(16)))
            log_probs = {}
            for name, value in (
                ("clean", h),
                ("spliced", rebuild(h)),
                ("zero", torch.zeros_like(h)),
            ):
                log_probs[name] = (
                    head(body.ln_f(body.h[2](body.h[1](value))))[0, 1:].double().log_softmax(-1)
                )
                sums[name] -= float(log_probs[name][torch.arange(15), y[0, 1:]].sum())
            sums["kl"] += float(
                (log_probs["clean"].exp() * (log_probs["clean"] - log_probs["spliced"])).sum()
            )
            n += 15
    by_hand = {k: v / n for k, v in sums.items()}
    found = splice(Stub(rebuild=rebuild), windows=9, batch=4).scalars
    assert found["ce_clean"] == pytest.approx(by_hand["clean"], rel=1e-5)
    assert found["ce_spliced"] == pytest.approx(by_hand["spliced"], rel=1e-5)
    assert found["kl"] == pytest.approx(by_hand["kl"], rel=1e-4)
    recovered = (by_hand["zero"] - by_hand["spliced"]) / (by_hand["zero"] - by_hand["clean"])
    assert found["loss_recovered_zero"] == pytest.approx(recovered, rel=1e-4)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_downstream_does_not_depend_on_the_batch_size(splice, batch):
    sae = Stub(rebuild=lambda z: 0.8 * z)
    assert splice(sae, batch=batch).scalars == pytest.approx(
        splice(sae, batch=40).scalars, rel=1e-4
    )


def test_a_transcoder_that_computes_the_mlp_costs_nothing(splice, trained):
    mlp = copy.deepcopy(trained.model.transformer.h[1].mlp)  # without the hooks of the measurement
    found = splice(
        Stub(rebuild=lambda z: mlp(z)), read=Site("mlp_in", 2), write=Site("mlp_out", 2)
    ).scalars
    assert found["ce_spliced"] == pytest.approx(found["ce_clean"], rel=1e-6) and found[
        "kl"
    ] == pytest.approx(0, abs=1e-6)


def test_an_ablation_that_costs_nothing_gives_null_with_a_reason(splice, trained):
    with torch.no_grad():
        kept = trained.model.lm_head.weight.clone()
        trained.model.lm_head.weight.zero_()  # nothing matters to this model
        try:
            found = splice(Stub(rebuild=torch.zeros_like))
        finally:
            trained.model.lm_head.weight.copy_(kept)
    assert found.scalars["loss_recovered"] is None and found.scalars["loss_recovered_zero"] is None
    assert (
        "ablation costs only" in reasons(found)["loss_recovered"]
        and "zero" in reasons(found)["loss_recovered_zero"]
    )
    assert found.scalars["ce_clean"] == pytest.approx(math.log(trained.model.config.vocab_size))


def test_a_reconstruction_that_is_not_finite_gives_nulls_with_reasons(splice):
    found = reasons(splice(Stub(rebuild=lambda z: z * math.nan)))
    assert {"ce_spliced", "ce_delta_bits", "kl"} <= set(found) and NOT_GIVEN not in found.values()


def test_without_a_language_model_everything_is_null_with_a_reason():
    found = downstream.measure(
        EvalContext(sae=Stub(), device=CPU, x=gaussian()), windows=4, batch=2
    )
    assert set(found.scalars) == {i.name for i in downstream.INFO} == set(found.why_null)
    assert set(found.scalars.values()) == {None}


def test_measuring_changes_neither_sae_nor_language_model(splice, trained, corpus):
    x, _ = corpus.batch_at("val", 0, rows=2, length=16, seed=0)
    before = activations(trained.model, x, [SITE])[SITE]
    sae = Stub(rebuild=lambda z: 0.5 * z)
    state = {k: v.clone() for k, v in sae.state_dict().items()}
    splice(sae)
    assert torch.equal(activations(trained.model, x, [SITE])[SITE], before)
    assert all(torch.equal(v, state[k]) for k, v in sae.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trained.model.modules())


# ------------------------------------------------------------------------------------------------
# what all share


@pytest.mark.parametrize(
    "module", [reconstruction, sparsity, downstream], ids=lambda m: m.__name__.rpartition(".")[2]
)
def test_every_metric_is_described_and_every_description_is_measured(module, splice):
    if module is downstream:
        found = splice(Stub())
    else:
        options = {"rows": None} | ({"entropy_latents": 4} if module is sparsity else {})
        found = module.measure(EvalContext(sae=Stub(), device=CPU, x=gaussian()), **options)
    assert [i.name for i in module.INFO] == sorted(
        found.scalars, key=[i.name for i in module.INFO].index
    )
    assert all(i.title and i.formula for i in module.INFO)


def test_rows_beyond_the_last_and_an_absent_limit_are_all_rows():
    ctx = EvalContext(sae=Stub(), device=CPU, x=gaussian(10))
    assert (
        [len(r.x) for r in ctx.chunks(None, size=4)]
        == [4, 4, 2]
        == [len(r.x) for r in ctx.chunks(99, size=4)]
    )
    assert [len(r.x) for r in ctx.chunks(5, size=4)] == [4, 1]
    assert F.mse_loss(next(ctx.chunks()).recon, gaussian(10)) == 0


def test_the_noise_of_fvu_is_the_spread_over_resampled_windows_and_zero_where_windows_are_alike():
    """Brute force: FVU of resampled windows, computed from their rows."""
    from sae_experiments.metrics.noise import document_weights
    from sae_experiments.metrics.reconstruction import WINDOW

    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(6 * WINDOW, 4, generator=generator)
        * torch.arange(1, 7).repeat_interleave(WINDOW)[:, None]
        + 3
    )
    from sae_experiments import build_sae

    sae = build_sae("topk", 4, target_l0=1, d_sae=8).eval().requires_grad_(False)
    ctx = EvalContext(sae=sae, device=torch.device("cpu"), x=x)
    found = reconstruction.measure(ctx, rows=None).noise["sae_fvu"]
    windows, recon = x.view(6, WINDOW, 4).double(), sae(x).view(6, WINDOW, 4).double()
    values = []
    for weights in document_weights(6, 200, 0):
        pick = np.repeat(np.arange(6), weights.astype(int))
        y, yhat = windows[pick].reshape(-1, 4), recon[pick].reshape(-1, 4)
        values.append(float((y - yhat).square().sum() / (y - y.mean(0)).square().sum()))
    assert found == pytest.approx(float(np.std(values, ddof=1)), rel=1e-6)
    alike = EvalContext(sae=sae, device=torch.device("cpu"), x=x[:WINDOW].repeat(5, 1))
    assert reconstruction.measure(alike, rows=None).noise["sae_fvu"] == pytest.approx(0, abs=1e-9)
