"""Ablation of each level: what the language model loses with one level alone, and when one is taken out."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sae_experiments.plots.base import (
    NothingToDrawError,
    caption,
    finish,
    head_panel,
    limit,
    looks,
    panels,
    plain_log,
    styled,
)
from sae_experiments.results.table import Run, RunTable


@styled
def draw(table: RunTable, *, title: str, bars: dict[str, str], kinds: dict[str, str], max_runs: int, max_datasets: int) -> Figure:
    """A row for each of ``kinds`` (metric ending: axis label), a column for each dataset; bars of every run for each of ``bars`` (metric stem: words)."""
    notes: list[str] = []
    runs = limit([r for r in table.runs if _has(r, r.stats, bars, kinds)], max_runs, "runs", notes)
    datasets = limit([d for d in table.datasets if any(_has(r, [d], bars, kinds) for r in runs)], max_datasets, "datasets", notes)
    if not datasets:
        raise NothingToDrawError("no run has ablations of levels (metric levels_effect)")
    look, width = looks(table), 0.84 / len(runs)
    fig, axes = panels(len(kinds), len(datasets), width=1.0 + 0.9 * len(bars), height=2.4, sharex=True, sharey="row")
    for row, kind in enumerate(kinds):
        for column, dataset in enumerate(datasets):
            ax = axes[row, column]
            if row == 0:
                head_panel(ax, runs, dataset)
            for i, run in enumerate(runs):
                for x, stem in enumerate(bars):
                    stat = run.stats.get(dataset, {}).get(f"{stem}_{kind}")
                    if stat and stat.mean is not None:
                        place = x + (i - (len(runs) - 1) / 2) * width
                        error = {"elinewidth": 0.9, "capsize": 1.5}
                        ax.bar(place, stat.mean, 0.92 * width, yerr=stat.stderr, color=look[run.name].color, error_kw=error)
            ax.grid(visible=False, axis="x")
            ax.set_xticks(range(len(bars)), list(bars.values()), rotation=35, ha="right", rotation_mode="anchor")
        values = [abs(s.mean) for r in runs for d in datasets for b in bars if (s := r.stats.get(d, {}).get(f"{b}_{kind}")) and s.mean]
        if values and max(values) > 10 * min(values):  # a level alone and without it are worlds apart
            for ax in axes[row]:
                plain_log(ax, "y", 0.7 * min(values), max(values))
        axes[row, 0].set_ylabel(kinds[kind] + (", logarithmic" if values and max(values) > 10 * min(values) else ""))
    handles = [Patch(color=look[run.name].color, label=run.title) for run in runs]
    notes += [
        "Alone: that reconstruction in place of the activation. At its mean or at zero: that level's code replaced in the whole, the SAE's error kept in."
    ]
    return finish(fig, title, notes + caption(table, runs, datasets, error="error bars: ±1 standard error over seeds (none where n = 1)"), handles)


def _has(run: Run, datasets: Iterable[str], bars: Iterable[str], kinds: Iterable[str]) -> bool:
    found = [run.stats.get(d, {}).get(f"{stem}_{kind}") for d in datasets for stem in bars for kind in kinds]
    return any(stat and stat.mean is not None for stat in found)
