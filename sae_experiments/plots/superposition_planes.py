"""Superposition: the features of two hidden units in the plane, with the tree drawn through them."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sae_experiments.plots.base import (
    GREY,
    MARKERS,
    NothingToDrawError,
    caption,
    finish,
    limit,
    panels,
    styled,
)
from sae_experiments.results.table import Run, RunTable


@styled
def draw(table: RunTable, *, title: str, max_depths: int, max_rows: int) -> Figure:
    """A row for each run and dataset, a column for each depth: columns of W (best instance of the first seed), joined to their parents'."""
    notes: list[str] = []
    rows = [(run, d, planes) for run in table.runs for d in sorted(run.stats) if (planes := _planes(run, d))]
    rows = limit(rows, max_rows, "panels' rows", notes)
    if not rows:
        raise NothingToDrawError("no run has features of two hidden units (plane_<depth>)")
    depths = limit(sorted({depth for _, _, planes in rows for depth in planes}), max_depths, "depths", notes)
    fig, axes = panels(len(rows), len(depths), width=2.1, height=1.7)
    levels = max(int(_levels(planes[d][1]).max()) + 1 for _, _, planes in rows for d in depths if d in planes)
    for row, (run, dataset, planes) in enumerate(rows):
        for ax, depth in zip(axes[row], depths, strict=True):
            if depth not in planes:
                ax.set_axis_off()
                continue
            _panel(ax, *planes[depth], levels)
            if row == 0:
                ax.set_title(f"depth {depth}", weight="bold")
        axes[row, 0].set_ylabel(f"{run.title}\n{dataset}" if len({r.name for r, _, _ in rows}) > 1 else dataset, weight="bold")
    handles = [Line2D([], [], linestyle="", color=_colour(i, levels), marker=MARKERS[i % 8], label=f"level {i + 1}") for i in range(levels)]
    notes += ["A line joins a feature to its parent's, dashed from the origin where the parent is the root. Best instance of the first seed."]
    return finish(fig, title, notes + caption(table, list({run.name: run for run, _, _ in rows}.values()), sorted({d for _, d, _ in rows})), handles)


def _planes(run: Run, dataset: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """W (2, F) and parents (F,) by depth, of the first seed that has them."""
    for arrays in run.arrays(dataset).values():
        names = [name for name in arrays if name.startswith("plane_")]
        if names:
            return {int(name[6:]): (arrays[name][:2], arrays[f"parents_{name[6:]}"]) for name in names}
    return {}


def _colour(level: int, levels: int) -> tuple[float, ...]:
    return mpl.colormaps["plasma"](0.85 * level / max(levels - 1, 1))


def _levels(parents: np.ndarray) -> np.ndarray:
    """Level (F,) of every feature, from 0 below the root."""
    level = np.zeros(len(parents), int)
    for i, parent in enumerate(parents):
        level[i] = 0 if parent < 0 else level[parent] + 1
    return level


def _panel(ax: Axes, w: np.ndarray, parents: np.ndarray, levels: int) -> None:
    level = _levels(parents)
    for i, parent in enumerate(parents):
        start = w[:, parent] if parent >= 0 else np.zeros(2)
        ax.plot([start[0], w[0, i]], [start[1], w[1, i]], color=GREY, linewidth=0.5, alpha=0.7, linestyle="-" if parent >= 0 else "--", zorder=1)
    for i in range(levels):
        chosen = level == i
        ax.scatter(w[0, chosen], w[1, chosen], s=max(26 - 4 * i, 7), color=_colour(i, levels), marker=MARKERS[i % 8], zorder=2 + levels - i)
    reach = 1.1 * max(float(np.abs(w).max()), 1e-3)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    ax.locator_params(nbins=3)
