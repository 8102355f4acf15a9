"""Any number of rows is enough for a metric, or it says why it has no value."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sae_experiments.models.hooks import Site
from sae_experiments.models.store import Store
from sae_experiments.saes.base import SAE
from support.common import CONF
from support.metric_worlds import on_validation_text, validation_store
from support.saes import sae_spec

SITE = Site("resid", 0)


def options_of(name: str) -> dict[str, Any]:
    options: Any = OmegaConf.to_container(OmegaConf.load(CONF / "metric" / f"{name}.yaml"))
    return options


def row_options(name: str) -> list[str]:
    """Options that are a number of rows."""
    return [option for option in options_of(name) if option.endswith("rows")]


NAMES = sorted(p.stem for p in (CONF / "metric").glob("*.yaml") if row_options(p.stem))


@pytest.fixture(scope="module")
def held_out(trained: Any, corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    cache: Path = tmp_path_factory.mktemp("few_rows")
    return validation_store(trained, corpus, [SITE], cache)


@pytest.fixture(scope="module")
def sae(held_out: Store) -> SAE:
    width = held_out.rows(SITE, slice(0, 1)).shape[1]
    torch.manual_seed(0)
    spec = sae_spec("hierarchical", "sae.target_l0=null")
    return spec.model(d_in=width, d_sae=48, d_out=width).eval()


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("name", NAMES)
def test_a_metric_of_few_rows_has_a_value_or_a_reason(
    name: str, rows: int, trained: Any, corpus: Any, held_out: Store, sae: SAE
) -> None:
    ctx = on_validation_text(sae, trained, corpus, held_out, SITE, symbols=corpus.symbols)
    options = options_of(name) | dict.fromkeys(row_options(name), rows)
    module = importlib.import_module(options.pop("_target_").removesuffix(".measure"))
    del options["_partial_"]
    found = module.measure(ctx, **options)
    nulls = {metric for metric, value in found.scalars.items() if value is None}
    assert nulls <= set(found.why_null)
    values = {metric: value for metric, value in found.scalars.items() if value is not None}
    assert [metric for metric, value in values.items() if not np.isfinite(value)] == []
