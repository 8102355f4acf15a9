"""What all metrics share: every option stands in YAML, every number is described, and the whole set survives a tiny run."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import numpy as np
import pytest
from conftest import CONF
from omegaconf import OmegaConf

NAMES = sorted(p.stem for p in (CONF / "metric").glob("*.yaml"))


def module_and_options(name: str) -> tuple[Any, dict[str, Any]]:
    options = OmegaConf.to_container(OmegaConf.load(CONF / "metric" / f"{name}.yaml"))
    module, _, function = options.pop("_target_").rpartition(".")
    assert function == "measure" and options.pop("_partial_") is True
    return importlib.import_module(module), options


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_metric_has_its_number_in_yaml(name):
    module, options = module_and_options(name)
    parameters = inspect.signature(functools.partial(module.measure)).parameters
    assert set(parameters) - {"bench"} == set(options)
    assert all(p.default is inspect.Parameter.empty for p in parameters.values())


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
