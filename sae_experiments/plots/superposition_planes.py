"""Superposition: features of two hidden units in the plane, with the tree drawn through them."""

from __future__ import annotations

from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import row_caption
from sae_experiments.plots.selection import find_rows, limit
from sae_experiments.plots.style import GREY, MARKERS
from sae_experiments.results.table import Run, RunTable


class Plane(NamedTuple):
    """Features of a tree in the plane of two hidden units."""

    w: np.ndarray  # (2, features), columns of W
    parents: np.ndarray  # (features,), index of each parent; negative for the root

    @property
    def levels(self) -> np.ndarray:
        """Level of every feature in the tree, (features,), from 0 below the root."""
        levels = np.zeros(len(self.parents), int)
        for i, parent in enumerate(self.parents):
            levels[i] = 0 if parent < 0 else levels[parent] + 1
        return levels


Planes = dict[int, Plane]  # by depth of the tree


@styled
def draw(table: RunTable, *, title: str, max_depths: int, max_rows: int) -> Figure:
    """Draw a row of panels per run and dataset and a column per depth.

    A panel holds the columns of W (best instance, first seed), joined to those of their parents.

    Args:
        table: Runs.
        title: Title of the figure.
        max_depths: Maximum number of depths to draw.
        max_rows: Maximum number of rows to draw.

    Raises:
        NothingToDrawError: No run stored features of two hidden units.
    """
    notes: list[str] = []
    rows = find_rows(
        table, _planes, missing="no run has features of two hidden units (plane_<depth>)"
    )
    rows = limit(rows, max_rows, "panels' rows", notes)
    several_runs = len({row.run.name for row in rows}) > 1
    depths = sorted({depth for row in rows for depth in row.data})
    depths = limit(depths, max_depths, "depths", notes)
    drawn = [row.data[depth] for row in rows for depth in depths if depth in row.data]
    n_levels = max(int(plane.levels.max()) + 1 for plane in drawn)
    fig, axes = panels(len(rows), len(depths), width=2.1, height=1.7)
    for row, row_axes in zip(rows, axes, strict=True):
        for ax, depth in zip(row_axes, depths, strict=True):
            _draw_plane(ax, row.data.get(depth), n_levels)
        label = f"{row.run.title}\n{row.dataset}" if several_runs else row.dataset
        row_axes[0].set_ylabel(label, weight="bold")
    for ax, depth in zip(axes[0], depths, strict=True):
        ax.set_title(f"depth {depth}", weight="bold")
    handles = []
    for level in range(n_levels):
        color, marker = _level_style(level, n_levels)
        label = f"level {level + 1}"
        handles.append(Line2D([], [], linestyle="", color=color, marker=marker, label=label))
    notes.append(
        "A line joins a feature to its parent's, dashed from the origin where the parent is the "
        "root. Best instance of the first seed."
    )
    return finish(fig, title, notes + row_caption(rows), handles)


def _planes(run: Run, dataset: str) -> Planes | None:
    """The planes of the first seed that stored any."""
    for arrays in run.arrays(dataset).values():
        depths = [name.removeprefix("plane_") for name in arrays if name.startswith("plane_")]
        if depths:
            return {
                int(depth): Plane(arrays[f"plane_{depth}"][:2], arrays[f"parents_{depth}"])
                for depth in depths
            }
    return None


def _level_style(level: int, n_levels: int) -> tuple[Any, str]:
    """Colour and marker of a level."""
    color = mpl.colormaps["plasma"](0.85 * level / max(n_levels - 1, 1))
    return color, MARKERS[level % len(MARKERS)]


def _draw_plane(ax: Axes, plane: Plane | None, n_levels: int) -> None:
    """Draw features by level, with lines to their parents; hide the panel without any."""
    if plane is None:
        ax.set_axis_off()
        return
    w, parents = plane
    for i, parent in enumerate(parents):
        start, line = (w[:, parent], "-") if parent >= 0 else (np.zeros(2), "--")
        xs, ys = np.stack([start, w[:, i]], axis=1)
        ax.plot(xs, ys, color=GREY, linewidth=0.5, alpha=0.7, linestyle=line, zorder=1)
    levels = plane.levels
    for level in range(n_levels):
        color, marker = _level_style(level, n_levels)
        x, y = w[:, levels == level]
        order = 2 + n_levels - level  # upper levels lie above lower ones
        ax.scatter(x, y, s=max(26 - 4 * level, 7), color=color, marker=marker, zorder=order)
    limit_of_axes = 1.1 * max(float(np.abs(w).max()), 1e-3)
    ax.set_xlim(-limit_of_axes, limit_of_axes)
    ax.set_ylim(-limit_of_axes, limit_of_axes)
    ax.set_aspect("equal")
    ax.locator_params(nbins=3)
