"""Superposition: loss over hidden size per depth, and the smallest hidden size that is enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sae_experiments.plots.axes import head_panel
from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import caption
from sae_experiments.plots.selection import Arrays, choose_panels, find_panels, mean_of
from sae_experiments.plots.style import ALARM, GREY, MARKERS, run_styles
from sae_experiments.plots.superposition_loss import FLOOR, NO_SWEEP, Grid, loss_grid, sweep_arrays
from sae_experiments.results.table import Run, RunTable

DepthStyles = dict[int, tuple[Any, str]]  # colour and marker of each depth


class Smallest(NamedTuple):
    """Smallest hidden size that holds a tree of some depth."""

    depth: int
    size: float | None  # mean over the seeds that reach the threshold; None if none does
    largest: int  # largest size in the sweep


@styled
def draw_lines(table: RunTable, *, title: str, max_runs: int, max_datasets: int) -> Figure:
    """Draw a row of panels per run and a column per dataset, with a line per depth.

    Solid lines are the best instance, dotted lines the mean over the instances.

    Args:
        table: Runs.
        title: Title of the figure.
        max_runs: Maximum number of runs to draw.
        max_datasets: Maximum number of datasets to draw.

    Raises:
        NothingToDrawError: No run has a sweep over depth and hidden size.
    """
    notes: list[str] = []
    sweeps = find_panels(table, lambda run, dataset: sweep_arrays(run, dataset) or None, NO_SWEEP)
    runs, datasets = choose_panels(
        table, sweeps, max_runs=max_runs, max_datasets=max_datasets, notes=notes
    )
    keys = [(run.name, dataset) for run in runs for dataset in datasets]
    styles = _depth_styles([sweeps[key] for key in keys if key in sweeps])
    fig, axes = panels(len(runs), len(datasets), width=3.6, height=2.6, sharex=True, sharey=True)
    for row, run in enumerate(runs):
        for ax, dataset in zip(axes[row], datasets, strict=True):
            if row == 0:
                head_panel(ax, runs, dataset)
            if (run.name, dataset) in sweeps:
                _draw_depths(ax, sweeps[run.name, dataset], styles)
            ax.set_yscale("log")
        axes[row, 0].set_ylabel(f"{run.title}\nloss" if len(runs) > 1 else "loss")
    for ax in axes[-1]:
        ax.set_xlabel("hidden units")
    notes.append("Dashed: the threshold below which a tree counts as solved.")
    lines = notes + caption(runs, datasets, error="mean over seeds")
    return finish(fig, title, lines, _line_handles(styles))


def _depth_styles(sweeps: Sequence[Sequence[Arrays]]) -> DepthStyles:
    depths = {int(d) for seeds in sweeps for arrays in seeds for d in arrays["depth"]}
    colors = mpl.colormaps["viridis"]
    last = max(len(depths) - 1, 1)
    return {
        depth: (colors(0.92 * i / last), MARKERS[i % len(MARKERS)])
        for i, depth in enumerate(sorted(depths))
    }


def _draw_depths(ax: Axes, seeds: Sequence[Arrays], styles: DepthStyles) -> None:
    """Draw best and mean loss over the hidden size of every depth, and the threshold."""
    first = seeds[0]
    for depth, (color, marker) in styles.items():
        of_depth = first["depth"] == depth
        sizes = first["hidden"][of_depth]
        losses = [a["loss"][of_depth] for a in seeds if len(a["loss"]) == len(of_depth)]
        best = np.mean([loss.min(axis=1) for loss in losses], axis=0)
        mean = np.mean([loss.mean(axis=1) for loss in losses], axis=0)
        ax.plot(sizes, np.maximum(best, FLOOR), "-", color=color, marker=marker, markersize=4)
        ax.plot(sizes, np.maximum(mean, FLOOR), ":", color=color, marker="", markersize=4)
    ax.axhline(float(first["threshold"]), color=GREY, linewidth=0.8, linestyle="--")


def _line_handles(styles: DepthStyles) -> list[Line2D]:
    handles = []
    for depth, (color, marker) in styles.items():
        label = f"depth {depth}"
        handles.append(Line2D([], [], color=color, marker=marker, markersize=4, label=label))
    handles.append(Line2D([], [], color="black", label="best instance"))
    handles.append(Line2D([], [], color="black", linestyle=":", label="mean of instances"))
    return handles


@styled
def draw_smallest(table: RunTable, *, title: str, max_runs: int, max_datasets: int) -> Figure:
    """Draw bars of the smallest hidden size at which the best instance is below the threshold.

    A hatched bar up to the largest size of the sweep means that no size reaches it.

    Args:
        table: Runs.
        title: Title of the figure.
        max_runs: Maximum number of runs to draw.
        max_datasets: Maximum number of datasets to draw.

    Raises:
        NothingToDrawError: No run has a sweep over depth and hidden size.
    """
    notes: list[str] = []
    grids = find_panels(table, loss_grid, NO_SWEEP)
    runs, datasets = choose_panels(
        table, grids, max_runs=max_runs, max_datasets=max_datasets, notes=notes
    )
    keys = [(run.name, dataset) for run in runs for dataset in datasets]
    largest = max(int(grids[key].hidden.max()) for key in keys if key in grids)
    styles = run_styles(table)
    fig, axes = panels(1, len(datasets), width=3.8, height=2.6, sharey=True)
    width = 0.8 / len(runs)
    for ax, dataset in zip(axes[0], datasets, strict=True):
        head_panel(ax, runs, dataset)
        depths: set[int] = set()
        for i, run in enumerate(runs):
            shift = (i - (len(runs) - 1) / 2) * width
            for smallest in _smallest(run, dataset, grids.get((run.name, dataset))):
                rotation = 90 if len(runs) > 2 else 0
                color = styles[run.name].color
                _draw_bar(ax, smallest, shift, width, color, rotation)
                depths.add(smallest.depth)
        ax.set_xlabel("depth")
        ax.grid(visible=False, axis="x")
        ax.set_xticks(sorted(depths))
    axes[0, 0].set_ylim(0, largest + 1.8)
    axes[0, 0].set_ylabel("smallest hidden size")
    handles = [Patch(color=styles[run.name].color, label=run.title) for run in runs]
    handles.append(Patch(fill=False, edgecolor=ALARM, hatch="///", label="none reaches it"))
    notes.append(
        f"Threshold of the loss: {', '.join(_thresholds(runs, datasets))}, for the best instance; "
        "mean over the seeds that reach it."
    )
    return finish(fig, title, notes + caption(runs, datasets), handles)


def _smallest(run: Run, dataset: str, grid: Grid | None) -> list[Smallest]:
    """The smallest hidden size of every depth in a sweep."""
    if grid is None:
        return []
    rows = []
    for depth, losses in zip(grid.depths, grid.values, strict=True):
        mean = mean_of(run, dataset, f"smallest_hidden_depth_{depth}")
        largest = int(grid.hidden[np.isfinite(losses)].max())
        rows.append(Smallest(int(depth), mean.value if mean else None, largest))
    return rows


def _draw_bar(
    ax: Axes, smallest: Smallest, shift: float, width: float, color: str, rotation: int
) -> None:
    """Draw the bar of one run and depth, with its size, or hatched with the word "none"."""
    x = smallest.depth + shift
    text: Any = {"ha": "center", "va": "bottom", "fontsize": 7}
    if smallest.size is None:
        hatched: Any = {"fill": False, "edgecolor": ALARM, "hatch": "///", "linewidth": 0.6}
        ax.bar(x, smallest.largest, 0.9 * width, alpha=0.6, **hatched)
        ax.text(x, smallest.largest + 0.2, "none", color=ALARM, rotation=rotation, **text)
    else:
        ax.bar(x, smallest.size, 0.9 * width, color=color)
        ax.text(x, smallest.size + 0.2, f"{smallest.size:g}", **text)


def _thresholds(runs: Sequence[Run], datasets: Sequence[str]) -> list[str]:
    """The thresholds of the loss, as numbers in the caption."""
    cells = [arrays for run in runs for d in datasets for arrays in run.arrays(d).values()]
    return sorted({f"{float(cell['threshold']):g}" for cell in cells if "threshold" in cell})
