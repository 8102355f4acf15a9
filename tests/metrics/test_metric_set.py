"""What all metrics share: every option stands in YAML, every number is described, and the whole
set survives a tiny run.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from support.common import CONF

NAMES = sorted(p.stem for p in (CONF / "metric").glob("*.yaml"))


def module_and_options(name: str) -> tuple[Any, dict[str, Any]]:
    options = OmegaConf.to_container(OmegaConf.load(CONF / "metric" / f"{name}.yaml"))
    module, _, function = options.pop("_target_").rpartition(".")
    assert function == "measure" and options.pop("_partial_") is True
    return importlib.import_module(module), options


def declared_options(module: Any) -> dict[str, bool]:
    """Options by name, and whether each has a default: fields of `Options`, or arguments."""
    if hasattr(module, "Options"):
        fields = dataclasses.fields(module.Options)
        missing = dataclasses.MISSING
        return {
            f.name: f.default is not missing or f.default_factory is not missing for f in fields
        }
    parameters = inspect.signature(module.measure).parameters.values()
    return {p.name: p.default is not p.empty for p in parameters if p.name != "ctx"}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_metric_has_its_number_in_yaml(name):
    module, options = module_and_options(name)
    declared = declared_options(module)
    assert set(declared) == set(options)
    assert not any(declared.values()), "no option has a default outside of YAML"


def test_no_two_metrics_report_the_same_name():
    names = [i.name for name in NAMES for i in module_and_options(name)[0].INFO]
    assert len(set(names)) == len(names)


def test_all_metrics_survive_a_run_too_small_for_most_of_them(experiment):
    run = experiment("metric=all", "sae=[batch_topk,matryoshka]", "--out_dir=all", "seeds=[0]")
    assert run.returncode == 0, run.stderr
    manifest = experiment.json("all", "manifest.json")
    for sae in ("batch_topk", "matryoshka"):
        cell = experiment.json("all", "cells", f"text8.{sae}_0.json")
        assert set(cell["metrics"]) <= set(manifest["metrics"])
        nulls = {name for name, value in cell["metrics"].items() if value is None}
        assert (
            nulls == set(cell["why_null"])
            and "no value and no reason given" not in cell["why_null"].values()
        )
        assert {f"metric.{name}" for name in NAMES} <= set(cell["seconds"]), (
            "what each metric cost is recorded"
        )
        with np.load(
            experiment.runs / "all" / "arrays" / f"text8.{sae}_0.npz", allow_pickle=False
        ) as arrays:
            assert not any(a.dtype.hasobject for a in arrays.values())
