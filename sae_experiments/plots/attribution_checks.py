"""Attribution graphs checked by interventions: deletion curves, predicted and measured effects."""

from __future__ import annotations

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

#: Colour, line and label of each order in which latents are removed.
ORDERS: dict[str, tuple[str, Line, str]] = {
    "influence": (PALETTE[0], "-", "influence"),
    "direct": (PALETTE[1], "--", "direct edge"),
    "activation": (PALETTE[3], "-.", "activation"),
    "random": (GREY, ":", "random"),
}
#: Panels of predicted and measured changes, by the beginning of the arrays' names.
PAIRS = {
    "constrained_latent": "latents, MLPs and attention held",
    "free_latent": "latents, free",
    "free_logit": "logits, free",
}


@styled
def draw(table: RunTable, *, title: str, max_rows: int, points: int) -> Figure:
    """Draw a row of panels per run and dataset: deletion curves, then effects of clamping.

    Args:
        table: Runs.
        title: Title of the figure.
        max_rows: Maximum number of rows to draw.
        points: Maximum number of pairs drawn per panel.

    Raises:
        NothingToDrawError: No run stored the checks of attribution graphs.
    """
    notes: list[str] = []
    rows = find_rows(
        table,
        first_arrays("deletion_influence", "free_latent_predicted"),
        missing="no run has checks of attribution graphs (deletion_influence)",
    )
    rows = limit(rows, max_rows, "runs and datasets", notes)
    fig, axes = panels(len(rows), 1 + len(PAIRS), width=2.6, height=2.2)
    for row, row_axes in zip(rows, axes, strict=True):
        _draw_deletion(row_axes[0], row.data)
        for ax, name in zip(row_axes[1:], PAIRS, strict=True):
            _draw_pairs(ax, row.data, name, points)
        label = f"{row.dataset}\nKL of the next token (nat)"
        row_axes[0].set_ylabel(f"{row.run.title}\n{label}" if len(rows) > 1 else label)
    for ax, name in zip(axes[0], ("latents removed", *PAIRS.values()), strict=True):
        ax.set_title(name, weight="bold")
    axes[-1][0].set_xlabel("number removed")
    for ax in axes[-1][1:]:
        ax.set_xlabel("predicted change")
    handles = [Line2D([], [], color=c, linestyle=s, label=name) for c, s, name in ORDERS.values()]
    notes.append("Grey line: measured as predicted. A latent is set to 0 or doubled. First seed.")
    lines = notes + row_caption(rows, error="bands: one standard error over prompts")
    return finish(fig, title, lines, handles)


def _draw_deletion(ax: Axes, arrays: Arrays) -> None:
    """Draw the mean cost of each order over the number of latents removed."""
    counts = arrays["deletion_counts"]
    for order, (color, line, _) in ORDERS.items():
        curves = arrays.get(f"deletion_{order}")
        if curves is None or not len(curves):
            continue
        mean = curves.mean(0)
        ax.plot(counts, mean, color=color, linestyle=line, marker="o", markersize=2.5)
        if len(curves) > 1:
            error = curves.std(0, ddof=1) / len(curves) ** 0.5
            ax.fill_between(counts, mean - error, mean + error, color=color, alpha=0.15, lw=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(counts.tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))
    ax.axhline(0, color=GREY, linewidth=0.6)


def _draw_pairs(ax: Axes, arrays: Arrays, name: str, points: int) -> None:
    """Draw evenly spaced pairs of predicted and measured changes, and their correlation."""
    predicted, measured = arrays[f"{name}_predicted"], arrays[f"{name}_measured"]
    if len(predicted) < 2:
        ax.set_axis_off()
        return
    shown = np.linspace(0, len(predicted) - 1, min(points, len(predicted))).astype(int)
    ax.scatter(predicted[shown], measured[shown], s=3, alpha=0.3, color=PALETTE[0], linewidths=0)
    ends = [float(predicted.min()), float(predicted.max())]
    ax.plot(ends, ends, color=GREY, linewidth=0.8)
    ax.set_ylabel("measured")
    if predicted.std() > 0 and measured.std() > 0:
        r = float(np.corrcoef(predicted, measured)[0, 1])
        ax.text(
            0.04, 0.94, f"r = {r:.2f}, n = {len(predicted):,}", transform=ax.transAxes, va="top"
        )
