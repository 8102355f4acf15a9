"""Comparison of runs: differences of means with their standard errors, and verdicts.

A metric of a run is never subtracted from one that was measured under other conditions (preset,
text, and what the metric says it depends on): the reason stands in its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd

from sae_experiments.results.comparable import why_not_comparable
from sae_experiments.results.records import Stat, mean_stderr
from sae_experiments.results.table import Run, RunTable

DIRECTION = {
    "up": "higher is better",
    "down": "lower is better",
    "target": "has a target",
    "none": "",
}
NO_VALUE = "baseline has no value"
NUMBERS = (
    "mean",
    "stderr",
    "baseline_mean",
    "baseline_stderr",
    "baseline_n",
    "delta",
    "delta_stderr",
    "pairs",
    "believable",
    "behind",
    "behind_stderr",
)


class Delta(NamedTuple):
    """A difference of means.

    It is paired by seed if both sides have the same seeds, else unpaired (Welch). `stderr` is None
    if either side has fewer than two values.
    """

    value: float | None
    stderr: float | None
    test: str  # paired | welch | empty
    n: int  # number of pairs, if paired


NO_DELTA = Delta(None, None, "", 0)


def delta(run: Stat, baseline: Stat) -> Delta:
    """Subtract the baseline from a run.

    The standard error is that of the differences if the seeds are the same, else
    sqrt(stderr_run^2 + stderr_baseline^2).
    """
    if run.mean is None or baseline.mean is None:
        return NO_DELTA
    mine, theirs = (
        {seed: value for seed, value in stat.values.items() if value is not None}
        for stat in (run, baseline)
    )
    if mine.keys() == theirs.keys() and len(mine) > 1:
        mean, stderr, n = mean_stderr(mine[seed] - theirs[seed] for seed in mine)
        return Delta(mean, stderr, "paired", n)
    if run.stderr is None or baseline.stderr is None:
        return Delta(run.mean - baseline.mean, None, "", 0)
    return Delta(run.mean - baseline.mean, math.hypot(run.stderr, baseline.stderr), "welch", 0)


def verdict(difference: Delta, scale: float, better: str, believable: float | None = None) -> str:
    """Call a difference `better`, `worse` or `differs`; empty if it is not believable.

    Args:
        difference: Run minus baseline.
        scale: Size of the values, for rounding errors.
        better: Direction of the metric.
        believable: Smallest difference that is credible given the noise of the evaluation.

    Returns:
        Empty unless the difference exceeds two of its standard errors, rounding, and `believable`.
    """
    if difference.value is None or difference.stderr is None:
        return ""
    if abs(difference.value) <= max(2 * difference.stderr, 1e-9 * scale, believable or 0.0):
        return ""
    if better not in ("up", "down"):
        return "differs"
    return "better" if (difference.value > 0) == (better == "up") else "worse"


def smallest_believable(runs: Iterable[Run], dataset: str, metric: str) -> float | None:
    """Smallest difference worth believing: 2 sqrt(2) standard errors of the evaluation itself.

    The largest of all cells counts. Runs are evaluated on the same text and share most of this
    noise, so that this errs on the side of caution.

    Returns:
        None if no cell records the noise of the metric.
    """
    known = [
        record.noise[metric]
        for run in runs
        for record in run.records
        if record.dataset == dataset and metric in record.noise
    ]
    return 2 * math.sqrt(2) * max(known) if known else None


def compare(table: RunTable) -> pd.DataFrame:
    """The comparison as one row per dataset, metric and run, the baseline first.

    Returns:
        The content of `comparison.csv`. Columns against the baseline: `baseline`, `baseline_mean`,
        `baseline_stderr`, `baseline_n`, `delta`, `delta_stderr`, `test`, `pairs`, `verdict` and, if
        nothing was subtracted, the reason in `not_comparable`. Columns among the runs of the table:
        `place` (`best`, `tied` with it or believably `behind`; empty if there are too few seeds)
        and `behind`, the distance from the best.
    """
    runs = [*table.baselines, *(run for run in table.runs if not table.is_baseline(run))]
    rows: list[dict[str, Any]] = []
    for dataset in table.datasets:
        for metric in table.metrics:
            having = [run for run in runs if metric in run.stats.get(dataset, {})]
            if any(run in having for run in table.runs):
                rows += _rows(table, having, dataset, metric)
    frame = pd.DataFrame(rows)
    return frame.astype(dict.fromkeys(NUMBERS, "float64")) if rows else frame


def _rows(
    table: RunTable, runs: Sequence[Run], dataset: str, metric: str
) -> Iterator[dict[str, Any]]:
    places = _places(table, runs, dataset, metric)
    for run in runs:
        about = _about(table, run, dataset, metric)
        against = _against_baseline(table, run, dataset, metric)
        yield about | against | places.get(id(run), NOWHERE)


def _about(table: RunTable, run: Run, dataset: str, metric: str) -> dict[str, Any]:
    info, stat = table.info(metric), run.stats[dataset][metric]
    reasons = [
        record.why_null[metric]
        for record in run.records
        if record.dataset == dataset and record.why_null.get(metric)
    ]
    return {
        "dataset": dataset,
        "metric": metric,
        "title": info["title"],
        "unit": info["unit"],
        "better": info["better"],
        "shown": info["shown"],
        "run": run.folder,
        "sae": run.sae_name,
        "name": run.name,
        "label": run.label,
        "is_baseline": table.is_baseline(run),
        "preset": run.preset,
        "corpus": run.provenance(dataset).get("corpus"),
        "stand_in": run.stand_in(dataset),
        "status": run.status,
        "mean": stat.mean,
        "stderr": stat.stderr,
        "n": stat.n,
        "why_null": "; ".join(dict.fromkeys(reasons)),
    }


def _against_baseline(table: RunTable, run: Run, dataset: str, metric: str) -> dict[str, Any]:
    stat, baseline = run.stats[dataset][metric], table.baseline_of(run)
    base = baseline.stats.get(dataset, {}).get(metric) if baseline else None
    why_not = "" if table.is_baseline(run) else _why_not(table, run, dataset, metric)
    difference, believable, called = NO_DELTA, None, ""
    if baseline and base and not table.is_baseline(run) and not why_not:
        difference = delta(stat, base)
        believable = smallest_believable([run, baseline], dataset, metric)
        scale = max(abs(stat.mean or 0), abs(base.mean or 0))
        called = verdict(difference, scale, table.info(metric)["better"], believable)
    return {
        "baseline": baseline.name if baseline else None,
        "baseline_mean": base.mean if base else None,
        "baseline_stderr": base.stderr if base else None,
        "baseline_n": base.n if base else None,
        "delta": difference.value,
        "delta_stderr": difference.stderr,
        "test": difference.test,
        "pairs": difference.n or None,
        "believable": believable if difference.value is not None else None,
        "verdict": called,
        "not_comparable": why_not,
    }


def _why_not(table: RunTable, run: Run, dataset: str, metric: str) -> str:
    baseline = table.baseline_of(run)
    if baseline and metric not in baseline.stats.get(dataset, {}):
        return NO_VALUE
    return table.why_not(run, dataset, metric)


NOWHERE = {"place": "", "behind": None, "behind_stderr": None}


def _places(
    table: RunTable, runs: Sequence[Run], dataset: str, metric: str
) -> dict[int, dict[str, Any]]:
    """Place and distance from the best of the runs that may be compared with one another."""
    better = table.info(metric)["better"]
    if better not in ("up", "down"):
        return {}
    group = _comparable_group(table, runs, dataset, metric)
    sign = 1 if better == "up" else -1
    scored = [(sign * (run.stats[dataset][metric].mean or 0.0), run) for run in group]
    if len({score for score, _ in scored}) < 2:
        return {}
    _, best = max(scored, key=lambda pair: pair[0])
    return {id(run): _place(run, best, dataset, metric, better) for run in group}


def _place(run: Run, best: Run, dataset: str, metric: str, better: str) -> dict[str, Any]:
    if run is best:
        return {"place": "best", "behind": 0.0, "behind_stderr": None}
    stat, top = run.stats[dataset][metric], best.stats[dataset][metric]
    if stat.mean == top.mean:
        return {"place": "best", "behind": 0.0, "behind_stderr": None}
    difference = delta(stat, top)
    scale = max(abs(stat.mean or 0), abs(top.mean or 0))
    believable = smallest_believable([run, best], dataset, metric)
    place = ""
    if difference.stderr is not None or abs(difference.value or 0) <= (believable or 0):
        place = "behind" if verdict(difference, scale, better, believable) else "tied"
    return {"place": place, "behind": difference.value, "behind_stderr": difference.stderr}


def _comparable_group(table: RunTable, runs: Sequence[Run], dataset: str, metric: str) -> list[Run]:
    """The runs with a value that may be compared with the first of them."""
    valued = [run for run in runs if run.stats[dataset][metric].mean is not None]
    if not valued:
        return []
    depends, first = table.depends(metric), valued[0]
    return [
        run
        for run in valued
        if run is first or not why_not_comparable(run, first, dataset, metric, depends)
    ]
