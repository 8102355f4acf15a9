"""Superposition: loss over depth and hidden size as a heat map, alone or relative to a control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure

from sae_experiments.plots.axes import first_image, head_panel
from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import caption
from sae_experiments.plots.selection import Arrays, choose_panels, find_panels
from sae_experiments.plots.text import minus
from sae_experiments.results.table import Run, RunTable

FLOOR = 1e-12  # a loss below this is zero up to rounding
CLIP = 8.0  # powers of two at which the colours of a ratio end
NO_SWEEP = "no run has a sweep over depth and hidden size"


class Grid(NamedTuple):
    """Loss of every configuration of a sweep."""

    depths: np.ndarray  # (D,)
    hidden: np.ndarray  # (H,) hidden sizes
    values: np.ndarray  # (D, H), NaN for a configuration that is not in the sweep


def sweep_arrays(run: Run, dataset: str) -> list[Arrays]:
    """Arrays of the sweep over depth and hidden size, one entry per seed."""
    stored = run.arrays(dataset).values()
    return [arrays for arrays in stored if arrays.keys() >= {"depth", "hidden", "loss"}]


def loss_grid(run: Run, dataset: str) -> Grid | None:
    """Loss of the best instance of every configuration, mean over seeds; None without a sweep."""
    seeds = sweep_arrays(run, dataset)
    if not seeds:
        return None
    depths = np.unique(seeds[0]["depth"])
    hidden = np.unique(seeds[0]["hidden"])
    losses = []
    for arrays in seeds:
        loss = np.full((len(depths), len(hidden)), np.nan)
        known = np.isin(arrays["depth"], depths) & np.isin(arrays["hidden"], hidden)
        rows = np.searchsorted(depths, arrays["depth"][known])
        columns = np.searchsorted(hidden, arrays["hidden"][known])
        loss[rows, columns] = arrays["loss"].min(1)[known]
        losses.append(loss)
    return Grid(depths, hidden, np.mean(losses, axis=0))


@styled
def draw(
    table: RunTable,
    *,
    title: str,
    relative_to: Mapping[str, str] | None,
    max_runs: int,
    max_datasets: int,
) -> Figure:
    """Draw a row of panels per run and a column per dataset: loss of the best instance.

    Args:
        table: Runs.
        title: Title of the figure.
        relative_to: Control of each dataset, without the hierarchy. If it is given, these datasets
            alone are drawn, as log2 of the ratio to the control's loss.
        max_runs: Maximum number of runs to draw.
        max_datasets: Maximum number of datasets to draw.

    Raises:
        NothingToDrawError: No run has a sweep, or none together with its control.
    """
    notes: list[str] = []
    controls = relative_to or {}
    missing = NO_SWEEP
    if controls:
        missing += f" together with its control ({', '.join(controls.values())})"
    grids = find_panels(
        table,
        lambda run, dataset: (
            _relative_grid(run, dataset, controls) if controls else _floored_grid(run, dataset)
        ),
        missing,
    )
    runs, datasets = choose_panels(
        table, grids, max_runs=max_runs, max_datasets=max_datasets, notes=notes
    )
    keys = [(run.name, dataset) for run in runs for dataset in datasets]
    shown = np.concatenate([grids[key].values.ravel() for key in keys if key in grids])
    colors, label, note = _colors(shown[np.isfinite(shown)], relative=bool(controls))
    fig, axes = panels(len(runs), len(datasets), width=3.6, height=2.5)
    for row, run in enumerate(runs):
        for ax, dataset in zip(axes[row], datasets, strict=True):
            if row == 0:
                head_panel(ax, runs, dataset)
            grid = grids.get((run.name, dataset))
            if grid is None:
                ax.set_axis_off()
                continue
            _draw_grid(ax, grid, colors, exponents=not controls)
        if len(runs) > 1:
            axes[row, 0].set_ylabel(f"{run.title}\ndepth")
    fig.colorbar(first_image(axes), ax=axes, label=label, fraction=0.03)
    lines = [*notes, note, *caption(runs, datasets, error="cells: mean over seeds")]
    return finish(fig, title, lines)


def _floored_grid(run: Run, dataset: str) -> Grid | None:
    grid = loss_grid(run, dataset)
    return grid and grid._replace(values=np.maximum(grid.values, FLOOR))


def _relative_grid(run: Run, dataset: str, controls: Mapping[str, str]) -> Grid | None:
    """log2 of the ratio to the control's loss; None without a control of the same sweep."""
    grid = _floored_grid(run, dataset)
    control = _floored_grid(run, controls[dataset]) if dataset in controls else None
    if grid is None or control is None or control.values.shape != grid.values.shape:
        return None
    return grid._replace(values=np.log2(grid.values / control.values))


def _colors(values: np.ndarray, *, relative: bool) -> tuple[dict[str, Any], str, str]:
    """Colours for all panels, label of their colour bar, and their explanation in the caption."""
    if not relative:
        norm = LogNorm(FLOOR, max(values.max(), 10 * FLOOR))
        label = "loss of the best instance"
        note = (
            "In the cells: log10 of the loss, -12 or less drawn as -12. "
            "White: more hidden units than features."
        )
        return {"norm": norm, "cmap": "viridis"}, label, note
    span = min(max(float(np.abs(values).max(initial=0)), 0.1), CLIP)
    note = (
        "Blue: easier than independent features with the same marginal probabilities. "
        f"A loss below {FLOOR:g} counts as that; colours end at 2^{span:g}."
    )
    label = "log2 of loss / loss of the control"
    return {"norm": TwoSlopeNorm(0, -span, span), "cmap": "RdBu_r"}, label, note


def _draw_grid(ax: Axes, grid: Grid, colors: dict[str, Any], *, exponents: bool) -> None:
    """Draw a grid as coloured cells with numbers: the values, or their powers of ten."""
    image = ax.imshow(grid.values, origin="lower", aspect="auto", **colors)
    ax.grid(visible=False)
    ax.set_xticks(range(len(grid.hidden)), [str(size) for size in grid.hidden])
    ax.set_yticks(range(len(grid.depths)), [str(depth) for depth in grid.depths])
    ax.set_xlabel("hidden units")
    ax.set_ylabel("depth")
    for (i, j), value in np.ndenumerate(grid.values):
        if not np.isfinite(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        is_dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        number = np.log10(value) if exponents else value
        decimals = 0 if number < -9 else 1
        text = minus(f"{number:.{decimals}f}")
        color = "white" if is_dark else "black"
        ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color=color)
