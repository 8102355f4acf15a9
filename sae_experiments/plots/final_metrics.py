"""The last numbers of every run as dots with error bars, each panel against the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sae_experiments.plots.base import (
    BASELINE_COLOUR,
    GREY,
    NothingToDrawError,
    caption,
    clip,
    finish,
    head_panel,
    hollow,
    limit,
    looks,
    metric_label,
    not_comparable,
    panels,
    styled,
    tint,
)
from sae_experiments.results.table import Run, RunTable


@styled
def draw(table: RunTable, *, title: str, metrics: Sequence[str], max_metrics: int, max_runs: int, max_datasets: int) -> Figure:
    """A panel for each dataset and metric, a line for each run: mean, one standard error, the single seeds as small dots.

    The baseline is a dashed line with its own standard error as a band; hollow markers are runs that must not be compared with it.
    Where no run has one of ``metrics``, the first metrics there are are drawn.
    """
    notes: list[str] = []
    table = table.by_arm
    named = [metric for metric in metrics if metric in table.metrics] or [m for m in table.metrics if table.info(m)["shown"]][:max_metrics]
    names = limit(named, max_metrics, "metrics", notes)
    runs = limit([run for run in table.runs if any(_mean(run, d, m) is not None for d in run.stats for m in names)], max_runs, "runs", notes)
    datasets = [d for d in table.datasets if any(_mean(run, d, m) is not None for run in runs for m in names)]
    datasets = limit(table.with_rivals(datasets), max_datasets, "datasets", notes)
    if not datasets:
        raise NothingToDrawError("no run has a metric with a value")
    cols = len(datasets) if len(datasets) > 1 else min(3, len(names))
    rows = math.ceil(len(datasets) * len(names) / cols)
    fig, axes = panels(rows, cols, width=3.1, height=0.75 + (0.21 if len(runs) <= 8 else 0.17) * len(runs), sharey=True)
    cells = [(dataset, metric) for metric in names for dataset in datasets]
    for i, (ax, (dataset, metric)) in enumerate(zip(axes.flat, cells, strict=False)):
        _draw_panel(ax, table, runs, dataset, metric)
        if i < len(datasets):
            head_panel(ax, runs, dataset)
        tint(ax, any(run.stand_in(dataset) for run in runs if dataset in run.stats))
    for ax in list(axes.flat)[len(cells) :]:
        ax.set_visible(False)
    axes[0, 0].set_ylim(len(runs) - 0.4, -0.6)
    axes[0, 0].set_yticks(range(len(runs)), [clip(run.title, 34) for run in runs])
    notes += not_comparable(table, runs, datasets, names)
    lines = caption(table, runs, datasets, error="error bars: ±1 standard error of the mean (none where n = 1); small dots: single seeds")
    if table.baseline:
        band = "; band: ±1 standard error" if table.baseline.path else " figures (no standard errors known)"
        lines.insert(0, f"Dashed line: the baseline, {table.baseline.title}{band}.")
    return finish(fig, title, notes + lines)


def _draw_panel(ax: Axes, table: RunTable, runs: Sequence[Run], dataset: str, metric: str) -> None:
    look = looks(table)
    for y, run in enumerate(runs):
        stat = run.stats.get(dataset, {}).get(metric)
        if stat is None or stat.mean is None:
            ax.text(0.99, y, "null" if stat else "no value", transform=ax.get_yaxis_transform(), ha="right", va="center", fontsize=7, color=GREY)
            continue
        seeds = [v for v in stat.values.values() if v is not None]
        if len(seeds) > 1:
            ax.plot(seeds, np.full(len(seeds), y + 0.27), ".", color=GREY, markersize=3, zorder=2)
        kind = look[run.name]
        face = "white" if hollow(table, run, dataset, metric) else kind.color
        size = 9 if kind.marker == "*" else 5.5
        dot = {"fmt": kind.marker, "color": kind.color, "markerfacecolor": face, "markersize": size, "capsize": 3}
        ax.errorbar(stat.mean, y, xerr=stat.stderr, zorder=3, label=run.name, **dot)
    base = table.baseline.stats.get(dataset, {}).get(metric) if table.baseline else None
    if base and base.mean is not None:
        ax.axvline(base.mean, color=BASELINE_COLOUR, linestyle="--", linewidth=1, zorder=1)
        if base.stderr:
            ax.axvspan(base.mean - base.stderr, base.mean + base.stderr, color=BASELINE_COLOUR, alpha=0.1, linewidth=0, zorder=0)
    ax.set_xlabel(metric_label(table, metric))
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.margins(x=0.12)
    ax.tick_params(axis="y", length=0)
    _widen(ax)


def _widen(ax: Axes) -> None:
    """Rounding error must not fill a panel: the axis spans at least a hundredth of what it shows."""
    low, high = ax.get_xlim()
    least = max(abs(low), abs(high)) * 0.01
    least = least if least > 1e-12 else 1.0  # all zero, and the margins a rounding error around it
    if high - low < least:
        middle = (low + high) / 2
        ax.set_xlim(middle - least / 2, middle + least / 2)


def _mean(run: Run, dataset: str, metric: str) -> float | None:
    stat = run.stats.get(dataset, {}).get(metric)
    return stat.mean if stat else None
