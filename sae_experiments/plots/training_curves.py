"""Curves over training steps: a row of panels per curve, a column per dataset, a line per run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sae_experiments.plots.axes import center_text, head_panel, plain_log
from sae_experiments.plots.base import NothingToDrawError, finish, panels, styled
from sae_experiments.plots.captions import caption
from sae_experiments.plots.selection import limit
from sae_experiments.plots.style import RunStyle, run_handle, run_styles
from sae_experiments.plots.text import clip, percent
from sae_experiments.results.notes import short_list
from sae_experiments.results.table import Run, RunTable

COLUMNS_ALONE = 3  # columns of the grid of panels where there is one dataset


@styled
def draw(
    table: RunTable,
    *,
    title: str,
    curves: Mapping[str, str],
    log_y: Sequence[str],
    skip_frac: float,
    max_rows: int,
    max_runs: int,
    max_datasets: int,
) -> Figure:
    """Draw logged curves: mean over seeds, with a band of one standard error from two seeds on.

    Curves of one label share a row; if two of them have a value for the same step, that of the one
    listed first counts. Runs whose curves are all the same (one language model shared by many SAEs)
    are drawn once, under a common name.

    Args:
        table: Runs.
        title: Title of the figure.
        curves: Label of each curve by its name, or by a pattern such as `sae/*`. A curve that only
            a pattern matches is labelled by its name.
        log_y: Names of the curves with a logarithmic axis.
        skip_frac: Fraction of the steps that linear axes leave out when they choose their limits,
            as the first steep fall would flatten everything else.
        max_rows: Maximum number of rows to draw.
        max_runs: Maximum number of runs to draw.
        max_datasets: Maximum number of datasets to draw.

    Raises:
        NothingToDrawError: No run has any of the curves.
    """
    notes: list[str] = []
    runs = [run for run in table.runs if _matches_any(run, curves)]
    runs = limit(runs, max_runs, "runs", notes)
    if not runs:
        raise NothingToDrawError(f"no run has curves named {', '.join(curves)}")
    logged = pd.concat([run.curves for run in runs])
    labels = _labels(curves, set(logged["name"]))
    rows = limit(list(dict.fromkeys(labels.values())), max_rows, "curves", notes)
    shown = {name: label for name, label in labels.items() if label in rows}
    drawn = {run.name: _labelled(run.curves, shown) for run in runs}
    datasets = sorted(set(logged.loc[logged["name"].isin(list(shown)), "dataset"]))
    datasets = limit(table.with_rivals(datasets), max_datasets, "datasets", notes)

    log_labels = set(map(labels.get, log_y))
    groups = _group_identical(runs, drawn)
    styles = run_styles(table)
    fig, axes = _panels(len(rows), len(datasets))
    for row, label in enumerate(rows):
        for ax, dataset in zip(axes[row], datasets, strict=True):
            for first, *_ in groups:
                _draw_curve(ax, drawn[first.name], dataset, label, styles[first.name])
            _fit_y_axis(ax, log=label in log_labels, skip_frac=skip_frac)
            _fit_x_axis(ax)
            head_panel(ax, runs, dataset, title=row == 0)
        axes[row, 0].set_ylabel(label)
    _label_steps(fig)
    handles = [_group_handle(group, styles[group[0].name]) for group in groups]
    if skip_frac:
        notes.append(f"The axes fit what comes after the first {percent(skip_frac)} of the steps.")
    error = "line: mean over seeds, band: ±1 standard error (none where n = 1)"
    return finish(fig, title, notes + caption(runs, datasets, error=error), handles)


def _panels(n_rows: int, n_datasets: int) -> tuple[Figure, np.ndarray]:
    """A figure and its panels by curve and dataset; those of one dataset fill a grid."""
    if n_datasets > 1:
        return panels(n_rows, n_datasets, width=3.7, height=1.85, sharex="col")
    columns = min(n_rows, COLUMNS_ALONE)
    fig, axes = panels(-(-n_rows // columns), columns, width=3.3, height=1.85)
    for ax in axes.flat[n_rows:]:
        ax.remove()
    return fig, axes.flat[:n_rows].reshape(n_rows, 1)


def _label_steps(fig: Figure) -> None:
    """Name the horizontal axis below the last panel of every column."""
    lowest: dict[int, Axes] = {}
    for ax in fig.axes:
        place = ax.get_subplotspec()
        if place is not None:
            lowest[place.colspan.start] = ax
    for ax in lowest.values():
        ax.set_xlabel("step")


def _matches_any(run: Run, curves: Mapping[str, str]) -> bool:
    """True if a run logged a curve that a name or pattern matches."""
    names = run.curves["name"].unique()
    return any(fnmatch(name, pattern) for name in names for pattern in curves)


def _labels(curves: Mapping[str, str], logged: set[str]) -> dict[str, str]:
    """Label of every logged curve by name; those that only a pattern matches come last."""
    labels = {name: label for name, label in curves.items() if name in logged}
    for pattern in curves:
        for name in sorted(logged):
            if name not in labels and fnmatch(name, pattern):
                labels[name] = name
    return labels


def _labelled(points: pd.DataFrame, labels: Mapping[str, str]) -> pd.DataFrame:
    """The points of the curves in `labels` under their labels.

    For each dataset, seed, step and label, only the point of the curve listed first is kept.
    """
    order = {name: i for i, name in enumerate(labels)}
    chosen: pd.DataFrame = points.loc[points["name"].isin(list(labels))]
    chosen = chosen.assign(order=chosen["name"].map(order), name=chosen["name"].map(dict(labels)))
    chosen = chosen.sort_values("order", kind="stable").drop(columns="order")
    return chosen.drop_duplicates(["dataset", "seed", "step", "name"])


def _group_identical(runs: Sequence[Run], drawn: Mapping[str, pd.DataFrame]) -> list[list[Run]]:
    """Runs with identical curves, together."""
    groups: dict[bytes, list[Run]] = {}
    for run in runs:
        content = drawn[run.name].to_csv(index=False).encode()
        groups.setdefault(hashlib.sha256(content).digest(), []).append(run)
    return list(groups.values())


def _group_handle(runs: Sequence[Run], style: RunStyle) -> Line2D:
    """Legend entry of runs with identical curves."""
    handle = run_handle(runs[0], style, line=True)
    if len(runs) > 1:
        names = short_list([clip(run.name, 20) for run in runs], 2)
        handle.set_label(f"{names}: the same curves")
    return handle


def _draw_curve(ax: Axes, points: pd.DataFrame, dataset: str, label: str, style: RunStyle) -> None:
    """Draw the mean over seeds of one curve, and its standard error where it is known."""
    chosen = points[(points["dataset"] == dataset) & (points["name"] == label)]
    if chosen.empty:
        return
    by_step = chosen.groupby("step")["value"].agg(["mean", "std", "count"])
    steps = np.asarray(by_step.index, float)
    mean = np.asarray(by_step["mean"], float)
    error = np.asarray(by_step["std"], float) / np.sqrt(np.asarray(by_step["count"], float))
    marker = style.marker if len(steps) == 1 else None  # a line through one point is invisible
    ax.plot(steps, mean, color=style.color, linestyle=style.line, marker=marker, label=label)
    if np.isfinite(error).any():
        band = (mean - error, mean + error)
        ax.fill_between(steps, *band, color=style.color, alpha=0.2, linewidth=0)


def _fit_y_axis(ax: Axes, *, log: bool, skip_frac: float) -> None:
    """Choose scale and limits of the vertical axis from the curves in the panel."""
    if not ax.lines:
        ax.set_yticks([])
        center_text(ax, "not logged", "#999999")
        return
    steps = np.concatenate([np.asarray(line.get_xdata(), float) for line in ax.lines])
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines])
    late = values[steps >= skip_frac * steps.max(initial=0)]
    low, high = values.min(), values.max()
    if log and low > 0:
        plain_log(ax, "y", low, high, least=2)
    elif skip_frac and len(late) and late.min() < high:
        pad = 0.06 * (late.max() - late.min()) or 0.05 * abs(late.max()) or 1.0
        ax.set_ylim(late.min() - pad, late.max() + pad)
    elif low == high == 0:
        ax.set_ylim(-0.02, 1)  # around a line of zeros, matplotlib shows rounding errors


def _fit_x_axis(ax: Axes) -> None:
    ax.margins(x=0.02)
    ax.ticklabel_format(axis="x", style="plain")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
