"""Training of a hierarchical SAE by phase: both sparsities against their targets, the L1 coefficients that steer them, the gate."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sae_experiments.plots.base import (
    GREY,
    PALETTE,
    NothingToDrawError,
    caption,
    finish,
    head_panel,
    limit,
    panels,
    plain_log,
    styled,
    tint,
)
from sae_experiments.results.table import Run, RunTable

COLOURS = {"bottom": PALETTE[0], "top": PALETTE[1]}
PHASES = ("bottom", "top", "both")
ROWS = ("zeros in a code (share)", "L1 coefficient", "gate (active latents)")


@styled
def draw(table: RunTable, *, title: str, run: str | None, max_datasets: int) -> Figure:
    """One run (``run``, or the first with both levels): a column for each dataset, a line for each level, mean over seeds with their range."""
    notes: list[str] = []
    having = {r.name: r for r in table.runs if any(_records(r, d) for d in r.stats)}
    chosen = having.get(run) if run else next((r for r in having.values() if _levels(r) == 2), next(iter(having.values()), None))
    if chosen is None:
        raise NothingToDrawError("no run has the record of a hierarchical fit (levels_trace)")
    datasets = limit([d for d in table.datasets if d in chosen.stats and _records(chosen, d)], max_datasets, "datasets", notes)
    rows = ROWS if any(np.isfinite(a["levels_trace"][:, 5]).any() for d in datasets for a in _records(chosen, d)) else ROWS[:2]
    fig, axes = panels(len(rows), len(datasets), width=3.7, height=1.9, sharex=True, sharey="row")
    for column, dataset in enumerate(datasets):
        head_panel(axes[0, column], [chosen], dataset)
        found = _records(chosen, dataset)
        for row, name in enumerate(rows):
            ax = axes[row, column]
            tint(ax, chosen.stand_in(dataset))
            _panel(ax, found, row)
            ax.set_ylabel(name if column == 0 else "")
        _name_phases(axes[0, column], found[0]["levels_phase_ends"])
        axes[-1, column].set_xlabel("share of the steps done")
    axes[0, 0].set_ylim(0.45, 1.06)
    handles = [Line2D([], [], color=c, label=level) for level, c in COLOURS.items()]
    handles += [Line2D([], [], color=GREY, linestyle="--", label="target")]
    others = [r.name for r in having.values() if r is not chosen]
    notes += [
        f"Run {chosen.title}{'; not drawn: ' + ', '.join(others) if others else ''}. In training; inference uses thresholds calibrated at the end."
    ]
    return finish(fig, title, notes + caption(table, [chosen], datasets, error="lines: mean over seeds, bands: their range"), handles)


def _records(run: Run, dataset: str) -> list[dict[str, Any]]:
    return [a for a in run.arrays(dataset).values() if "levels_trace" in a and np.isfinite(a["levels_trace"][:, 1]).any()]


def _levels(run: Run) -> int:
    return max((len(a["levels_targets"]) for d in run.stats for a in _records(run, d)), default=0)


def _panel(ax: Axes, found: list[dict[str, Any]], row: int) -> None:
    for i, colour in enumerate(COLOURS.values()):
        columns = np.stack([a["levels_trace"][:, (1 + i, 3 + i, 5)[row]] for a in found])
        if (row == 2 and i) or not np.isfinite(columns).any():
            continue
        x = (np.arange(columns.shape[1]) + 0.5) / columns.shape[1]
        known = np.isfinite(columns).all(0)
        if row == 1 and i:  # the top's coefficient waits for its phase
            known &= x > found[0]["levels_phase_ends"][0]
        ax.plot(x[known], columns[:, known].mean(0), color=PALETTE[2] if row == 2 else colour, linewidth=1.1)
        ax.fill_between(
            x[known], columns[:, known].min(0), columns[:, known].max(0), color=PALETTE[2] if row == 2 else colour, alpha=0.2, linewidth=0
        )
        if row == 0 and i < len(found[0]["levels_targets"]):
            ax.axhline(found[0]["levels_targets"][i], color=colour, linestyle="--", linewidth=0.9)
    for end in found[0]["levels_phase_ends"][:-1]:
        ax.axvline(end, color=GREY, linewidth=0.8)
    ax.set_xlim(0, 1)
    if row == 1:
        shown = [v for a in found for v in a["levels_trace"][:, 3:5].ravel() if v > 0]
        plain_log(ax, "y", min(shown), max(shown))
    if row == 2:
        ax.set_ylim(0, None)


def _name_phases(ax: Axes, ends: np.ndarray) -> None:
    starts = [0.0, *ends[:-1]]
    for name, start, end in zip(PHASES, starts, ends, strict=False):
        ax.text((start + end) / 2, 0.99, name, transform=ax.get_xaxis_transform(), ha="center", va="top", fontsize=7.5, color=GREY)
