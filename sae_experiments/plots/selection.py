"""Selection of the runs, datasets and arrays that have the data of a figure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from sae_experiments.plots.base import NothingToDrawError
from sae_experiments.results.table import Run, RunTable

T = TypeVar("T")
Arrays = dict[str, np.ndarray]
PanelKey = tuple[str, str]  # name of a run, dataset


@dataclass(frozen=True)
class Row(Generic[T]):
    """One run on one dataset, with the data that a figure shows of it."""

    run: Run
    """The run."""
    dataset: str
    """Name of the dataset."""
    data: T
    """The data of the figure."""


class Mean(NamedTuple):
    """Mean over seeds and its standard error (None for a single seed)."""

    value: float
    stderr: float | None


def mean_of(run: Run, dataset: str, metric: str) -> Mean | None:
    """Mean of a metric over seeds; None if it was not measured or is null."""
    stat = run.stats.get(dataset, {}).get(metric)
    if stat is None or stat.mean is None:
        return None
    return Mean(stat.mean, stat.stderr)


def limit(items: Sequence[T], most: int, kind: str, notes: list[str]) -> list[T]:
    """Keep the first items; if any are left out, add a line about them to the caption.

    Args:
        items: Items to draw.
        most: Number of items to keep.
        kind: Plural name of the items, for the caption.
        notes: Lines of the caption; changed in place.

    Returns:
        The first `most` items.
    """
    if len(items) > most:
        notes.append(f"Only the first {most} of {len(items)} {kind} are drawn.")
    return list(items[:most])


def find_rows(
    table: RunTable, lookup: Callable[[Run, str], T | None], missing: str
) -> list[Row[T]]:
    """Look up the data of a figure for every run and dataset.

    Args:
        table: Runs.
        lookup: Returns the data of a run on a dataset, or None if it has none.
        missing: Message of the error.

    Returns:
        A row for each run and dataset that has data.

    Raises:
        NothingToDrawError: No run has data on any dataset.
    """
    rows = []
    for run in table.runs:
        for dataset in sorted(run.stats):
            data = lookup(run, dataset)
            if data is not None:
                rows.append(Row(run, dataset, data))
    if not rows:
        raise NothingToDrawError(missing)
    return rows


def find_panels(
    table: RunTable, lookup: Callable[[Run, str], T | None], missing: str
) -> dict[PanelKey, T]:
    """Look up the data of a figure as `find_rows` does, by name of the run and dataset."""
    return {(row.run.name, row.dataset): row.data for row in find_rows(table, lookup, missing)}


def first_arrays(*names: str) -> Callable[[Run, str], Arrays | None]:
    """A lookup, for `find_rows`, of the arrays of the first seed that stored all of `names`."""
    return partial(_first_arrays, names=frozenset(names))


def _first_arrays(run: Run, dataset: str, names: frozenset[str]) -> Arrays | None:
    for arrays in run.arrays(dataset).values():
        if arrays.keys() >= names:
            return arrays
    return None


def choose_panels(
    table: RunTable,
    keys: Collection[PanelKey],
    *,
    max_runs: int,
    max_datasets: int,
    notes: list[str],
    rivals_only: bool = False,
) -> tuple[list[Run], list[str]]:
    """Choose the runs and datasets of a figure with panels per dataset.

    Args:
        table: Runs.
        keys: Run and dataset of every panel that has data.
        max_runs: Maximum number of runs to draw.
        max_datasets: Maximum number of datasets to draw.
        notes: Lines of the caption about what is left out; changed in place.
        rivals_only: Leave out datasets that only the baseline has.

    Returns:
        Runs, in the order of the table, and datasets, sorted.
    """
    with_data = {name for name, _ in keys}
    runs = [run for run in table.runs if run.name in with_data]
    runs = limit(runs, max_runs, "runs", notes)
    chosen = {run.name for run in runs}
    datasets = sorted({dataset for name, dataset in keys if name in chosen})
    if rivals_only:
        datasets = table.with_rivals(datasets)
    return runs, limit(datasets, max_datasets, "datasets", notes)
