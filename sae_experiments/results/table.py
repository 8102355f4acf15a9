"""Runs side by side: the long table of their results, the baseline, and the metrics.

`RunTable.frame` is the one table that comparison, report and figures are made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from sae_experiments import conditions
from sae_experiments.errors import UserError
from sae_experiments.results.comparable import why_not_comparable
from sae_experiments.results.records import number
from sae_experiments.results.runs import (
    PUBLISHED,
    Run,
    find_runs,
    is_run,
    load_runs,
    mapping,
    names_of,
    published,
    runs_in,
)

__all__ = ["Run", "RunTable", "find_runs", "load_runs", "load_table", "published", "runs_in"]
BASELINE = "run_0"
COLUMNS = ("run", "dataset", "sae", "seed", "metric", "value", "noise")
BETTER = ("up", "down", "target")


@dataclass(frozen=True)
class RunTable:
    """Runs in the order in which they are shown, and what they are compared with."""

    runs: list[Run]
    """One for each SAE of each run folder."""
    baseline: Run | None = None
    """The SAE of the baseline folder; None without a baseline, or if it has several SAEs."""
    baselines: list[Run] = field(default_factory=list)
    """Every SAE of the baseline folder."""

    def __post_init__(self) -> None:
        if self.baseline is not None and not self.baselines:
            object.__setattr__(self, "baselines", [self.baseline])

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Every value, one per row: run, dataset, sae, seed, metric, value, noise.

        `run` is the folder. `seed` is NA if only `final_info.json` is left. `noise` is the standard
        error of the evaluation itself, over resampled text, where it is known.
        """
        rows = [row for run in self.runs for row in _rows(run)]
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        return frame.astype({"seed": "Int64", "value": "float64", "noise": "float64"})

    @property
    def folders(self) -> list[list[Run]]:
        """Runs grouped by their folder."""
        groups: dict[str, list[Run]] = {}
        for run in self.runs:
            groups.setdefault(run.folder, []).append(run)
        return list(groups.values())

    @cached_property
    def datasets(self) -> list[str]:
        """Names of all corpora, sorted."""
        return sorted({dataset for run in self.runs for dataset in run.stats})

    def with_rivals(self, datasets: Sequence[str]) -> list[str]:
        """Those of `datasets` that a run besides the baseline has; all if there is no such run."""
        others = {d for run in self.runs if not self.is_baseline(run) for d in run.stats}
        return [dataset for dataset in datasets if dataset in others] or list(datasets)

    @cached_property
    def metrics(self) -> list[str]:
        """Every metric of any run, in the order of the manifests, then by name."""
        of_runs = {metric for run in self.runs for stats in run.stats.values() for metric in stats}
        return sorted(of_runs, key=lambda metric: (self.info(metric)["order"], metric))

    def info(self, metric: str) -> dict[str, Any]:
        """Title, formula, unit, better, shown and order of a metric.

        They are those of the first manifest that knows the metric, or defaults.
        """
        return self._infos.setdefault(metric, self._info(metric))

    @cached_property
    def _infos(self) -> dict[str, dict[str, Any]]:
        return {}

    def _info(self, metric: str) -> dict[str, Any]:
        known = next(self._described(metric), {})
        order = number(known.get("order"))
        better = known.get("better")
        return {
            "title": str(known.get("title") or metric),
            "formula": str(known.get("formula") or ""),
            "unit": str(known.get("unit") or ""),
            "better": better if better in BETTER else "none",
            "shown": known.get("shown", True) is not False,
            "order": float("inf") if order is None else order,
        }

    def _described(self, metric: str) -> Iterator[dict[str, Any]]:
        """Description of a metric in the manifests."""
        for run in self.runs:
            info = mapping(mapping(run.manifest.get("metrics")).get(metric))
            if info:
                yield info

    def only(self, dataset: str) -> RunTable:
        """The same table with a single dataset."""
        parts = {
            id(run): replace(run, stats={dataset: run.stats[dataset]})
            for run in [*self.runs, *self.baselines]
            if dataset in run.stats
        }
        return RunTable(
            [parts[id(run)] for run in self.runs if id(run) in parts],
            parts.get(id(self.baseline)),
            [parts[id(run)] for run in self.baselines if id(run) in parts],
        )

    def is_baseline(self, run: Run) -> bool:
        """True if the run is part of the baseline."""
        return any(run is other for other in self.baselines)

    def baseline_of(self, run: Run) -> Run | None:
        """Counterpart of a run: the baseline's SAE of the same name, or its only one."""
        same = [other for other in self.baselines if other.sae == run.sae]
        return next(iter(same), self.baseline)

    def why_not(self, run: Run, dataset: str, metric: str) -> str:
        """Reason why a metric must not be subtracted from the baseline's; empty if it may be."""
        baseline = self.baseline_of(run)
        if baseline is None:
            return f"the baseline has no SAE {run.sae}" if self.baselines else "no baseline"
        return why_not_comparable(run, baseline, dataset, metric, self.depends(metric))

    def depends(self, metric: str) -> tuple[str, ...]:
        """Conditions that a metric depends on; `ON_ACTIVATIONS` if no manifest lists them."""
        for info in self._described(metric):
            given = info.get("depends")
            if isinstance(given, list) and given:
                return tuple(name for name in given if name in conditions.CONDITIONS)
        return conditions.ON_ACTIVATIONS


def _rows(run: Run) -> Iterator[tuple[Any, ...]]:
    """The rows of the long table of one run."""
    noise = {(record.dataset, record.seed): record.noise for record in run.records}
    for dataset, stats in run.stats.items():
        of_dataset = (run.folder, dataset, run.sae_name)
        for metric, stat in stats.items():
            for seed, value in stat.values.items():
                yield (*of_dataset, seed, metric, value, noise[dataset, seed].get(metric))
            for value in run.listed.get(dataset, {}).get(metric, []):
                yield (*of_dataset, None, metric, value, None)


def load_table(
    paths: Sequence[Path], *, baseline: str | None = None, labels: Mapping[str, str] | None = None
) -> RunTable:
    """Read runs and find the baseline.

    `run_0` is looked for among the runs, beside them, and one folder up. If there is none, the
    published figures stand in for it, provided that some run has preset `full`.

    Args:
        paths: Run folders.
        baseline: Name or path of the run to compare with; None for run_0.
        labels: Labels by name of the folder.

    Raises:
        UserError: The baseline that was asked for has no results.
    """
    runs = load_runs(paths, labels)
    against = [run for run in runs if run.folder == (baseline or BASELINE)]
    if not against and baseline != PUBLISHED:
        runs, against = _find_baseline(runs, paths, baseline, labels)
    if not against and baseline not in (None, PUBLISHED):
        raise UserError(
            f"baseline={baseline} is not a run with results; "
            "give the name of one of the runs or the path of a run folder"
        )
    if not against and (baseline == PUBLISHED or any(run.preset == "full" for run in runs)):
        against = [published()]
    return make_table(runs, against)


def make_table(runs: Sequence[Run], against: Sequence[Run]) -> RunTable:
    """Build a table, with the names of the runs as short as possible.

    An SAE is named without its folder if the folder is the only one besides the baseline's.
    """
    compared = {run.folder for run in against}
    others = {run.folder for run in runs} - compared
    alone = others or {run.folder for run in runs}
    short = next(iter(alone)) if len(alone) == 1 else None
    is_all = len({id(run) for run in [*runs, *against]}) == 1
    named = {
        id(run): replace(run, name=_name_alone(run, is_all=is_all)) if run.folder == short else run
        for run in [*runs, *against]
    }
    baselines = [named[id(run)] for run in against]
    return RunTable(
        [named[id(run)] for run in runs],
        baselines[0] if len(baselines) == 1 else None,
        baselines,
    )


def _name_alone(run: Run, *, is_all: bool) -> str:
    """Name of an SAE whose folder goes without saying; `is_all`: there is no other run."""
    return run.sae or (run.sae_name if is_all else run.name)


def table_of_run(folder: Path) -> RunTable:
    """Build the table of a single run folder and its baseline.

    Raises:
        UserError: The run has no results.
    """
    table = load_table([folder.resolve()])
    own = [run for run in table.runs if run.path == folder.resolve()]
    if not own:
        raise UserError(f"{folder} has no results to report")
    return make_table(own, table.baselines)


def _find_baseline(
    runs: list[Run], paths: Sequence[Path], baseline: str | None, labels: Mapping[str, str] | None
) -> tuple[list[Run], list[Run]]:
    """The runs with those of the baseline folder in front, and the baseline's."""
    wanted = [Path(baseline)] if baseline else []
    for path in paths[:1]:
        wanted += [parent / (baseline or BASELINE) for parent in list(path.parents)[:2]]
    folder = next((path.resolve() for path in wanted if is_run(path)), None)
    if folder is None:
        return runs, []
    against = [run for run in runs if run.path == folder]
    if against:
        return runs, against
    against = load_runs([folder], labels)
    if any(run.folder == folder.name for run in runs):
        name = f"{folder.parent.name}/{folder.name}"
        against = [replace(run, folder=name, name=names_of(name, run.sae)) for run in against]
    return [*against, *runs], against
