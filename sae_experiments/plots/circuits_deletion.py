"""Circuits: deletion curves, the share of a target that removing upstream latents takes away."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import row_caption
from sae_experiments.plots.selection import Arrays, find_rows, first_arrays, limit
from sae_experiments.plots.style import GREY, PALETTE, Line
from sae_experiments.results.table import RunTable


class Order(NamedTuple):
    """Style of an order in which latents are removed."""

    color: str
    line: Line
    label: str


ORDERS = {
    "attribution": Order(PALETTE[0], "-", "attribution"),
    "cosine": Order(PALETTE[1], "-", "cosine of weights"),
    "gated_cosine": Order(PALETTE[4], "--", "cosine, mean slopes"),
    "coactivation": Order(PALETTE[2], "-", "co-activation"),
    "activation": Order(PALETTE[3], "-.", "|activation|"),
    "random": Order(GREY, ":", "random active"),
}
#: Title of each column of panels, by the beginning of the arrays' names.
POOLS = {"": "at the target's position", "all_": "at all positions up to it"}


@styled
def draw(table: RunTable, *, title: str, max_rows: int) -> Figure:
    """Draw a row of panels per run and dataset, with 95 % bootstrap bands over prompts.

    Latents are removed at the target's position (left), or at all positions that it can depend on
    (right).

    Args:
        table: Runs.
        title: Title of the figure.
        max_rows: Maximum number of rows to draw.

    Raises:
        NothingToDrawError: No run stored deletion curves.
    """
    notes: list[str] = []
    rows = find_rows(
        table,
        first_arrays("deletion_counts", "deletion_attribution"),
        missing="no run has deletion curves (deletion_counts)",
    )
    rows = limit(rows, max_rows, "runs and datasets", notes)
    fig, axes = panels(len(rows), len(POOLS), width=3.6, height=2.3)
    for row, row_axes in zip(rows, axes, strict=True):
        for ax, pool in zip(row_axes, POOLS, strict=True):
            _draw_curves(ax, row.data, pool)
        label = f"{row.dataset}\nshare of A removed"
        row_axes[0].set_ylabel(f"{row.run.title}\n{label}" if len(rows) > 1 else label)
    for ax, pool_title in zip(axes[0], POOLS.values(), strict=True):
        ax.set_title(pool_title, weight="bold")
    for ax in axes[-1]:
        ax.set_xlabel("upstream latents removed")
    handles = []
    for name, (color, line, label) in ORDERS.items():
        if any(f"{pool}deletion_{name}" in row.data for row in rows for pool in POOLS):
            handles.append(Line2D([], [], color=color, linestyle=line, label=label))
    notes.append(
        "A: pre-activation of the downstream latent; shares are ratios of sums over targets. "
        "First seed."
    )
    lines = notes + row_caption(rows, error="bands: 95 % bootstrap over prompts")
    return finish(fig, title, lines, handles)


def _draw_curves(ax: Axes, arrays: Arrays, pool: str) -> None:
    """Draw the curve of every order over the number of latents removed, with its band."""
    counts = arrays[f"{pool}deletion_counts"]
    for name, (color, line, _) in ORDERS.items():
        curve = arrays.get(f"{pool}deletion_{name}")
        if curve is None:
            continue
        mean, low, high = curve
        ax.plot(counts, mean, color=color, linestyle=line, marker="o", markersize=2.5)
        if np.isfinite([low, high]).all():
            ax.fill_between(counts, low, high, color=color, alpha=0.15, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(counts.tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))
    ax.axhline(0, color=GREY, linewidth=0.6)
