"""Notes that a reader of any table of results needs before believing a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pandas as pd

from sae_experiments import quality_warnings as warned
from sae_experiments.results.compare import NO_VALUE
from sae_experiments.results.table import Run, RunTable

WARNING = "Warning:"
HOW = (
    "±: one standard error over the n seeds; delta: run - baseline, paired by seed if the seeds "
    "are the same."
)
RULE = (
    "better, worse, differs: the delta exceeds 2 of its standard errors, and the noise of the "
    "evaluation itself (2 sqrt(2) standard errors of the metric over resampled text) if it is "
    "known; with fewer than 5 seeds that is a hint, not a proof."
)
NO_BASELINE = "No baseline: there is no run_0, so no deltas (--baseline=RUN names one)."


def notes(table: RunTable, rows: pd.DataFrame) -> list[str]:
    """Baseline, meaning of errors and verdicts, unfinished runs, warnings, devices."""
    lines = baseline_lines(table)
    lines += [HOW, RULE] if _compared(table) else []
    states = [f"{run.folder} {run.status}" for run, *_ in table.folders if _unfinished(run)]
    lines += [f"Not finished in good order: {', '.join(states)}."] if states else []
    lines += not_comparable_lines(rows)
    lines += warning_lines(table)
    devices = {run.device for run in [*table.runs, *table.baselines]}
    if len(devices) > 1:
        lines.append(
            f"Times and speeds are from different devices ({', '.join(sorted(devices))}): "
            "do not compare them."
        )
    hidden = rows.loc[~rows["shown"], "metric"].nunique() if len(rows) else 0
    if hidden:
        lines.append(f"In comparison.csv only: {hidden} more metric{'s' * (hidden > 1)}.")
    return lines


def baseline_lines(table: RunTable) -> list[str]:
    """Name of the baseline, and where it is from if it was published."""
    if not table.baselines:
        return [NO_BASELINE]
    if not _compared(table):
        return []
    first = table.baselines[0]
    lines = [f"Baseline: {first.title if len(table.baselines) == 1 else first.folder}."]
    if first.path is None:
        lines.append(str(first.manifest.get("provenance", "")))
    return lines


def _compared(table: RunTable) -> bool:
    """True if there is a baseline and a run beside it."""
    return bool(table.baselines) and any(not table.is_baseline(run) for run in table.runs)


def _unfinished(run: Run) -> bool:
    return run.status not in ("", "done")


def not_comparable_lines(rows: pd.DataFrame) -> list[str]:
    """One line for each reason for which runs are not compared, with runs, datasets and metrics.

    A metric that the baseline lacks needs no reason, unless the baseline lacks the whole dataset.
    """
    if not len(rows) or not rows["baseline"].notna().any():
        return []
    others = rows.loc[~rows["is_baseline"] & (rows["not_comparable"] != "")]
    lines = []
    for pair, group in others.groupby(["not_comparable", "baseline"], sort=False):
        why, baseline = cast("tuple[str, str]", pair)
        if why == NO_VALUE:
            continue
        runs = short_list(list(group["name"].unique()))
        where = _where(rows, group)
        lines.append(f"Not comparable with {baseline}: {runs}{where}: {why}.")
    return lines


def _where(rows: pd.DataFrame, group: pd.DataFrame) -> str:
    """The datasets and metrics of a group, if they are not all that its runs have."""
    of_runs = rows["name"].isin(group["name"].unique())
    same = rows.loc[of_runs & (rows["not_comparable"] != NO_VALUE)]
    parts = []
    if group["dataset"].nunique() < same["dataset"].nunique():
        parts.append(short_list(list(group["dataset"].unique())))
    if group["metric"].nunique() < same["metric"].nunique():
        parts.append(short_list(list(group["metric"].unique()), 3))
    return f" ({'; '.join(parts)})" if parts else ""


def short_list(names: Sequence[str], most: int = 4) -> str:
    """Names as `a, b, c, d and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def warning_lines(table: RunTable) -> list[str]:
    """`Warning: ...` for each kind of warning of each folder, the baseline's first."""
    folders: dict[str, list[Run]] = {}
    for run in [*table.baselines, *table.runs]:
        parts = folders.setdefault(run.folder, [])
        if not any(run is part for part in parts):
            parts.append(run)
    lines = []
    for folder, runs in folders.items():
        cells = [cell for run in runs for cell in _warnings(run)]
        name = f"{folder}, " if len(folders) > 1 else ""
        lines += [f"{WARNING} {name}{line}" for line in warned.lines(cells)]
    return lines


def _warnings(run: Run) -> list[tuple[str, int, Sequence[Mapping[str, Any]]]]:
    return [
        (f"{record.dataset} {run.sae}".strip(), record.seed, record.warnings)
        for record in run.records
    ]


def corpus_lines(table: RunTable, dataset: str) -> list[str]:
    """One line for each preset and corpus that runs used for a dataset; stand-ins in capitals."""
    groups: dict[str, dict[str, None]] = {}  # the inner dictionaries are ordered sets
    for run in table.runs:
        if dataset in run.stats:
            corpus = run.provenance(dataset).get("corpus") or "unknown"
            alarm = ", STAND-IN TEXT (not the real corpus)" if run.stand_in(dataset) else ""
            text = f"preset {run.preset or 'unknown'}, corpus {corpus}{alarm}"
            groups.setdefault(text, {})[run.folder] = None
    if len(groups) == 1:
        return list(groups)
    return [f"{text}: {short_list(list(folders))}" for text, folders in groups.items()]
