"""Correlation map between two levels: which top latents go with which bottom latents."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sae_experiments.plots.axes import center_text, first_image, head_panel
from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import caption
from sae_experiments.plots.selection import choose_panels, find_panels
from sae_experiments.results.table import Run, RunTable


@styled
def draw(table: RunTable, *, title: str, max_runs: int, max_datasets: int) -> Figure:
    """Draw Pearson's r of values, with top latents down and bottom latents across.

    Rows of panels are runs, columns are datasets; the first seed that stored a map is drawn.

    Args:
        table: Runs.
        title: Title of the figure.
        max_runs: Maximum number of runs to draw.
        max_datasets: Maximum number of datasets to draw.

    Raises:
        NothingToDrawError: No run stored `levels_map`.
    """
    notes: list[str] = []
    maps = find_panels(
        table, _first_map, missing="no run has a correlation map between levels (levels_map)"
    )
    runs, datasets = choose_panels(
        table, maps, max_runs=max_runs, max_datasets=max_datasets, notes=notes
    )
    keys = [(run.name, dataset) for run in runs for dataset in datasets]
    largest = max(float(np.abs(maps[key]).max()) for key in keys if key in maps)
    colors: Any = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
    fig, axes = panels(len(runs), len(datasets), width=4.2, height=2.2)
    for row, run in enumerate(runs):
        for ax, dataset in zip(axes[row], datasets, strict=True):
            if row == 0:
                head_panel(ax, runs, dataset)
            ax.grid(visible=False)
            correlations = maps.get((run.name, dataset))
            if correlations is None:
                center_text(ax, "not stored")
                continue
            ax.imshow(correlations, aspect="auto", interpolation="nearest", **colors)
            if row == len(runs) - 1:
                ax.set_xlabel("bottom latents")
        axes[row, 0].set_ylabel(f"{run.title}\ntop latents")
    image = first_image(axes)
    fig.colorbar(image, ax=axes, label="Pearson's r of values", fraction=0.025, pad=0.01)
    notes.append(
        "The top and bottom latents of strongest correlation, in the order of their nearest "
        "partner; first seed."
    )
    return finish(fig, title, notes + caption(runs, datasets))


def _first_map(run: Run, dataset: str) -> np.ndarray | None:
    """The correlations of the first seed that stored any, (top latents, bottom latents)."""
    for arrays in run.arrays(dataset).values():
        stored = arrays.get("levels_map")
        if stored is not None and stored.size:
            return stored.astype(np.float64)
    return None
