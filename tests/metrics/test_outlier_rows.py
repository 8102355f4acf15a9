"""Outlier rows that a fit left out are left alone by every metric that changes the model's run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sae_experiments.metrics import ablation, downstream, sparsity
from sae_experiments.metrics.base import EvalContext
from sae_experiments.metrics.codes import raw_rows, sparse_codes
from sae_experiments.metrics.levels import effect
from sae_experiments.metrics.rate_distortion import rise, windows_of
from sae_experiments.metrics.robustness import measure as robustness
from sae_experiments.metrics.robustness.text import denoising
from sae_experiments.models.hooks import Site
from sae_experiments.models.store import Store
from sae_experiments.saes.outliers import Region
from sae_experiments.saes.purified.perturb import NoiseModel
from support.common import CONF
from support.metric_worlds import CPU, on_validation_text, validation_store
from support.saes import sae_spec

SITE = Site("resid", 0)


@pytest.fixture(scope="module")
def held_out(trained: Any, corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    cache: Path = tmp_path_factory.mktemp("outlier_rows")
    return validation_store(trained, corpus, [SITE], cache)


def _downstream(ctx: EvalContext) -> list[float | None]:
    values = downstream.measure(ctx, windows=40, batch=8).scalars
    return [values["ce_delta_bits"], values["kl"]]


def _levels(ctx: EvalContext) -> list[float | None]:
    return list(effect.measure(ctx, windows=40, batch=8, mean_rows=256).scalars.values())


def _ablation(ctx: EvalContext) -> list[float | None]:
    options = {"windows": 40, "batch": 8, "latents": 8, "per_latent": 4, "min_fires": 1}
    found = ablation.measure(ctx, **options, rows=640, groups=2, mean=True, seed=0)
    return [v for name, v in found.scalars.items() if "group" in name or "level" in name]


def _denoising(ctx: EvalContext) -> list[float | None]:
    rows = ctx.inputs(slice(None))
    return list(denoising(ctx, NoiseModel(rows.shape[1]).learn(rows), 0.5, 40, 0))


def _compression(ctx: EvalContext) -> list[float | None]:
    codes = sparse_codes(ctx, None)
    windows = windows_of(ctx, np.ones(ctx.n_rows, bool), 40, 8)
    assert codes is not None
    assert windows is not None
    return [rise(ctx, windows, codes, lambda z: torch.zeros(z.shape[0], ctx.sae.d_in), None, 8)]


@pytest.mark.parametrize("effects_of", [_downstream, _levels, _ablation, _denoising, _compression])
def test_what_lies_outside_the_ordinary_rows_is_not_replaced(
    effects_of: Any, trained: Any, corpus: Any, held_out: Store
) -> None:
    x = held_out.rows(SITE, slice(None))
    region = Region.of(x)
    median = (x - region.centre).norm(dim=1).median()[None]
    spec = sae_spec("hierarchical", "sae.target_l0=null")
    width = x.shape[1]
    torch.manual_seed(0)
    sae = spec.model(d_in=width, d_sae=48, d_out=width).eval()

    def effects(limits: torch.Tensor, outliers: str = "leave_out") -> np.ndarray:
        ctx = on_validation_text(
            sae,
            trained,
            corpus,
            held_out,
            SITE,
            outliers=outliers,
            extras={"region": region._replace(limits=limits)},
        )
        values = [v for v in effects_of(ctx) if v is not None]
        assert values, "no effect was measured"
        return np.array(values)

    none = torch.zeros(1)
    every = effects(none, "keep")
    assert np.abs(effects(none)).max() < 1e-6, "nothing is replaced, so nothing changes"
    assert np.abs(every).max() > 1e-3
    half = effects(median)
    assert np.abs(half).max() > 1e-4
    assert (half != every).any()


def test_outlier_rows_are_no_contexts_of_latents(
    trained: Any, corpus: Any, held_out: Store
) -> None:
    x = held_out.rows(SITE, slice(None))
    region = Region.of(x)
    median = (x - region.centre).norm(dim=1).median()[None]
    sae = sae_spec("topk", "sae.target_l0=4").model(d_in=x.shape[1], d_sae=48, d_out=x.shape[1])

    def active(limits: torch.Tensor) -> np.ndarray:
        extras = {"region": region._replace(limits=limits)}
        ctx = on_validation_text(sae.eval(), trained, corpus, held_out, SITE, extras=extras)
        codes = sparse_codes(ctx, None)
        assert codes is not None
        return np.diff(codes.indptr)

    far = ((x - region.centre).norm(dim=1) > median).numpy()
    some, every = active(median), active(median * 1e6)
    assert (some[far] == 0).all()
    assert (every > 0).all()
    assert (some[~far] == every[~far]).all()


N_ROWS, WIDTH, OUTLIER = 4000, 16, slice(100, 4000, 500)


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, and the same with 0.2 % of them a thousand times as long."""
    torch.manual_seed(0)
    x = torch.randn(N_ROWS, WIDTH)
    with_outliers = x.clone()
    with_outliers[OUTLIER] *= 1000
    return x, with_outliers


def _sparsity(ctx: EvalContext) -> dict[str, float | None]:
    return sparsity.measure(ctx, rows=None, entropy_latents=64).scalars


def _robustness(ctx: EvalContext) -> dict[str, float | None]:
    options: Any = OmegaConf.to_container(OmegaConf.load(CONF / "metric" / "robustness.yaml"))
    del options["_target_"], options["_partial_"]
    values = robustness.measure(ctx, **options).scalars
    # Medians and sums over many rows; areas and folds follow from them.
    kinds = ("gaussian", "uniform", "mask", "covariance", "swap")
    return {name: values[name] for name in ("rob_change", *(f"rob_change_{k}" for k in kinds))}


@pytest.mark.parametrize("values_of", [_sparsity, _robustness])
def test_a_few_outlier_rows_hardly_move_what_is_measured_on_the_others(
    values_of: Any, rows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    torch.manual_seed(0)
    sae = sae_spec("jumprelu", "sae.target_l0=4").model(d_in=WIDTH, d_sae=48, d_out=WIDTH).eval()
    with torch.no_grad():
        sae.threshold.fill_(0.8)

    def values(x: torch.Tensor, outliers: str) -> np.ndarray:
        ctx = EvalContext(sae=sae, device=CPU, x=x, outliers=outliers)
        return np.array([v for v in values_of(ctx).values() if v is not None])

    x, with_outliers = rows
    without = values(x, "leave_out")
    assert len(without) > 4
    assert values(with_outliers, "leave_out") == pytest.approx(without, rel=0.02, abs=1e-3)
    assert values(with_outliers, "keep") != pytest.approx(without, rel=0.02, abs=1e-3)


def test_the_median_row_stands_for_outliers_where_rows_are_compared(
    rows: tuple[torch.Tensor, torch.Tensor],
) -> None:
    x, with_outliers = rows
    sae = sae_spec("topk", "sae.target_l0=4").model(d_in=WIDTH, d_sae=48, d_out=WIDTH)
    raw = torch.from_numpy(raw_rows(EvalContext(sae=sae, device=CPU, x=with_outliers), None))
    assert (raw[OUTLIER] == Region.of(with_outliers).centre).all()
    others = torch.ones(N_ROWS, dtype=torch.bool)
    others[OUTLIER] = False
    assert (raw[others] == x[others]).all()
