"""How often latents fire: the histogram of log10 firing density, with the dead and the dense ones called out."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sae_experiments.plots.base import (
    ALARM,
    GREY,
    NothingToDrawError,
    caption,
    finish,
    head_panel,
    limit,
    looks,
    panels,
    percent,
    styled,
    tint,
)
from sae_experiments.results.table import Run, RunTable

log = logging.getLogger(__name__)


class Density(NamedTuple):
    """Shares of all latents, mean over seeds: ``shares`` between ``edges`` (log10), and those that never fired."""

    shares: np.ndarray
    edges: np.ndarray
    dead: float | None


@styled
def draw(
    table: RunTable, *, title: str, counts: str, edges: str, dead: str, dense: str, dense_from: float, max_runs: int, max_datasets: int
) -> Figure:
    """A row for each run, a column for each dataset: share of all latents by log10 of the fraction of tokens they fire on.

    ``counts`` and ``edges`` name arrays: how many of the latents that fired at all fall between the edges. ``dead`` and ``dense``
    name the metrics with the shares of latents that never fired (a red bar, left) and that fire on more than ``dense_from`` of the tokens.
    """
    notes: list[str] = []
    table = table.by_arm
    found = {(run.name, d): density for run in table.runs for d in run.stats if (density := _density(run, d, counts, edges, dead))}
    runs = limit([run for run in table.runs if any(name == run.name for name, _ in found)], max_runs, "runs", notes)
    datasets = limit(sorted({d for name, d in found if any(run.name == name for run in runs)}), max_datasets, "datasets", notes)
    if not datasets:
        raise NothingToDrawError(f"no run has arrays {counts} and {edges}")
    drawn = {(run.name, d): found[run.name, d] for run in runs for d in datasets if (run.name, d) in found}
    low, high = min(density.edges[0] for density in drawn.values()), max(density.edges[-1] for density in drawn.values())
    look = looks(table)
    fig, axes = panels(len(runs), len(datasets), width=3.7, height=1.25 if len(runs) > 2 else 2.0, sharex=True, sharey=True)
    fig.set_figwidth(fig.get_figwidth() + 1.3)  # the names of the runs
    for row, run in enumerate(runs):
        for ax, dataset in zip(axes[row], datasets, strict=True):
            if row == 0:
                head_panel(ax, runs, dataset)
            tint(ax, run.stand_in(dataset))
            ax.axvspan(np.log10(dense_from), high, color=GREY, alpha=0.13, linewidth=0, zorder=0)
            if (run.name, dataset) in drawn:
                _draw_panel(ax, drawn[run.name, dataset], look[run.name].color, low, high)
                _annotate(ax, run, dataset, drawn[run.name, dataset], dense)
            else:
                ax.text(0.5, 0.5, "not stored", transform=ax.transAxes, ha="center", va="center", color=GREY)
        name = textwrap.fill(run.title, 18, max_lines=4, placeholder=" …")
        axes[row, 0].set_ylabel(name, color=look[run.name].color, weight="bold", rotation=0, ha="right", va="center")
    _axes(axes, list(drawn.values()), low, high)
    fig.supylabel("share of all latents", fontsize=9)
    notes += [f"Red: dead, never fired (cut where it leaves the panel). Grey: dense, fires on more than {percent(dense_from)} of the tokens."]
    return finish(fig, title, notes + caption(table, runs, datasets, error="histograms: mean over seeds"))


def _density(run: Run, dataset: str, counts: str, edges: str, dead: str) -> Density | None:
    arrays = [found for found in run.arrays(dataset).values() if counts in found and edges in found]
    usable = [a for a in arrays if _is_histogram(a[counts], a[edges])]
    same = [a for a in usable if np.array_equal(a[edges], usable[0][edges])]
    if bad := len(arrays) - len(same):
        log.warning("%s, %s: %d of %d density histograms are empty, damaged or have other edges; left out", run.name, dataset, bad, len(arrays))
    if not same:
        return None
    stat = run.stats[dataset].get(dead)
    silent = stat.mean if stat and stat.mean is not None and 0 <= stat.mean <= 1 else None
    alive = 1 - (silent or 0.0)
    shares = np.mean([a[counts] / a[counts].sum() for a in same], axis=0) * alive
    return Density(shares, same[0][edges], silent)


def _is_histogram(counts: np.ndarray, edges: np.ndarray) -> bool:
    return counts.ndim == 1 and edges.shape == (len(counts) + 1,) and bool(np.isfinite(edges).all()) and 0 < counts.sum() < np.inf


def _bar(low: float, high: float) -> tuple[float, float]:
    """Middle and width of the bar of the dead latents, left of the histogram."""
    return low - 0.07 * (high - low), 0.06 * (high - low)


def _draw_panel(ax: Axes, density: Density, color: str, low: float, high: float) -> None:
    ax.stairs(density.shares, density.edges, fill=True, color=color, alpha=0.75)
    middle, width = _bar(low, high)
    if density.dead:
        ax.bar(middle, density.dead, width, color=ALARM, label="dead")


def _annotate(ax: Axes, run: Run, dataset: str, density: Density, dense: str) -> None:
    stat = run.stats[dataset].get(dense)
    texts = [(0.015, "left", ALARM, "dead: not measured" if density.dead is None else f"dead {percent(density.dead)}")]
    texts += [(0.985, "right", "#444444", f"dense {percent(stat.mean)}")] if stat and stat.mean is not None else []
    for x, side, color, text in texts:
        box = {"facecolor": ax.get_facecolor(), "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
        ax.text(x, 0.96, text, transform=ax.transAxes, ha=side, va="top", fontsize=8, color=color, bbox=box)


def _axes(axes: np.ndarray, drawn: Sequence[Density], low: float, high: float) -> None:
    middle, width = _bar(low, high)
    first = axes[0, 0]
    first.set_ylim(0, 1.45 * max(density.shares.max() for density in drawn))  # the dead bar does not squash the histogram
    first.set_xlim(middle - width, high + 0.01 * (high - low))
    whole = np.arange(np.ceil(low), np.floor(high) + 1)
    ticks = whole[:: max(1, int(np.ceil(len(whole) / 8)))]
    ticks = ticks[ticks > middle + 0.11 * (high - low)]  # room for the word
    first.set_xticks([middle, *ticks], ["dead", *(f"$10^{{{int(t)}}}$" for t in ticks)])
    first.yaxis.set_major_locator(MaxNLocator(3))
    first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    for ax in axes[-1]:
        ax.set_xlabel("firing density (fraction of tokens)")
