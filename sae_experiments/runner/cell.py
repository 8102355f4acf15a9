"""Run one cell of a study and store its results: the part of a run that a worker does."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_experiments import quality_warnings
from sae_experiments.quality_warnings import Warned
from sae_experiments.results.records import (
    CurveWriter,
    Record,
    checksums,
    read_records,
    save_arrays,
    save_features,
    save_graphs,
    write_record,
)
from sae_experiments.stopping import limited
from sae_experiments.studies.base import Cell, Context, Outcome, Study


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """The end of a cell whose results are on disk."""

    cut: bool
    """True if the time limit cut something short."""
    warnings: list[tuple[str, Warned]]
    """Warnings, each with the result name that it is about."""
    metrics: dict[str, dict[str, float | None]]
    """Metrics by result name."""


@dataclass(frozen=True, kw_only=True)
class TimeLeft:
    """Seconds that a cell may take; None: no limit."""

    training: float | None = None
    """Of its training stages together."""
    whole: float | None = None
    """Until the whole run must have ended."""


@dataclass(frozen=True, kw_only=True)
class CellRunner:
    """Runs cells of a study into a run folder.

    Args:
        study: The study, prepared.
        folder: The run folder.
        hashes: `config_hash` and `source_hash` of the records.
        corpora: Provenance by result name.
    """

    study: Study
    folder: Path
    hashes: Mapping[str, str]
    corpora: Mapping[str, Any]

    def run(self, cell: Cell, ctx: Context, left: TimeLeft) -> CellResult:
        """Run a cell and write its files, the record last.

        Raises:
            OutOfTime: The time limit of the run has passed, and there is a result to show.
            NonFinite: A loss is not finite.
        """
        began = time.monotonic()
        ctx = replace(
            ctx,
            deadline=None if left.training is None else began + left.training,
            ends=None if left.whole is None else began + left.whole,
        )
        # A limit too short for any result is overrun by the first cell, so that a run ends with
        # something to show.
        with limited(ctx.ends, lambda: bool(self.records())):
            with CurveWriter(self.folder, cell.reports[0], cell.seed, resume=False) as curves:

                def log(step: int, values: Mapping[str, float]) -> None:
                    for name, value in values.items():
                        curves.write(step, name, value)
                    ctx.log(step, values)

                outcomes = self.study.run(cell, replace(ctx, log=log))
            seconds = time.monotonic() - began
            warnings = []
            for name, outcome in outcomes.items():
                noticed = self._warnings(name, outcome)
                self._keep(name, cell.seed, outcome, seconds, noticed)
                warnings += [(name, warning) for warning in noticed]
        return CellResult(
            cut=any(outcome.cut for outcome in outcomes.values()),
            warnings=warnings,
            metrics={name: outcome.metrics for name, outcome in outcomes.items()},
        )

    def records(self) -> list[Record]:
        """Results of this configuration and this code.

        A cell that was cut short counts until it is completed.
        """
        wanted = {(name, cell.seed) for cell in self.study.cells() for name in cell.reports}
        whole = tuple(self.hashes.values())
        cut = tuple(f"{value}-cut" for value in whole)
        return [
            record
            for record in read_records(self.folder)
            if (record.dataset, record.seed) in wanted
            and (record.config_hash, record.source_hash) in (whole, cut)
        ]

    def _warnings(self, name: str, outcome: Outcome) -> list[Warned]:
        warnings = quality_warnings.of_text(self.corpora.get(name) or {}) + outcome.warnings
        return warnings + quality_warnings.of_metrics(
            outcome.metrics, outcome.facts.get("asked_l0")
        )

    def _keep(
        self, name: str, seed: int, outcome: Outcome, seconds: float, warnings: Sequence[Warned]
    ) -> None:
        # The curves are written again from the histories of the stages: a resumed stage has logged
        # only what it did after the kill.
        with CurveWriter(self.folder, name, seed, resume=False) as curves:
            for step, key, value in outcome.curves:
                curves.write(step, key, value)
        if outcome.arrays:
            save_arrays(self.folder, name, seed, outcome.arrays)
        if outcome.features is not None:
            save_features(self.folder, name, seed, outcome.features)
        if outcome.graphs is not None:
            save_graphs(self.folder, name, seed, outcome.graphs)
        # A cell that was cut short keeps its numbers under another hash, so that the same command
        # without the limit makes it whole.
        end = "-cut" if outcome.cut else ""
        write_record(
            self.folder,
            Record(
                dataset=name,
                seed=seed,
                metrics=outcome.metrics,
                why_null=outcome.why_null,
                noise=outcome.noise,
                seconds=outcome.seconds | {"cell": seconds},
                files=checksums(self.folder, name, seed),
                facts=outcome.facts,
                warnings=[warning._asdict() for warning in warnings],
                **{key: f"{value}{end}" for key, value in self.hashes.items()},
            ),
        )
