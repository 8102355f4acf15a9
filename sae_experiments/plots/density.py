"""Histogram of log10 firing density of the latents, with the dead and the dense ones marked."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sae_experiments.plots.axes import center_text, head_panel, tint
from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import caption
from sae_experiments.plots.selection import Mean, choose_panels, find_panels, mean_of
from sae_experiments.plots.style import ALARM, GREY, run_styles
from sae_experiments.plots.text import percent
from sae_experiments.results.table import Run, RunTable

log = logging.getLogger(__name__)


class Density(NamedTuple):
    """Distribution of the latents' firing rates, mean over seeds."""

    shares: np.ndarray  # (bins,) latents that fired, in every bin
    edges: np.ndarray  # (bins + 1,) log10 of the fraction of tokens
    dead: float | None  # latents that never fired; None if not measured


class Span(NamedTuple):
    """First and last edge of all histograms in a figure, and the bar of the dead latents."""

    low: float
    high: float

    @property
    def width(self) -> float:
        """Width of the histogram."""
        return self.high - self.low

    @property
    def dead_middle(self) -> float:
        """Middle of the bar of the dead latents, to the left of the histogram."""
        return self.low - 0.07 * self.width

    @property
    def dead_width(self) -> float:
        """Width of the bar of the dead latents."""
        return 0.06 * self.width


@styled
def draw(  # noqa: PLR0913 (keyword-only settings)
    table: RunTable,
    *,
    title: str,
    counts: str,
    edges: str,
    dead: str,
    dense: str,
    dense_from: float,
    max_runs: int,
    max_datasets: int,
) -> Figure:
    """Draw a row of panels per run and a column per dataset.

    Args:
        table: Runs.
        title: Title of the figure.
        counts: Array with the number of latents between the edges, of those that fired at all.
        edges: Array with the edges: log10 of the fraction of tokens on which a latent fires.
        dead: Metric with the share of latents that never fired, drawn as a red bar on the left.
        dense: Metric with the share of latents that fire on more than `dense_from` of the tokens.
        dense_from: Fraction of tokens above which the background is grey.
        max_runs: Maximum number of runs to draw.
        max_datasets: Maximum number of datasets to draw.

    Raises:
        NothingToDrawError: No run has both arrays.
    """
    notes: list[str] = []
    densities = find_panels(
        table,
        lambda run, dataset: _density(run, dataset, counts, edges, dead),
        missing=f"no run has arrays {counts} and {edges}",
    )
    runs, datasets = choose_panels(
        table, densities, max_runs=max_runs, max_datasets=max_datasets, notes=notes
    )
    keys = [(run.name, dataset) for run in runs for dataset in datasets]
    drawn = {key: densities[key] for key in keys if key in densities}
    span = _span(drawn.values())
    styles = run_styles(table)
    height = 1.25 if len(runs) > 2 else 2.0
    fig, axes = panels(len(runs), len(datasets), width=3.7, height=height, sharex=True, sharey=True)
    fig.set_figwidth(fig.get_figwidth() + 1.3)  # room for the names of the runs
    for row, run in zip(axes, runs, strict=True):
        color = styles[run.name].color
        for ax, dataset in zip(row, datasets, strict=True):
            if run is runs[0]:
                head_panel(ax, runs, dataset)
            tint(ax, run.stand_in(dataset))
            _shade_dense(ax, np.log10(dense_from), span)
            density = drawn.get((run.name, dataset))
            if density is None:
                center_text(ax, "not stored", GREY)
                continue
            _draw_histogram(ax, density, span, color)
            _write_shares(ax, density.dead, mean_of(run, dataset, dense))
        _name_row(row[0], run.title, color)
    _scale_axes(axes, drawn.values(), span)
    fig.supylabel("share of all latents", fontsize=9)
    notes.append(
        "Red: dead, never fired (cut where it leaves the panel). "
        f"Grey: dense, fires on more than {percent(dense_from)} of the tokens."
    )
    return finish(fig, title, notes + caption(runs, datasets, error="histograms: mean over seeds"))


def _density(run: Run, dataset: str, counts: str, edges: str, dead: str) -> Density | None:
    """The mean histogram over the seeds that share the edges of the first; None without any."""
    stored = [a for a in run.arrays(dataset).values() if counts in a and edges in a]
    usable = [a for a in stored if _is_histogram(a[counts], a[edges])]
    used = [a for a in usable if np.array_equal(a[edges], usable[0][edges])]
    if len(used) < len(stored):
        log.warning(
            "%s, %s: %d of %d density histograms are empty, damaged or have other edges; left out",
            run.name,
            dataset,
            len(stored) - len(used),
            len(stored),
        )
    if not used:
        return None
    measured = mean_of(run, dataset, dead)
    dead_share = measured.value if measured and 0 <= measured.value <= 1 else None
    alive_share = 1 - (dead_share or 0.0)
    shares = np.mean([a[counts] / a[counts].sum() for a in used], axis=0) * alive_share
    return Density(shares, used[0][edges], dead_share)


def _is_histogram(counts: np.ndarray, edges: np.ndarray) -> bool:
    if counts.ndim != 1 or edges.shape != (len(counts) + 1,):
        return False
    return bool(np.isfinite(edges).all()) and 0 < counts.sum() < np.inf


def _span(densities: Iterable[Density]) -> Span:
    edges = np.concatenate([density.edges for density in densities])
    return Span(edges.min(), edges.max())


def _name_row(ax: Axes, name: str, color: str) -> None:
    """Write the name of a run to the left of its panels."""
    lines = textwrap.fill(name, 18, max_lines=4, placeholder=" …")
    ax.set_ylabel(lines, color=color, weight="bold", rotation=0, ha="right", va="center")


def _shade_dense(ax: Axes, low: float, span: Span) -> None:
    ax.axvspan(low, span.high, color=GREY, alpha=0.13, linewidth=0, zorder=0)


def _draw_histogram(ax: Axes, density: Density, span: Span, color: str) -> None:
    ax.stairs(density.shares, density.edges, fill=True, color=color, alpha=0.75)
    if density.dead:
        ax.bar(span.dead_middle, density.dead, span.dead_width, color=ALARM, label="dead")


def _write_shares(ax: Axes, dead: float | None, dense: Mean | None) -> None:
    """Write the shares of dead and of dense latents into the upper corners of a panel."""
    box = {"facecolor": ax.get_facecolor(), "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
    place: Any = {"transform": ax.transAxes, "va": "top", "fontsize": 8, "bbox": box}
    text = "dead: not measured" if dead is None else f"dead {percent(dead)}"
    ax.text(0.015, 0.96, text, ha="left", color=ALARM, **place)
    if dense:
        ax.text(0.985, 0.96, f"dense {percent(dense.value)}", ha="right", color="#444444", **place)


def _scale_axes(axes: np.ndarray, drawn: Iterable[Density], span: Span) -> None:
    """Set the limits and ticks that all panels share."""
    first = axes[0, 0]
    # The limit follows the histograms alone, so that a tall dead bar does not flatten them.
    first.set_ylim(0, 1.45 * max(density.shares.max() for density in drawn))
    first.set_xlim(span.dead_middle - span.dead_width, span.high + 0.01 * span.width)
    powers = np.arange(np.ceil(span.low), np.floor(span.high) + 1)
    powers = powers[:: max(1, int(np.ceil(len(powers) / 8)))]
    powers = powers[powers > span.dead_middle + 0.11 * span.width]  # room for the word "dead"
    labels = ["dead", *(f"$10^{{{int(power)}}}$" for power in powers)]
    first.set_xticks([span.dead_middle, *powers], labels)
    first.yaxis.set_major_locator(MaxNLocator(3))
    first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    for ax in axes[-1]:
        ax.set_xlabel("firing density (fraction of tokens)")
