"""What a study is: a list of cells, each a pure pipeline from configuration to numbers."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from sae_experiments.console import Console
from sae_experiments.errors import UserError
from sae_experiments.fitting.fit import FitReport
from sae_experiments.metric_info import MetricInfo
from sae_experiments.quality_warnings import Warned
from sae_experiments.saes.ops import fast_matmul
from sae_experiments.stopping import OutOfTime
from sae_experiments.studies import conditions as facts_module
from sae_experiments.training.loop import Session, seed_of

#: What SAEs are evaluated on: the validation text (or rows); what of it a search may look at; what its winner is reported on.
HELD_OUT = ("val", "search", "test")


def check_held_out(held_out: str) -> None:
    """Raise :class:`UserError` for a held-out part that does not exist."""
    if held_out not in HELD_OUT:
        raise UserError(f"held_out={held_out} is not one of {', '.join(HELD_OUT)}")


def part_of(held_out: str) -> dict[str, str]:
    """What provenance says of the held-out part, where it is not the usual one: results on other text are other results."""
    return {} if held_out == "val" else {"held_out": held_out}


def rows_seed(seed: int, held_out: str) -> int:
    """Seed of the held-out rows where rows are drawn afresh: the winner of a search is reported on others than the search has seen."""
    return seed_of(seed, "held out", *(["test"] if held_out == "test" else []))


class Cell(NamedTuple):
    """One unit of work: a corpus (or configuration family) and a seed. ``reports`` are the names its results appear under."""

    dataset: str
    seed: int
    reports: tuple[str, ...]


@dataclass
class Outcome:
    """What a cell measured for one report name."""

    metrics: dict[str, float | None] = field(default_factory=dict)
    why_null: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    curves: list[tuple[int, str, float]] = field(default_factory=list)
    noise: dict[str, float] = field(
        default_factory=dict
    )  # standard error of a metric that samples, over resampled text
    features: list[dict[str, Any]] | None = (
        None  # one JSON-able dict a latent, for the feature browser
    )
    graphs: list[dict[str, Any]] | None = (
        None  # attribution graphs: title, nodes, edges (see circuits.graph)
    )
    facts: dict[str, Any] = field(
        default_factory=dict
    )  # under which conditions it was measured (see conditions)
    warnings: list[Warned] = field(default_factory=list)
    cut: bool = False

    def add_fit(self, fit: FitReport) -> None:
        """Add the warnings about the fit of the SAE, and the numbers that it chose itself."""
        self.warnings = [*self.warnings, *fit.warned]
        self.facts["fit"] = fit.facts

    def measure(
        self,
        metrics: Mapping[str, Callable[[Any], Any]],
        evaluation: Any,
        ends: float | None = None,
        tick: Callable[[int, int], None] | None = None,
    ) -> None:
        """Add what every metric measures on ``evaluation`` (a ``metrics.base.EvalContext``), and the seconds each took.

        What would begin after ``ends`` (``time.monotonic``), or is overtaken by the time limit, is null.
        """
        for done, (label, metric) in enumerate(metrics.items(), 1):
            began = time.monotonic()
            try:
                if ends is not None and began > ends:
                    raise OutOfTime
                with fast_matmul():
                    measured = metric(evaluation)
            except OutOfTime:
                function = metric.func if isinstance(metric, functools.partial) else metric
                late = [
                    info.name
                    for info in sys.modules[function.__module__].INFO
                    if info.name not in self.metrics
                ]
                self.metrics |= dict.fromkeys(late)
                self.why_null |= dict.fromkeys(late, "not measured: the time limit was over")
                self.cut = True
                continue
            self.metrics |= measured.scalars
            self.why_null |= measured.why_null
            self.arrays |= measured.arrays
            self.noise |= measured.noise
            self.warnings += measured.warnings
            self.facts.setdefault("evaluations", []).append(
                facts_module.of_evaluation(metric, evaluation, measured.scalars)
            )
            self.features = merged(self.features, measured.features)
            self.seconds[f"metric.{label}"] = time.monotonic() - began
            if tick:
                tick(done, len(metrics))


def merged(
    one: list[dict[str, Any]] | None, other: list[dict[str, Any]] | None
) -> list[dict[str, Any]] | None:
    """What two metrics say about latents, joined latent by latent; where both use a key, the later one counts."""
    if not one or not other:
        return one or other
    found = {feature["latent"]: feature for feature in one}
    for feature in other:
        found[feature["latent"]] = found.get(feature["latent"], {}) | feature
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Context:
    """The edges a study may touch: where caches lie, which device to use, whom to tell, when to stop."""

    folder: Path
    cache: Path
    device: torch.device
    console: Console
    log: Callable[[int, Mapping[str, float]], None] = lambda step, values: None
    deadline: float | None = None  # of the cell's training
    ends: float | None = None  # of the whole run

    @contextmanager
    def session(self, name: str, prefix: str, *, share: float = 1.0) -> Iterator[Session]:
        """A training session shown as stage ``name``, its numbers logged as ``prefix/<name>``; it may use ``share`` of the time left."""
        deadline = (
            None
            if self.deadline is None
            else time.monotonic() + share * max(self.deadline - time.monotonic(), 0.0)
        )
        with self.console.stage(name) as tick:
            yield Session(
                lambda step, values: self.log(
                    step, {f"{prefix}/{k}": v for k, v in values.items()}
                ),
                tick,
                None,
                deadline,
            )


class Study(Protocol):
    """A study: checked and prepared before anything costs time, then run cell by cell."""

    def check(self) -> None:
        """Raise :class:`UserError` for whatever cannot work, in well under a second and without touching disk."""

    def prepare(self, ctx: Context) -> dict[str, Any]:
        """Fetch what all cells need; returns the provenance of every dataset."""

    def cells(self) -> list[Cell]:
        """The cells, in the order they are run."""

    def run(self, cell: Cell, ctx: Context) -> dict[str, Outcome]:
        """The outcomes of a cell by report name."""

    def infos(self) -> list[MetricInfo]:
        """Title, formula and direction of every metric the study may report."""
