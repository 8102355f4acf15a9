"""Superposition: loss over hidden size, a line for each depth; and for each depth the smallest hidden size below the threshold."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sae_experiments.plots.base import (
    ALARM,
    GREY,
    MARKERS,
    NothingToDrawError,
    caption,
    finish,
    head_panel,
    limit,
    looks,
    panels,
    styled,
)
from sae_experiments.plots.superposition_loss import FLOOR, grid
from sae_experiments.results.table import Run, RunTable


@styled
def draw_lines(table: RunTable, *, title: str, max_runs: int, max_datasets: int) -> Figure:
    """A row for each run, a column for each dataset; full lines: best instance, dotted: mean over the instances."""
    notes: list[str] = []
    runs, datasets = _having(table, max_runs, max_datasets, notes)
    fig, axes = panels(len(runs), len(datasets), width=3.6, height=2.6, sharex=True, sharey=True)
    colours = mpl.colormaps["viridis"]
    depths = sorted({int(d) for run in runs for name in datasets for a in run.arrays(name).values() if "depth" in a for d in a["depth"]})
    styles = {d: (colours(0.92 * i / max(len(depths) - 1, 1)), MARKERS[i % len(MARKERS)]) for i, d in enumerate(depths)}
    for row, run in enumerate(runs):
        for ax, dataset in zip(axes[row], datasets, strict=True):
            if row == 0:
                head_panel(ax, runs, dataset)
            arrays = [a for a in run.arrays(dataset).values() if {"depth", "hidden", "loss"} <= a.keys()]
            for depth in depths if arrays else []:
                chosen = arrays[0]["depth"] == depth
                colour, marker = styles[depth]
                for reduce, line, shown in ((np.min, "-", marker), (np.mean, ":", "")):
                    values = np.mean([reduce(a["loss"][chosen], axis=1) for a in arrays if len(a["loss"]) == len(chosen)], axis=0)
                    ax.plot(arrays[0]["hidden"][chosen], np.maximum(values, FLOOR), line, color=colour, marker=shown, markersize=4)
            for a in arrays[:1]:
                ax.axhline(float(a["threshold"]), color=GREY, linewidth=0.8, linestyle="--")
            ax.set_yscale("log")
            if row == len(runs) - 1:
                ax.set_xlabel("hidden units")
        axes[row, 0].set_ylabel(f"{run.title}\nloss" if len(runs) > 1 else "loss")
    handles = [Line2D([], [], color=colour, marker=marker, markersize=4, label=f"depth {d}") for d, (colour, marker) in styles.items()]
    handles += [Line2D([], [], color="black", label="best instance"), Line2D([], [], color="black", linestyle=":", label="mean of instances")]
    notes += ["Dashed: the threshold below which a tree counts as solved."]
    return finish(fig, title, notes + caption(table, runs, datasets, error="mean over seeds"), handles)


@styled
def draw_smallest(table: RunTable, *, title: str, max_runs: int, max_datasets: int) -> Figure:
    """Bars: least hidden size at which the best instance is below the threshold; hatched up to the top where no size of the sweep is."""
    notes: list[str] = []
    runs, datasets = _having(table, max_runs, max_datasets, notes)
    fig, axes = panels(1, len(datasets), width=3.8, height=2.6, sharey=True)
    look, width = looks(table), 0.8 / len(runs)
    top = 0
    for ax, dataset in zip(axes[0], datasets, strict=True):
        head_panel(ax, runs, dataset)
        for i, run in enumerate(runs):
            for depth, size, largest in _smallest(run, dataset):
                x = depth + (i - (len(runs) - 1) / 2) * width
                top = max(top, largest)
                if size is None:
                    ax.bar(x, largest, 0.9 * width, fill=False, edgecolor=ALARM, hatch="///", linewidth=0.6, alpha=0.6)
                    ax.text(x, largest + 0.2, "none", ha="center", va="bottom", fontsize=7, color=ALARM, rotation=90 if len(runs) > 2 else 0)
                else:
                    ax.bar(x, size, 0.9 * width, color=look[run.name].color)
                    ax.text(x, size + 0.2, f"{size:g}", ha="center", va="bottom", fontsize=7)
        ax.set_xlabel("depth")
        ax.grid(visible=False, axis="x")
        ax.set_xticks(sorted({depth for run in runs for depth, _, _ in _smallest(run, dataset)}))
    axes[0, 0].set_ylim(0, top + 1.8)
    axes[0, 0].set_ylabel("smallest hidden size")
    handles = [Patch(color=look[run.name].color, label=run.title) for run in runs]
    handles += [Patch(fill=False, edgecolor=ALARM, hatch="///", label="none reaches it")]  # type: ignore[list-item]
    thresholds = {f"{float(a['threshold']):g}" for run in runs for d in datasets for a in run.arrays(d).values() if "threshold" in a}
    notes += [f"Threshold of the loss: {', '.join(sorted(thresholds))}, for the best instance; mean over the seeds that reach it."]
    return finish(fig, title, notes + caption(table, runs, datasets), handles)


def _smallest(run: Run, dataset: str) -> list[tuple[int, float | None, int]]:
    """(depth, smallest hidden size or None, largest of the sweep)."""
    found = grid(run, dataset) if dataset in run.stats else None
    if found is None:
        return []
    depths, hidden, losses = found
    rows = []
    for depth, row in zip(depths, losses, strict=True):
        stat = run.stats[dataset].get(f"smallest_hidden_depth_{depth}")
        rows.append((int(depth), stat.mean if stat else None, int(hidden[np.isfinite(row)].max())))
    return rows


def _having(table: RunTable, max_runs: int, max_datasets: int, notes: list[str]) -> tuple[list[Run], list[str]]:
    runs = limit([run for run in table.runs if any(grid(run, d) for d in run.stats)], max_runs, "runs", notes)
    datasets = limit([d for d in table.datasets if any(grid(run, d) for run in runs if d in run.stats)], max_datasets, "datasets", notes)
    if not datasets:
        raise NothingToDrawError("no run has a sweep over depth and hidden size")
    return runs, datasets
