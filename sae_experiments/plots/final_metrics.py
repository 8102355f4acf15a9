"""Final metrics of every run as dots with error bars, each panel against the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sae_experiments.plots.axes import head_panel
from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import OF_THE_MEAN, caption, hollow, not_comparable
from sae_experiments.plots.selection import choose_panels, find_panels, limit, mean_of
from sae_experiments.plots.style import BASELINE_COLOR, GREY, RunStyle, compared_with, run_styles
from sae_experiments.plots.text import clip, metric_label
from sae_experiments.results.table import Run, RunTable


@styled
def draw(
    table: RunTable,
    *,
    title: str,
    metrics: Sequence[str],
    max_metrics: int,
    max_runs: int,
    max_datasets: int,
) -> Figure:
    """Draw a panel per dataset and metric, with a line per run.

    A line holds the mean, one standard error and the single seeds as small dots. The baseline is a
    dashed line with its own standard error as a band; runs that must not be compared with it have
    hollow markers.

    Args:
        table: Runs.
        title: Title of the figure.
        metrics: Metrics to draw; if no run has any of them, the first shown metrics are drawn.
        max_metrics: Maximum number of metrics to draw.
        max_runs: Maximum number of runs to draw.
        max_datasets: Maximum number of datasets to draw.

    Raises:
        NothingToDrawError: No run has a metric with a value.
    """
    notes: list[str] = []
    chosen = _choose_metrics(table, metrics, max_metrics, notes)
    measured = find_panels(
        table,
        lambda run, dataset: _measured(run, dataset, chosen),
        missing="no run has a metric with a value",
    )
    runs, datasets = choose_panels(
        table,
        measured,
        max_runs=max_runs,
        max_datasets=max_datasets,
        notes=notes,
        rivals_only=True,
    )

    cells = [(dataset, metric) for metric in chosen for dataset in datasets]
    cols = len(datasets) if len(datasets) > 1 else min(3, len(chosen))
    line_height = 0.21 if len(runs) <= 8 else 0.17
    height = 0.75 + line_height * len(runs)
    fig, axes = panels(math.ceil(len(cells) / cols), cols, width=3.1, height=height, sharey=True)
    for i, (ax, (dataset, metric)) in enumerate(zip(axes.flat, cells, strict=False)):
        _draw_panel(ax, table, runs, dataset, metric)
        head_panel(ax, runs, dataset, title=i < len(datasets))
    for ax in axes.flat[len(cells) :]:
        ax.set_visible(False)
    axes[0, 0].set_ylim(len(runs) - 0.4, -0.6)
    axes[0, 0].set_yticks(range(len(runs)), [clip(run.title, 34) for run in runs])

    notes += not_comparable(table, runs, datasets, chosen)
    notes += _baseline_note(compared_with(table))
    error = f"{OF_THE_MEAN}; small dots: single seeds"
    return finish(fig, title, notes + caption(runs, datasets, error=error))


def _choose_metrics(
    table: RunTable, metrics: Sequence[str], max_metrics: int, notes: list[str]
) -> list[str]:
    known = [metric for metric in metrics if metric in table.metrics]
    if not known:
        known = [metric for metric in table.metrics if table.info(metric)["shown"]][:max_metrics]
    return limit(known, max_metrics, "metrics", notes)


def _measured(run: Run, dataset: str, metrics: Sequence[str]) -> list[str] | None:
    """The metrics with a value; None without any."""
    return [metric for metric in metrics if mean_of(run, dataset, metric)] or None


def _baseline_note(baseline: Run | None) -> list[str]:
    if baseline is None:
        return []
    band = "; band: ±1 standard error" if baseline.path else " figures (no standard errors known)"
    return [f"Dashed line: the baseline, {baseline.title}{band}."]


def _draw_panel(ax: Axes, table: RunTable, runs: Sequence[Run], dataset: str, metric: str) -> None:
    styles = run_styles(table)
    for y, run in enumerate(runs):
        is_hollow = hollow(table, run, dataset, metric)
        _draw_line(ax, y, run, dataset, metric, styles[run.name], is_hollow)
    baseline = compared_with(table)
    measured = mean_of(baseline, dataset, metric) if baseline else None
    if measured:
        value, stderr = measured
        ax.axvline(value, color=BASELINE_COLOR, linestyle="--", linewidth=1, zorder=1)
        if stderr:
            band = (value - stderr, value + stderr)
            ax.axvspan(*band, color=BASELINE_COLOR, alpha=0.1, linewidth=0, zorder=0)
    ax.set_xlabel(metric_label(table, metric))
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.margins(x=0.12)
    ax.tick_params(axis="y", length=0)
    _widen(ax)


def _draw_line(
    ax: Axes, y: int, run: Run, dataset: str, metric: str, style: RunStyle, is_hollow: bool
) -> None:
    """Draw mean, standard error and seeds of one run, or a word in their place."""
    stat = run.stats.get(dataset, {}).get(metric)
    if stat is None or stat.mean is None:
        text = "null" if stat else "no value"
        right = ax.get_yaxis_transform()
        ax.text(0.99, y, text, transform=right, ha="right", va="center", fontsize=7, color=GREY)
        return
    seeds = [value for value in stat.values.values() if value is not None]
    if len(seeds) > 1:
        ax.plot(seeds, np.full(len(seeds), y + 0.27), ".", color=GREY, markersize=3, zorder=2)
    ax.errorbar(
        stat.mean,
        y,
        xerr=stat.stderr,
        fmt=style.marker,
        color=style.color,
        markerfacecolor="white" if is_hollow else style.color,
        markersize=9 if style.marker == "*" else 5.5,
        capsize=3,
        zorder=3,
        label=run.name,
    )


def _widen(ax: Axes) -> None:
    """Widen an axis to a hundredth of its values, so that rounding errors do not fill a panel."""
    low, high = ax.dataLim.intervalx
    if low == high == 0:  # matplotlib would show rounding errors around it
        ax.set_xlim(-0.02, 1)
        return
    low, high = ax.get_xlim()
    least = max(abs(low), abs(high)) * 0.01
    if high - low < least:
        middle = (low + high) / 2
        ax.set_xlim(middle - least / 2, middle + least / 2)
