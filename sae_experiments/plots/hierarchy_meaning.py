"""Abstraction of each level: shares of its latents that detect characters, words and structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sae_experiments.plots.axes import head_panel
from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import OVER_SEEDS, caption
from sae_experiments.plots.selection import choose_panels, find_panels, mean_of
from sae_experiments.plots.style import GREY, PALETTE
from sae_experiments.results.table import Run, RunTable

#: Name and colour of each kind of concept, by its part of the metrics' names.
KINDS = {
    "char": ("character", PALETTE[5]),
    "word": ("word", PALETTE[4]),
    "struct": ("structure", PALETTE[6]),
}
#: Colour of each level in the panels of companions, by the ending of its metrics ("": all latents).
LEVEL_COLORS = {"": GREY, "_bottom": PALETTE[0], "_top": PALETTE[1]}
Place = tuple[Run, str]  # a run and one of its levels, side by side on the horizontal axis


@styled
def draw(
    table: RunTable,
    *,
    title: str,
    companions: Mapping[str, str],
    max_runs: int,
    max_datasets: int,
) -> Figure:
    """Draw a column of panels per dataset: bars per run and level, then label-free companions.

    Args:
        table: Runs.
        title: Title of the figure.
        companions: Axis label of each metric that needs no labels, one row of panels for each.
        max_runs: Maximum number of runs to draw.
        max_datasets: Maximum number of datasets to draw.

    Raises:
        NothingToDrawError: No run has semantic levels.
    """
    notes: list[str] = []
    levels = find_panels(
        table, _levels, missing="no run has semantic levels (metric levels_meaning)"
    )
    runs, datasets = choose_panels(
        table, levels, max_runs=max_runs, max_datasets=max_datasets, notes=notes
    )
    places = _places(runs, datasets)
    width = 1.2 + 0.42 * len(places)
    fig, axes = panels(
        1 + len(companions), len(datasets), width=width, height=2.3, sharex=True, sharey="row"
    )
    names = [f"{run.name}{level.replace('_', ' ')}" for run, level in places]
    for column, dataset in enumerate(datasets):
        head_panel(axes[0, column], runs, dataset)
        _draw_shares(axes[0, column], places, dataset)
        for row, metric in enumerate(companions, start=1):
            _draw_companion(axes[row, column], places, dataset, metric)
        ticks = range(len(places))
        axes[-1, column].set_xticks(ticks, names, rotation=60, ha="right", rotation_mode="anchor")
    for ax, label in zip(axes[:, 0], ["share of the latents", *companions.values()], strict=True):
        ax.set_ylabel(label)
    handles = [Patch(color=color, label=name) for name, color in KINDS.values()]
    labelled = [run.title for run in runs if run.title != run.name]
    notes.append(f"{'; '.join(labelled)}.")
    notes.append(
        "The rest of a bar to 1 detects no concept. Over a pair: mean semantic level above less "
        "below, and p of shuffled levels (worst seed)."
    )
    return finish(fig, title, notes + caption(runs, datasets, error=OVER_SEEDS), handles)


def _levels(run: Run, dataset: str) -> list[str] | None:
    """Endings of the metrics of the levels that a run measured; None without any.

    A run without levels has the ending "", for all of its latents.
    """
    levels = [
        level
        for level in ("_bottom", "_top")
        if mean_of(run, dataset, f"semantic_frac_char{level}")
    ]
    if not levels and mean_of(run, dataset, "semantic_frac_char"):
        levels = [""]
    return levels or None


def _has_level(run: Run, dataset: str, level: str) -> bool:
    return level in (_levels(run, dataset) or [])


def _places(runs: Sequence[Run], datasets: Sequence[str]) -> list[Place]:
    """The levels of all runs that are measured on any dataset."""
    return [
        (run, level)
        for run in runs
        for level in LEVEL_COLORS
        if any(_has_level(run, dataset, level) for dataset in datasets)
    ]


def _draw_shares(ax: Axes, places: Sequence[Place], dataset: str) -> None:
    """Draw bars of the shares of latents, and write the distance of the levels over each pair."""
    for x, (run, level) in enumerate(places):
        if not _has_level(run, dataset, level):
            continue
        for i, (kind, (_, color)) in enumerate(KINDS.items()):
            share = mean_of(run, dataset, f"semantic_frac_{kind}{level}")
            if share:
                bar = (x + 0.26 * (i - 1), share.value, 0.26)
                error_kw = {"elinewidth": 0.9, "capsize": 1.5}
                ax.bar(*bar, yerr=share.stderr, color=color, error_kw=error_kw)
        if level == "_top":
            _write_gap(ax, x - 0.5, run, dataset)
    low, high = ax.get_ylim()
    ax.set_ylim(low, max(high, 0.05) * 1.12)
    ax.grid(visible=False, axis="x")


def _write_gap(ax: Axes, x: float, run: Run, dataset: str) -> None:
    """Write the mean semantic level of top less bottom, and the largest p over seeds."""
    gap = mean_of(run, dataset, "semantic_level_gap")
    if gap is None:
        return
    text = f"{gap.value:+.2f}"
    of_seeds = [r.metrics.get("semantic_level_p") for r in run.records if r.dataset == dataset]
    measured = [p for p in of_seeds if p is not None]
    if measured:
        text += f"\np ≤ {max(measured):.2g}"
    top = ax.get_xaxis_transform()
    ax.text(x, 0.98, text, transform=top, ha="center", va="top", fontsize=6.5, color=GREY)


def _draw_companion(ax: Axes, places: Sequence[Place], dataset: str, metric: str) -> None:
    for x, (run, level) in enumerate(places):
        mean = mean_of(run, dataset, f"{metric}{level}")
        if mean and _has_level(run, dataset, level):
            error = np.nan if mean.stderr is None else mean.stderr
            color = LEVEL_COLORS[level]
            ax.errorbar(x, mean.value, yerr=error, fmt="o", color=color, markersize=5, capsize=2.5)
    ax.grid(visible=False, axis="x")
    ax.set_ylim(0, max(1.12 * ax.dataLim.y1, ax.get_ylim()[1]))  # datasets share the axis
