"""Ablation of each level: the language model's loss with one level alone, and with one replaced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sae_experiments.plots.axes import head_panel, plain_log
from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import OVER_SEEDS, caption
from sae_experiments.plots.selection import Mean, choose_panels, find_panels, mean_of
from sae_experiments.plots.style import run_styles
from sae_experiments.results.table import Run, RunTable

Effects = dict[tuple[str, str], Mean]  # by stem and ending of the metric


@styled
def draw(
    table: RunTable,
    *,
    title: str,
    bars: Mapping[str, str],
    kinds: Mapping[str, str],
    max_runs: int,
    max_datasets: int,
) -> Figure:
    """Draw a row of panels per kind of effect and a column per dataset, with bars of every run.

    Args:
        table: Runs.
        title: Title of the figure.
        bars: Label of each ablation, by the stem of its metrics.
        kinds: Axis label of each kind of effect, by the ending of its metrics.
        max_runs: Maximum number of runs to draw.
        max_datasets: Maximum number of datasets to draw.

    Raises:
        NothingToDrawError: No run has any of the metrics.
    """
    notes: list[str] = []
    effects = find_panels(
        table,
        lambda run, dataset: _effects(run, dataset, bars, kinds),
        missing="no run has ablations of levels (metric levels_effect)",
    )
    runs, datasets = choose_panels(
        table, effects, max_runs=max_runs, max_datasets=max_datasets, notes=notes
    )
    effects_of = {
        dataset: [effects.get((run.name, dataset), {}) for run in runs] for dataset in datasets
    }
    styles = run_styles(table)
    colors = [styles[run.name].color for run in runs]
    width = 1.0 + 0.9 * len(bars)
    fig, axes = panels(
        len(kinds), len(datasets), width=width, height=2.4, sharex=True, sharey="row"
    )
    for row, (kind, label) in enumerate(kinds.items()):
        for ax, dataset in zip(axes[row], datasets, strict=True):
            if row == 0:
                head_panel(ax, runs, dataset)
            _draw_bars(ax, effects_of[dataset], colors, bars, kind)
        axes[row, 0].set_ylabel(label)
        _scale_row(axes[row], list(effects_of.values()), kind)
    notes.append(
        "Alone: that reconstruction in place of the activation. At its mean or at zero: that "
        "level's code replaced in the whole, the SAE's error kept in."
    )
    handles = [Patch(color=styles[run.name].color, label=run.title) for run in runs]
    return finish(fig, title, notes + caption(runs, datasets, error=OVER_SEEDS), handles)


def _effects(run: Run, dataset: str, stems: Iterable[str], kinds: Iterable[str]) -> Effects | None:
    """The effects that a run measured; None without any."""
    effects = {}
    for stem, kind in product(stems, kinds):
        mean = mean_of(run, dataset, f"{stem}_{kind}")
        if mean:
            effects[stem, kind] = mean
    return effects or None


def _draw_bars(
    ax: Axes, effects: Sequence[Effects], colors: Sequence[str], bars: Mapping[str, str], kind: str
) -> None:
    """Draw the bars of all runs side by side, for every ablation."""
    width = 0.84 / len(effects)
    error_kw = {"elinewidth": 0.9, "capsize": 1.5}
    for i, (of_run, color) in enumerate(zip(effects, colors, strict=True)):
        shift = (i - (len(effects) - 1) / 2) * width
        for x, stem in enumerate(bars):
            mean = of_run.get((stem, kind))
            if mean:
                bar = (x + shift, mean.value, 0.92 * width)
                ax.bar(*bar, yerr=mean.stderr, color=color, error_kw=error_kw)
    ax.grid(visible=False, axis="x")
    ticks = range(len(bars))
    ax.set_xticks(ticks, list(bars.values()), rotation=35, ha="right", rotation_mode="anchor")


def _scale_row(row: np.ndarray, effects: Sequence[Sequence[Effects]], kind: str) -> None:
    """Make the axes of a row logarithmic if its effects differ by more than a factor of ten.

    The effect of a level alone and of the whole without it are often that far apart.
    """
    of_kind = [
        mean.value
        for of_dataset in effects
        for of_run in of_dataset
        for (_, its_kind), mean in of_run.items()
        if its_kind == kind
    ]
    sizes = [abs(value) for value in of_kind if value]
    if not sizes or max(sizes) <= 10 * min(sizes):
        return
    for ax in row:
        plain_log(ax, "y", 0.7 * min(sizes), max(sizes))
    row[0].set_ylabel(f"{row[0].get_ylabel()}, logarithmic")
