"""Runs of a made-up study in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_experiments.files import read_json
from sae_experiments.metric_info import MetricInfo
from sae_experiments.runner.run import RunSettings, run
from sae_experiments.runner.track import NoTracker
from sae_experiments.studies.base import Cell, Context, Outcome

INFO = [MetricInfo(name="loss", title="loss", formula="f", unit="nat", better="down")]


class Fake:
    """Four cells; ``act(cell, ctx)`` may raise, and gives the outcome of a cell where it is not
    None.
    """

    def __init__(
        self,
        datasets: tuple[str, ...] = ("a", "b"),
        seeds: tuple[int, ...] = (0, 1),
        act: Callable[[Cell, Context], Any] = lambda cell, ctx: None,
    ) -> None:
        self.datasets, self.seeds, self.act, self.ran, self.saes = datasets, seeds, act, [], ("",)

    def check(self) -> None:
        pass

    def prepare(self, ctx: Context) -> dict[str, Any]:
        return {name: {"corpus": name, "stand_in": False} for name in self.datasets}

    def cells(self) -> list[Cell]:
        return [
            Cell(d, s, tuple(f"{d}{sae_spec}" for sae_spec in self.saes))
            for d in self.datasets
            for s in self.seeds
        ]

    def run(self, cell: Cell, ctx: Context) -> dict[str, Outcome]:
        self.ran.append((cell.dataset, cell.seed))
        found = self.act(cell, ctx)
        if found is not None:
            return found
        return {report: outcome(cell.seed) for report in cell.reports}

    def infos(self) -> list[MetricInfo]:
        return INFO


def outcome(seed: int, **changes: Any) -> Outcome:
    plain = {
        "metrics": {"loss": 1.0 + seed, "nothing": None},
        "why_null": {"nothing": "there is nothing"},
        "seconds": {"fit": 0.5},
        "arrays": {"x": np.arange(3)},
        "curves": [(0, "lm/loss", 2.0), (1, "lm/loss", 1.0)],
    }
    return Outcome(**(plain | changes))


def settings(folder: Path, **changes: Any) -> RunSettings:
    config = {
        "sae": {"k": 32, "name": "topk"},
        "seeds": None,
        "out_dir": folder.name,
        "verbosity": "normal",
    } | changes.pop("config", {})
    plain = {
        "cache": folder.parent / "cache",
        "label": "fake",
        "device": "cpu",
        "verbosity": "normal",
        "time_limit_s": None,
        "overwrite": False,
    }
    about = {
        "argv": ["--out_dir=r"],
        "overrides": ["out_dir=r"],
        "preset": "smoke",
        "preset_reason": "asked for",
    }
    return RunSettings(folder=folder, config=config, **(plain | {"about": about} | changes))


def go(study: Fake, folder: Path, tracker: Any = None, **changes: Any) -> str:
    return run(study, settings(folder, **changes), tracker or NoTracker())


def manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / "manifest.json")


def final(folder: Path) -> dict[str, Any]:
    return json.loads(
        (folder / "final_info.json").read_text(),
        parse_constant=lambda c: pytest.fail(f"{c} is not JSON"),
    )
