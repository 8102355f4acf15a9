"""Superposition: loss over depth and hidden size as a heat map, by itself or relative to the control without hierarchy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, TwoSlopeNorm
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

FLOOR = 1e-12  # a loss below this is zero to rounding
CLIP = 8.0  # powers of two at which the colours of a ratio end


def grid(run: Run, dataset: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Depths (D,), hidden sizes (H,) and the best instance's loss (D, H), mean over seeds, NaN where there is no such configuration."""
    arrays = [a for a in run.arrays(dataset).values() if {"depth", "hidden", "loss"} <= a.keys()]
    if not arrays:
        return None
    depths, hidden = (np.unique(arrays[0][name]) for name in ("depth", "hidden"))
    tables = []
    for a in arrays:
        table = np.full((len(depths), len(hidden)), np.nan)
        known = np.isin(a["depth"], depths) & np.isin(a["hidden"], hidden)
        table[np.searchsorted(depths, a["depth"][known]), np.searchsorted(hidden, a["hidden"][known])] = a["loss"].min(1)[known]
        tables.append(table)
    return depths, hidden, np.mean(tables, axis=0)


@styled
def draw(table: RunTable, *, title: str, relative_to: Mapping[str, str] | None, max_runs: int, max_datasets: int) -> Figure:
    """A row for each run, a column for each dataset: least loss of the instances.

    ``relative_to``: dataset -> its control; then the datasets named there are drawn, as log2 of the ratio to the control's loss.
    """
    notes: list[str] = []
    runs = limit([run for run in table.runs if any(_values(run, d, relative_to) is not None for d in run.stats)], max_runs, "runs", notes)
    datasets = limit(
        [d for d in table.datasets if any(_values(run, d, relative_to) is not None for run in runs if d in run.stats)],
        max_datasets,
        "datasets",
        notes,
    )
    if not datasets:
        raise NothingToDrawError(
            "no run has a sweep over depth and hidden size"
            + (f" together with its control ({', '.join(relative_to.values())})" if relative_to else "")
        )
    found = {(run.name, d): values for run in runs for d in datasets if d in run.stats and (values := _values(run, d, relative_to))}
    shown = np.concatenate([values.ravel() for _, _, values in found.values()])
    shown = shown[np.isfinite(shown)]
    span = min(max(float(np.abs(shown).max(initial=0)), 0.1), CLIP)
    norm = TwoSlopeNorm(0, -span, span) if relative_to else LogNorm(FLOOR, max(shown.max(), 10 * FLOOR))
    fig, axes = panels(len(runs), len(datasets), width=3.6, height=2.5)
    for row, run in enumerate(runs):
        for ax, dataset in zip(axes[row], datasets, strict=True):
            if row == 0:
                head_panel(ax, runs, dataset)
            if (run.name, dataset) not in found:
                ax.set_axis_off()
                continue
            _panel(ax, *found[run.name, dataset], norm=norm, cmap="RdBu_r" if relative_to else "viridis", exponents=not relative_to)
            ax.set_ylabel(f"{run.title}\ndepth" if dataset == datasets[0] and len(runs) > 1 else "depth")
    label = "log2 of loss / loss of the control" if relative_to else "loss of the best instance"
    fig.colorbar(next(image for ax in axes.flat for image in ax.images), ax=axes, label=label, fraction=0.03)
    notes += [
        "Blue: easier than independent features with the same marginal probabilities. "
        + f"A loss below {FLOOR:g} counts as that; colours end at 2^{span:g}."
        if relative_to
        else "In the cells: log10 of the loss, -12 or less drawn as -12. White: more hidden units than features."
    ]
    return finish(fig, title, notes + caption(table, runs, datasets, error="cells: mean over seeds"))


def _values(run: Run, dataset: str, relative_to: Mapping[str, str] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    own = grid(run, dataset)
    if own is None or not relative_to:
        return own and (own[0], own[1], np.maximum(own[2], FLOOR))
    other = grid(run, relative_to[dataset]) if dataset in relative_to else None
    if other is None or other[2].shape != own[2].shape:
        return None
    return own[0], own[1], np.log2(np.maximum(own[2], FLOOR) / np.maximum(other[2], FLOOR))


def _panel(ax: Axes, depths: np.ndarray, hidden: np.ndarray, values: np.ndarray, *, norm: object, cmap: str, exponents: bool) -> None:
    image = ax.imshow(values, origin="lower", aspect="auto", cmap=cmap, norm=norm)  # type: ignore[arg-type]
    ax.grid(visible=False)
    ax.set_xticks(range(len(hidden)), [str(h) for h in hidden])
    ax.set_yticks(range(len(depths)), [str(d) for d in depths])
    ax.set_xlabel("hidden units")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            power = np.log10(value) if exponents else value
            text = f"{power:.{0 if power < -9 else 1}f}"
            ax.text(j, i, text.replace("-", "\N{MINUS SIGN}"), ha="center", va="center", fontsize=6.5, color="white" if dark else "black")
