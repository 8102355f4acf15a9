"""What sparsity costs: L0 against reconstruction and against the language model's loss, a marker for each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sae_experiments.plots.base import (
    GREY,
    MARKERS,
    PALETTE,
    Look,
    NothingToDrawError,
    caption,
    clip,
    finish,
    handle,
    head_panel,
    hollow,
    limit,
    looks,
    metric_label,
    not_comparable,
    panels,
    plain_log,
    styled,
    tint,
)
from sae_experiments.results.table import Run, RunTable


class Point(NamedTuple):
    """A run on a panel: means and standard errors."""

    x: float
    y: float
    x_error: float | None
    y_error: float | None


@styled
def draw(table: RunTable, *, title: str, x: str, y: Sequence[str], group_by: Sequence[str], max_legend: int, max_datasets: int) -> Figure:
    """A row for each metric of ``y``, a column for each dataset, ``x`` on a logarithmic axis; error bars over seeds on both.

    Runs with the same configuration value at the first of the keys ``group_by`` that they have (the variant) are joined by a line.
    Beyond ``max_legend`` runs the variants get the colours and the legend.
    """
    notes: list[str] = []
    table = table.by_arm
    runs = [run for run in table.runs if any(_point(run, d, x, metric) for d in run.stats for metric in y)]
    having = [d for d in table.datasets if any(_point(run, d, x, metric) for run in runs for metric in y)]
    datasets = limit(table.with_rivals(having), max_datasets, "datasets", notes)
    metrics = [metric for metric in y if any(_point(run, d, x, metric) for run in runs for d in datasets)]
    if not datasets:
        raise NothingToDrawError(f"no run has {x} (above 0) together with {' or '.join(y)}")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_variant(run, group_by), []).append(run)
    by_variant = len(runs) > max_legend and len(groups) < len(runs)
    look = looks(table) | (_variant_looks(table, groups) if by_variant else {})
    fig, axes = panels(len(metrics), len(datasets), width=3.6, height=2.7, sharex="col")
    joined = False
    for row, metric in enumerate(metrics):
        for column, dataset in enumerate(datasets):
            ax = axes[row, column]
            for members in groups.values():
                joined |= _draw_group(ax, table, members, dataset, x, metric, look)
            ax.set_ylabel(metric_label(table, metric) if column == 0 else "")
            means = [found.y for run in runs if (found := _point(run, dataset, x, metric))]
            if means and 0 < 3 * min(means) < max(means):
                plain_log(ax, "y", min(means), max(means))
            if row == 0:
                head_panel(ax, runs, dataset)
            tint(ax, any(run.stand_in(dataset) for run in runs))
    _x_axes(axes[-1], runs, datasets, x, metrics, metric_label(table, x, direction=False))
    handles = _variant_handles(table, groups, look) if by_variant else [handle(run, look[run.name], line=False) for run in runs]
    notes += ["Lines join runs of the same variant."] if joined else []
    notes += not_comparable(table, runs, datasets, [x, *metrics])
    return finish(fig, title, notes + caption(table, runs, datasets, error="error bars: ±1 standard error of the mean (none where n = 1)"), handles)


def _point(run: Run, dataset: str, x: str, y: str) -> Point | None:
    stats = run.stats.get(dataset, {})
    a, b = stats.get(x), stats.get(y)
    if a is None or b is None or a.mean is None or b.mean is None or a.mean <= 0:
        return None
    return Point(a.mean, b.mean, a.stderr, b.stderr)


def _variant(run: Run, keys: Sequence[str]) -> str:
    for key in keys:
        value = run.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, (str, int)):
            return str(value)
    return run.name


def _variant_looks(table: RunTable, groups: dict[str, list[Run]]) -> dict[str, Look]:
    """One look for all runs of a variant; the baseline keeps its own."""
    kinds = [Look(PALETTE[i % 8], MARKERS[(i + i // 8) % 8], "-") for i in range(len(groups))]
    return {run.name: kind for kind, members in zip(kinds, groups.values(), strict=True) for run in members if run is not table.baseline}


def _draw_group(ax: Axes, table: RunTable, members: Sequence[Run], dataset: str, x: str, metric: str, look: dict[str, Look]) -> bool:
    """The runs of a variant; returns whether a line joins them, which runs at one L0 do not deserve."""
    found = [(point, run) for run in members if (point := _point(run, dataset, x, metric))]
    points = sorted(found, key=lambda pair: pair[0].x)
    joined = len(points) > 1 and points[-1][0].x > 1.3 * points[0][0].x
    if joined:
        colors = {look[run.name].color for run in members if run is not table.baseline}
        color = colors.pop() if len(colors) == 1 else GREY
        ax.plot([point.x for point, _ in points], [point.y for point, _ in points], color=color, linewidth=1, alpha=0.6, zorder=1)
    for point, run in points:
        kind = look[run.name]
        right = point.x_error
        left = min(right, 0.99 * point.x) if right else None  # a bar cannot reach 0 on a logarithmic axis
        size = 10 if kind.marker == "*" else 6
        face = "white" if hollow(table, run, dataset, x, metric) else kind.color
        bars: dict[str, Any] = {"xerr": [[left], [right]] if right else None, "yerr": point.y_error, "capsize": 2.5, "elinewidth": 1}
        ax.errorbar(point.x, point.y, fmt=kind.marker, color=kind.color, markerfacecolor=face, markersize=size, label=run.name, zorder=3, **bars)
    return joined


def _x_axes(bottom: Sequence[Axes], runs: Sequence[Run], datasets: Sequence[str], x: str, metrics: Sequence[str], label: str) -> None:
    for ax, dataset in zip(bottom, datasets, strict=True):
        means = [found.x for run in runs for metric in metrics if (found := _point(run, dataset, x, metric))]
        plain_log(ax, "x", min(means), max(means))
        ax.set_xlabel(f"{label}, logarithmic")


def _variant_handles(table: RunTable, groups: dict[str, list[Run]], look: dict[str, Look]) -> list[Line2D]:
    """One entry for each variant, after one for the baseline."""
    found = [handle(run, look[run.name], line=False) for members in groups.values() for run in members if run is table.baseline]
    for name, members in groups.items():
        others = [look[run.name] for run in members if run is not table.baseline]
        for kind in others[:1]:
            found.append(Line2D([], [], color=kind.color, marker=kind.marker, markersize=6, linewidth=1, label=clip(name.rsplit(".", 1)[-1])))
    return found
