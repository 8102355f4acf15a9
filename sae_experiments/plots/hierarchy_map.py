"""The correlation map between two levels: which top latents go with which bottom ones."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from sae_experiments.plots.base import (
    NothingToDrawError,
    caption,
    finish,
    head_panel,
    limit,
    panels,
    styled,
)
from sae_experiments.results.table import Run, RunTable


@styled
def draw(table: RunTable, *, title: str, max_runs: int, max_datasets: int) -> Figure:
    """A row for each run, a column for each dataset (first seed): Pearson's r of values, top latents down, bottom latents across."""
    notes: list[str] = []
    runs = limit([r for r in table.runs if any(_map(r, d) is not None for d in r.stats)], max_runs, "runs", notes)
    datasets = limit([d for d in table.datasets if any(_map(r, d) is not None for r in runs)], max_datasets, "datasets", notes)
    if not datasets:
        raise NothingToDrawError("no run has a correlation map between levels (levels_map)")
    found = {(r.name, d): m for r in runs for d in datasets if (m := _map(r, d)) is not None}
    reach = max(float(np.abs(m).max()) for m in found.values())
    fig, axes = panels(len(runs), len(datasets), width=4.2, height=2.2)
    image = None
    for row, run in enumerate(runs):
        for ax, dataset in zip(axes[row], datasets, strict=True):
            if row == 0:
                head_panel(ax, runs, dataset)
            ax.grid(visible=False)
            if (run.name, dataset) not in found:
                ax.text(0.5, 0.5, "not stored", transform=ax.transAxes, ha="center", va="center")
                continue
            image = ax.imshow(found[run.name, dataset], cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
            if row == len(runs) - 1:
                ax.set_xlabel("bottom latents")
        axes[row, 0].set_ylabel(f"{run.title}\ntop latents")
    fig.colorbar(image, ax=axes, label="Pearson's r of values", fraction=0.025, pad=0.01)
    notes += ["The top and bottom latents of strongest correlation, in the order of their nearest partner; first seed."]
    return finish(fig, title, notes + caption(table, runs, datasets))


def _map(run: Run, dataset: str) -> np.ndarray | None:
    found = [a["levels_map"].astype(np.float64) for a in run.arrays(dataset).values() if "levels_map" in a and a["levels_map"].size]
    return found[0] if found else None
