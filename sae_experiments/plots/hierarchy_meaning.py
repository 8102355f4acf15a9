"""How abstract each level is: the share of its latents that detect concepts of characters, words and structure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sae_experiments.plots.base import (
    GREY,
    PALETTE,
    NothingToDrawError,
    caption,
    finish,
    head_panel,
    limit,
    panels,
    styled,
)
from sae_experiments.results.table import Run, RunTable

KINDS = {"char": ("character", PALETTE[5]), "word": ("word", PALETTE[4]), "struct": ("structure", PALETTE[6])}
LEVELS = ("", "_bottom", "_top")


@styled
def draw(table: RunTable, *, title: str, companions: dict[str, str], max_runs: int, max_datasets: int) -> Figure:
    """Columns are datasets. First row: bars for each run and level; further rows: the label-free ``companions`` (metric: axis label)."""
    notes: list[str] = []
    runs = limit([r for r in table.runs if any(_levels(r, d) for d in r.stats)], max_runs, "runs", notes)
    datasets = limit([d for d in table.datasets if any(_levels(r, d) for r in runs)], max_datasets, "datasets", notes)
    if not datasets:
        raise NothingToDrawError("no run has semantic levels (metric levels_meaning)")
    places = [(run, level) for run in runs for level in LEVELS if any(level in _levels(run, d) for d in datasets)]
    fig, axes = panels(1 + len(companions), len(datasets), width=1.2 + 0.42 * len(places), height=2.3, sharex=True, sharey="row")
    for column, dataset in enumerate(datasets):
        head_panel(axes[0, column], runs, dataset)
        _shares(axes[0, column], places, dataset)
        for row, metric in enumerate(companions, start=1):
            _companion(axes[row, column], places, dataset, metric)
        names = [f"{run.name}{level.replace('_', ' ')}" for run, level in places]
        axes[-1, column].set_xticks(range(len(places)), names, rotation=60, ha="right", rotation_mode="anchor")
    axes[0, 0].set_ylabel("share of the latents")
    for row, label in enumerate(companions.values(), start=1):
        axes[row, 0].set_ylabel(label)
    handles = [Patch(color=colour, label=name) for name, colour in KINDS.values()]
    notes += [f"{'; '.join(run.title for run in runs if run.title != run.name)}."]
    notes += ["The rest of a bar to 1 detects no concept. Over a pair: mean semantic level above less below, and p of shuffled levels (worst seed)."]
    return finish(fig, title, notes + caption(table, runs, datasets, error="error bars: ±1 standard error over seeds (none where n = 1)"), handles)


def _levels(run: Run, dataset: str) -> list[str]:
    stats = run.stats.get(dataset, {})
    two = [level for level in LEVELS[1:] if (s := stats.get(f"semantic_frac_char{level}")) and s.mean is not None]
    whole = stats.get("semantic_frac_char")
    return two or ([""] if whole and whole.mean is not None else [])


def _shares(ax: Axes, places: Sequence[tuple[Run, str]], dataset: str) -> None:
    for x, (run, level) in enumerate(places):
        if level not in _levels(run, dataset):
            continue
        for i, (kind, (_, colour)) in enumerate(KINDS.items()):
            stat = run.stats[dataset][f"semantic_frac_{kind}{level}"]
            if stat.mean is not None:
                ax.bar(x + 0.26 * (i - 1), stat.mean, 0.26, yerr=stat.stderr, color=colour, error_kw={"elinewidth": 0.9, "capsize": 1.5})
        gap, p = (run.stats[dataset].get(f"semantic_level_{n}") for n in ("gap", "p"))
        if level == "_top" and gap and gap.mean is not None:
            worst = max((v for r in run.records if r.dataset == dataset and (v := r.metrics.get("semantic_level_p")) is not None), default=None)
            said = "" if worst is None or p is None else f"\np ≤ {worst:.2g}"
            ax.text(x - 0.5, 0.98, f"{gap.mean:+.2f}{said}", transform=ax.get_xaxis_transform(), ha="center", va="top", fontsize=6.5, color=GREY)
    low, high = ax.get_ylim()
    ax.set_ylim(low, max(high, 0.05) * 1.12)
    ax.grid(visible=False, axis="x")


def _companion(ax: Axes, places: Sequence[tuple[Run, str]], dataset: str, metric: str) -> None:
    for x, (run, level) in enumerate(places):
        stat = run.stats.get(dataset, {}).get(f"{metric}{level}") if level in _levels(run, dataset) else None
        if stat and stat.mean is not None:
            colour = {"": GREY, "_bottom": PALETTE[0], "_top": PALETTE[1]}[level]
            ax.errorbar(x, stat.mean, yerr=np.nan if stat.stderr is None else stat.stderr, fmt="o", color=colour, markersize=5, capsize=2.5)
    ax.grid(visible=False, axis="x")
    ax.set_ylim(0, max(1.12 * ax.dataLim.y1, ax.get_ylim()[1]))  # the axis is shared by the datasets
