"""Sparsity against fidelity: L0 against reconstruction and the language model's loss, per run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sae_experiments.plots.axes import head_panel, plain_log
from sae_experiments.plots.base import NothingToDrawError, finish, panels, styled
from sae_experiments.plots.captions import OF_THE_MEAN, caption, hollow, not_comparable
from sae_experiments.plots.selection import limit, mean_of
from sae_experiments.plots.style import (
    GREY,
    RunStyle,
    compared_with,
    run_handle,
    run_styles,
    variant_styles,
)
from sae_experiments.plots.text import clip, metric_label
from sae_experiments.results.table import Run, RunTable

JOIN_FROM = 1.3  # runs of a variant are joined by a line if their L0 differ by this factor
VariantRuns = dict[str, list[Run]]


class Point(NamedTuple):
    """One run in a panel: means and standard errors over seeds."""

    x: float
    y: float
    x_error: float | None
    y_error: float | None
    hollow: bool  # must not be compared with the baseline


PanelPoints = dict[str, Point]  # by name of the run
Points = dict[tuple[str, str], PanelPoints]  # by dataset and metric


@styled
def draw(
    table: RunTable,
    *,
    title: str,
    x: str,
    y: Sequence[str],
    group_by: Sequence[str],
    max_legend: int,
    max_datasets: int,
) -> Figure:
    """Draw a row of panels per metric of `y` and a column per dataset, with error bars over seeds.

    Args:
        table: Runs.
        title: Title of the figure.
        x: Metric of the horizontal axis, which is logarithmic.
        y: Metrics of the vertical axes.
        group_by: Configuration keys that name the variant; the first that a run has counts. Runs
            of one variant are joined by a line.
        max_legend: Number of runs beyond which colours and legend stand for variants.
        max_datasets: Maximum number of datasets to draw.

    Raises:
        NothingToDrawError: No run has `x` above 0 together with a metric of `y`.
    """
    notes: list[str] = []
    points = _points(table, x, y)
    if not points:
        raise NothingToDrawError(f"no run has {x} (above 0) together with {' or '.join(y)}")
    with_points = set().union(*points.values())
    runs = [run for run in table.runs if run.name in with_points]
    datasets = table.with_rivals(sorted({dataset for dataset, _ in points}))
    datasets = limit(datasets, max_datasets, "datasets", notes)
    measured = {metric for dataset, metric in points if dataset in datasets}
    metrics = [metric for metric in y if metric in measured]

    variants = _group_runs(runs, group_by)
    styles = run_styles(table)
    handles = [run_handle(run, styles[run.name], line=False) for run in runs]
    if len(runs) > max_legend and len(variants) < len(runs):
        styles |= _variant_styles(table, variants)
        handles = _variant_handles(table, variants, styles)

    fig, axes = panels(len(metrics), len(datasets), width=3.6, height=2.7, sharex="col")
    joined = False
    for row, metric in enumerate(metrics):
        for ax, dataset in zip(axes[row], datasets, strict=True):
            head_panel(ax, runs, dataset, title=row == 0)
            shown = points.get((dataset, metric), {})
            joined |= _draw_panel(ax, shown, variants.values(), styles, compared_with(table))
        axes[row, 0].set_ylabel(metric_label(table, metric))
    _x_axes(axes[-1], datasets, points, f"{metric_label(table, x, direction=False)}, logarithmic")
    if joined:
        notes.append("Lines join runs of the same variant.")
    notes += not_comparable(table, runs, datasets, [x, *metrics])
    return finish(fig, title, notes + caption(runs, datasets, error=OF_THE_MEAN), handles)


def _points(table: RunTable, x: str, y: Sequence[str]) -> Points:
    """The points of all runs that have both metrics and `x` above 0."""
    points: Points = {}
    for run in table.runs:
        for dataset in run.stats:
            x_mean = mean_of(run, dataset, x)
            if x_mean is None or x_mean.value <= 0:
                continue
            for metric in y:
                y_mean = mean_of(run, dataset, metric)
                if y_mean is None:
                    continue
                is_hollow = hollow(table, run, dataset, x, metric)
                point = Point(x_mean.value, y_mean.value, x_mean.stderr, y_mean.stderr, is_hollow)
                points.setdefault((dataset, metric), {})[run.name] = point
    return points


def _group_runs(runs: Sequence[Run], keys: Sequence[str]) -> VariantRuns:
    variants: VariantRuns = {}
    for run in runs:
        variants.setdefault(_variant(run, keys), []).append(run)
    return variants


def _variant(run: Run, keys: Sequence[str]) -> str:
    """The first configuration value at one of `keys`; the name of a run without any."""
    for key in keys:
        value = run.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, (str, int)):
            return str(value)
    return run.name


def _variant_styles(table: RunTable, variants: VariantRuns) -> dict[str, RunStyle]:
    """One style for all runs of a variant; the baseline keeps its own."""
    baseline = compared_with(table)
    rivals = [[run for run in members if run is not baseline] for members in variants.values()]
    of_first = variant_styles([members[0] for members in rivals if members])
    return {
        run.name: of_first[members[0].name]._replace(line="-")
        for members in rivals
        for run in members
    }


def _variant_handles(
    table: RunTable, variants: VariantRuns, styles: dict[str, RunStyle]
) -> list[Line2D]:
    """A legend entry for the baseline, if it is drawn, then one for each variant."""
    handles = []
    baseline = compared_with(table)
    for name, members in variants.items():
        others = [run for run in members if run is not baseline]
        if others:
            color, marker, _ = styles[others[0].name]
            label = clip(name.rsplit(".", 1)[-1])
            handles.append(
                Line2D([], [], color=color, marker=marker, markersize=6, linewidth=1, label=label)
            )
        if len(others) < len(members) and baseline is not None:
            handles.insert(0, run_handle(baseline, styles[baseline.name], line=False))
    return handles


def _draw_panel(
    ax: Axes,
    points: PanelPoints,
    variants: Iterable[Sequence[Run]],
    styles: dict[str, RunStyle],
    baseline: Run | None,
) -> bool:
    """Draw the points of a panel; returns True if lines join any of them."""
    joined = False
    for members in variants:
        shown = [run.name for run in members if run.name in points]
        shown.sort(key=lambda name: points[name].x)
        curve = [points[name] for name in shown]
        if len(curve) > 1 and curve[-1].x > JOIN_FROM * curve[0].x:
            joined = True
            colors = {styles[run.name].color for run in members if run is not baseline}
            _join(ax, curve, colors.pop() if len(colors) == 1 else GREY)
        for name in shown:
            _draw_point(ax, name, points[name], styles[name])
    means = [point.y for point in points.values()]
    if means and 0 < 3 * min(means) < max(means):
        plain_log(ax, "y", min(means), max(means))
    elif len(means) == 1 and means[0] > 0:  # nothing to compare with but zero
        ax.set_ylim(0, 1.4 * means[0])
    return joined


def _join(ax: Axes, curve: Sequence[Point], color: str) -> None:
    xs = [point.x for point in curve]
    ys = [point.y for point in curve]
    ax.plot(xs, ys, color=color, linewidth=1, alpha=0.6, zorder=1)


def _draw_point(ax: Axes, name: str, point: Point, style: RunStyle) -> None:
    x_bars = None
    if point.x_error:
        left = min(point.x_error, 0.99 * point.x)  # a bar cannot reach 0 on a logarithmic axis
        x_bars = [[left], [point.x_error]]
    ax.errorbar(
        point.x,
        point.y,
        xerr=x_bars,
        yerr=point.y_error,
        fmt=style.marker,
        color=style.color,
        markerfacecolor="white" if point.hollow else style.color,
        markersize=10 if style.marker == "*" else 6,
        label=name,
        zorder=3,
        capsize=2.5,
        elinewidth=1,
    )


def _x_axes(bottom: Sequence[Axes], datasets: Sequence[str], points: Points, label: str) -> None:
    """Scale and label the horizontal axes, each of which a column of panels shares."""
    for ax, dataset in zip(bottom, datasets, strict=True):
        panels_above = [panel for (of, _), panel in points.items() if of == dataset]
        means = [point.x for panel in panels_above for point in panel.values()]
        plain_log(ax, "x", min(means), max(means))
        ax.set_xlabel(label)
