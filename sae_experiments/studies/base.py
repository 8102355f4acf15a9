"""The interface of a study: a list of cells, each a pure function of the configuration."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from sae_experiments import resources
from sae_experiments.console import Console
from sae_experiments.errors import UserError
from sae_experiments.fitting.fit import FitReport
from sae_experiments.fitting.spec import SAESpec
from sae_experiments.metric_info import MetricInfo, SelfDescribed
from sae_experiments.quality_warnings import Warned
from sae_experiments.resources import Need
from sae_experiments.saes.ops import fast_matmul
from sae_experiments.stopping import OutOfTime, limited
from sae_experiments.studies import conditions as facts_module
from sae_experiments.training.loop import Session, seed_of

#: Held-out parts: the validation text or rows; the part that a search evaluates on; the part that
#: its winner is reported on.
HELD_OUT = ("val", "search", "test")


#: Share of a cell's remaining time that its last training may use: metrics follow it.
LAST_SHARE = 0.8


def check_held_out(held_out: str) -> None:
    """Raise `UserError` for a held-out part that does not exist."""
    if held_out not in HELD_OUT:
        raise UserError(f"held_out={held_out} is not one of {', '.join(HELD_OUT)}")


def part_of(held_out: str) -> dict[str, str]:
    """Entry of the provenance for a held-out part other than the default.

    Results on other text are not comparable.
    """
    return {} if held_out == "val" else {"held_out": held_out}


def rows_seed(seed: int, held_out: str) -> int:
    """Seed of held-out rows that are drawn afresh.

    The winner of a search is reported on rows that the search has not evaluated on.
    """
    return seed_of(seed, "held out", *(["test"] if held_out == "test" else []))


class Cell(NamedTuple):
    """One unit of work."""

    dataset: str
    """Corpus, or family of configurations."""
    seed: int
    reports: tuple[str, ...]
    """Names of its results."""


def module_of(metric: Callable[..., Any]) -> Any:
    """The module of a metric, which holds its `INFO`."""
    function = metric.func if isinstance(metric, functools.partial) else metric
    return sys.modules[function.__module__]


def infos_of(metrics: Iterable[Callable[..., Any]]) -> list[MetricInfo]:
    """The descriptions of metrics, each once, in their order."""
    infos: dict[MetricInfo, None] = {}
    for metric in metrics:
        own = metric.infos if isinstance(metric, SelfDescribed) else module_of(metric).INFO
        infos |= dict.fromkeys(own)
    return list(infos)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One result of a run that has ended."""

    name: str
    """Name of the result; see `Cell.reports`."""
    seed: int
    """Seed of the cell."""
    metrics: Mapping[str, float | None]
    """Values by metric."""
    seconds: Mapping[str, float]
    """Durations by stage."""
    cut: bool
    """The time limit ended training or measuring early."""


@dataclass
class Outcome:
    """Results of a cell under one name."""

    metrics: dict[str, float | None] = field(default_factory=dict)
    """Values by metric; None if undefined."""
    why_null: dict[str, str] = field(default_factory=dict)
    """Reasons of undefined values."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Durations by stage."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays for figures."""
    curves: list[tuple[int, str, float]] = field(default_factory=list)
    """Training curves, as (step, name, value)."""
    noise: dict[str, float] = field(default_factory=dict)
    """Standard errors, over resampled text, of metrics that sample it."""
    features: list[dict[str, Any]] | None = None
    """One JSON-able dict per latent, for the feature browser."""
    graphs: list[dict[str, Any]] | None = None
    """Attribution graphs, see `circuits.graph.as_dict`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Conditions of the measurement, see `studies.conditions`."""
    warnings: list[Warned] = field(default_factory=list)
    """Warnings about the quality of the results."""
    cut: bool = False
    """The time limit ended training or measuring early."""

    def add_fit(self, fit: FitReport) -> None:
        """Add the warnings about the fit of the SAE, and the settings that it chose itself."""
        self.warnings = [*self.warnings, *fit.warned]
        self.facts["fit"] = fit.facts

    def measure(
        self,
        metrics: Mapping[str, Callable[[Any], Any]],
        evaluation: Any,
        ends: float | None = None,
        tick: Callable[[int, int], None] | None = None,
    ) -> None:
        """Measure metrics, and add their values and durations.

        Args:
            metrics: Metrics by label.
            evaluation: A `metrics.base.EvalContext`.
            ends: Time (`time.monotonic`) after which no metric begins. Metrics that are not
                measured or are interrupted by the time limit have null values.
            tick: Called with the number of metrics done and the total.
        """
        for done, (label, metric) in enumerate(metrics.items(), 1):
            began = time.monotonic()
            try:
                if ends is not None and began > ends:
                    raise OutOfTime
                # Other values of this outcome are something to show: the limit may interrupt.
                with limited(ends, lambda: True), fast_matmul():
                    measured = metric(evaluation)
            except OutOfTime:
                names = [info.name for info in infos_of([metric])]
                late = [name for name in names if name not in self.metrics]
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
    """Join descriptions of latents from two metrics; the later one counts for keys in both."""
    if not one or not other:
        return one or other
    by_latent = {feature["latent"]: feature for feature in one}
    for feature in other:
        latent = feature["latent"]
        by_latent[latent] = by_latent.get(latent, {}) | feature
    return list(by_latent.values())


@dataclass(frozen=True, kw_only=True)
class Context:
    """Surroundings of a study."""

    folder: Path
    """Run folder."""
    cache: Path
    """Folder of the cache."""
    device: torch.device
    """Device of models and SAEs."""
    console: Console
    """Prints lines and progress."""
    log: Callable[[int, Mapping[str, float]], None] = lambda step, values: None
    """Called with a step and its numbers."""
    deadline: float | None = None
    """Time (`time.monotonic`) at which the training of the cell ends; None: never."""
    ends: float | None = None
    """Time at which the whole run ends; None: never."""
    needs: list[float] = field(default_factory=list)
    """Bytes of what was announced, each the peak of one part of a cell."""

    def announce(self, what: str, need: Need, fix: str) -> None:
        """Print the needs of a part of a cell (see `resources.announce`), and keep its bytes.

        Raises:
            UserError: It does not fit into the memory of the device.
        """
        resources.announce(what, need, fix, device=self.device, say=self.console.say)
        self.needs.append(float(sum(need.memory.values())))

    @contextmanager
    def session(self, name: str, prefix: str, *, share: float = LAST_SHARE) -> Iterator[Session]:
        """A training session.

        Args:
            name: Name of the stage on the console.
            prefix: Prefix of the names of its numbers.
            share: Share of the remaining time that it may use; the rest is for what follows it.
        """
        deadline = None
        if self.deadline is not None:
            now = time.monotonic()
            left = max(self.deadline - now, 0.0)
            deadline = now + share * left

        def log(step: int, values: Mapping[str, float]) -> None:
            self.log(step, {f"{prefix}/{name}": value for name, value in values.items()})

        with self.console.stage(name) as tick:
            yield Session(log, tick, None, deadline)


class Study(Protocol):
    """A study: checked and prepared before anything costs time, then run cell by cell."""

    @property
    def saes(self) -> Mapping[str, SAESpec]:
        """The SAEs to fit or to load, by label."""
        ...

    def check(self) -> None:
        """Raise `UserError` for an invalid configuration.

        Takes well under a second and does not touch the disk.
        """
        ...

    def prepare(self, ctx: Context) -> dict[str, Any]:
        """Fetch what all cells need, and return the provenance of every result."""
        ...

    def cells(self) -> list[Cell]:
        """The cells, in the order in which they run."""
        ...

    def run(self, cell: Cell, ctx: Context) -> dict[str, Outcome]:
        """Run a cell, and return its outcomes by name of the result."""
        ...

    def infos(self) -> list[MetricInfo]:
        """Descriptions of all metrics that the study may report."""
        ...


def three_decimals(value: float | None) -> str:
    """A number for the console; a dash for one that is undefined."""
    return "-" if value is None else f"{value:.3f}"
