"""Curves over training steps: a row of panels for each curve, a column for each dataset; mean over seeds with a band."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sae_experiments.plots.base import (
    Look,
    NothingToDrawError,
    caption,
    clip,
    finish,
    handle,
    head_panel,
    limit,
    looks,
    panels,
    percent,
    plain_log,
    short_list,
    styled,
    tint,
)
from sae_experiments.results.table import Run, RunTable


@styled
def draw(
    table: RunTable, *, title: str, curves: Mapping[str, str], log_y: Sequence[str], skip_frac: float, max_rows: int, max_runs: int, max_datasets: int
) -> Figure:
    """Draw the logged ``curves`` (name or pattern such as ``sae/*`` -> label; a pattern's curves are labelled by name).

    Curves of one label share a row; where two of them have a value for the same step, that of the one listed first counts.

    Line: mean over the seeds; band: one standard error, where at least two seeds were logged at the step. Runs whose curves are
    all the same (one language model shared by many SAEs) are drawn once, under a common name. Linear axes fit what comes after the
    first ``skip_frac`` of the steps, as the first steep fall would press everything else flat.
    """
    notes: list[str] = []
    table = table.by_arm
    having = [run for run in table.runs if _names(run, curves)]
    runs = limit(having, max_runs, "runs", notes)
    labels = _labels(curves, {name for run in runs for name in run.curves["name"]})
    rows = limit(list(dict.fromkeys(labels.values())), max_rows, "curves", notes)
    drawn = [_labelled(run.curves, {name: label for name, label in labels.items() if label in rows}) for run in runs]
    datasets = limit(table.with_rivals(sorted({d for points in drawn for d in points["dataset"]})), max_datasets, "datasets", notes)
    if not datasets:
        raise NothingToDrawError(f"no run has curves named {', '.join(curves)}")
    groups = _same(runs, drawn)
    look = looks(table)
    fig, axes = panels(len(rows), len(datasets), width=3.7, height=1.85, sharex="col")
    for row, label in enumerate(rows):
        log = any(labels.get(name) == label for name in log_y)
        for column, dataset in enumerate(datasets):
            ax = axes[row, column]
            for first, _ in groups:
                _draw_curve(ax, drawn[runs.index(first)], dataset, label, look[first.name])
            _dress(ax, label=label if column == 0 else "", log=log, skip=skip_frac, bottom=row == len(rows) - 1)
            if row == 0:
                head_panel(ax, runs, dataset)
            tint(ax, any(run.stand_in(dataset) for run in runs))
    handles = [handle(first, look[first.name], line=True) for first, _ in groups]
    for entry, (_, members) in zip(handles, groups, strict=True):
        if len(members) > 1:
            entry.set_label(f"{short_list([clip(run.name, 20) for run in members], 2)}: the same curves")
    notes += [f"The axes fit what comes after the first {percent(skip_frac)} of the steps."] if skip_frac else []
    error = "line: mean over seeds, band: ±1 standard error (none where n = 1)"
    return finish(fig, title, notes + caption(table, runs, datasets, error=error), handles)


def _names(run: Run, curves: Mapping[str, str]) -> list[str]:
    return [name for name in run.curves["name"].unique() if any(fnmatch(name, pattern) for pattern in curves)]


def _labels(curves: Mapping[str, str], present: set[str]) -> dict[str, str]:
    """name -> label of every curve there is, those listed by name first."""
    found = {name: label for name, label in curves.items() if name in present}
    return found | {name: name for pattern in curves for name in sorted(present) if fnmatch(name, pattern) and name not in found}


def _labelled(points: pd.DataFrame, labels: Mapping[str, str]) -> pd.DataFrame:
    """The points of the curves in ``labels`` under their labels, one for each dataset, seed, step and label."""
    order = {name: i for i, name in enumerate(labels)}
    chosen: Any = points[points["name"].isin(list(labels))]
    chosen = chosen.assign(order=chosen["name"].map(order), name=chosen["name"].map(dict(labels))).sort_values("order", kind="stable")
    return chosen.drop(columns="order").drop_duplicates(["dataset", "seed", "step", "name"])


def _same(runs: Sequence[Run], drawn: Sequence[pd.DataFrame]) -> list[tuple[Run, list[Run]]]:
    """Runs with identical curves, together, each group with the one that stands for it."""
    groups: dict[bytes, list[Run]] = {}
    for run, points in zip(runs, drawn, strict=True):
        groups.setdefault(hashlib.sha256(points.to_csv(index=False).encode()).digest(), []).append(run)
    return [(members[0], members) for members in groups.values()]


def _draw_curve(ax: Axes, points: pd.DataFrame, dataset: str, name: str, look: Look) -> None:
    chosen = points[(points["dataset"] == dataset) & (points["name"] == name)]
    if chosen.empty:
        return
    by_step = chosen.groupby("step")["value"].agg(["mean", "std", "count"])
    steps, mean, spread, count = (np.asarray(column, float) for column in (by_step.index, by_step["mean"], by_step["std"], by_step["count"]))
    marker = look.marker if len(steps) == 1 else None  # a line through one point cannot be seen
    ax.plot(steps, mean, color=look.color, linestyle=look.line, marker=marker, label=name)
    error = spread / np.sqrt(count)
    if np.isfinite(error).any():
        ax.fill_between(steps, mean - error, mean + error, color=look.color, alpha=0.2, linewidth=0)


def _dress(ax: Axes, *, label: str, log: bool, skip: float, bottom: bool) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines] or [np.zeros(0)])
    steps = np.concatenate([np.asarray(line.get_xdata(), float) for line in ax.lines] or [np.zeros(0)])
    ax.margins(x=0.02)
    if log and len(values) and values.min() > 0:
        plain_log(ax, "y", values.min(), values.max(), least=2)
    elif skip and len(late := values[steps >= skip * steps.max(initial=0)]) and late.min() < values.max():
        pad = 0.06 * (late.max() - late.min()) or 0.05 * abs(late.max()) or 1.0
        ax.set_ylim(late.min() - pad, late.max() + pad)
    elif len(values) and values.min() == values.max() == 0:
        ax.set_ylim(-0.02, 1)  # around a line of zeros, matplotlib shows rounding errors
    ax.set_ylabel(label)
    if not ax.lines:
        ax.set_yticks([])
        ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", va="center", color="#999999")
    if bottom:
        ax.set_xlabel("step")
    ax.ticklabel_format(axis="x", style="plain")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
