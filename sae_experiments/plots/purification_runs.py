"""Fits that the purification figures compare: every SAE of every run, with its style and host.

The host is the fit that the others are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.lines import Line2D

from sae_experiments.plots.base import NothingToDrawError
from sae_experiments.plots.selection import Arrays
from sae_experiments.plots.style import BASELINE_STYLE, RunStyle, nth_style
from sae_experiments.plots.text import clip
from sae_experiments.results.table import Run, RunTable


@dataclass(frozen=True)
class Fit:
    """One SAE of one run on the corpora on which it has the data of a figure."""

    run: Run
    """The run, with this SAE alone."""
    corpora: tuple[str, ...]
    """Corpora with the data."""

    @property
    def label(self) -> str:
        """Title of the run, for legends."""
        return self.run.title

    def arrays(self, corpus: str) -> list[Arrays]:
        """Arrays of the metric `robustness`, one entry per seed."""
        stored = self.run.arrays(corpus).values()
        return [arrays for arrays in stored if "rob_kinds" in arrays]

    def values(self, corpus: str, metric: str) -> np.ndarray:
        """Values of a metric, (seeds,); the mean alone if single seeds are unknown; else empty."""
        stat = self.run.stats.get(corpus, {}).get(metric)
        if stat is None:
            return np.zeros(0)
        of_seeds = [value for value in stat.values.values() if value is not None]
        if not of_seeds and stat.mean is not None:
            of_seeds = [stat.mean]
        return np.array(of_seeds)


def fits_of(table: RunTable, array: str) -> list[Fit]:
    """Every fit that stored the array."""
    fits = []
    for run in table.runs:
        corpora = tuple(
            corpus
            for corpus in sorted(run.stats)
            if any(array in arrays for arrays in run.arrays(corpus).values())
        )
        if corpora:
            fits.append(Fit(run, corpora))
    return fits


def all_corpora(fits: Sequence[Fit]) -> list[str]:
    """Corpora of any of the fits, in the order of the fits."""
    return list(dict.fromkeys(corpus for fit in fits for corpus in fit.corpora))


def hosts_of(fits: Sequence[Fit], table: RunTable, host: str, *, figure: str) -> dict[str, Fit]:
    """The host on each corpus that several fits share.

    Args:
        fits: Fits to compare.
        table: Runs, with their baseline.
        host: Name of the SAE to prefer; else the only SAE of the baseline, else the first fit.
        figure: Figure that needs the hosts, for the error.

    Returns:
        Hosts by corpus, in the order of the fits.

    Raises:
        NothingToDrawError: No corpus is shared by several fits.
    """
    hosts = {}
    for corpus in all_corpora(fits):
        candidates = [fit for fit in fits if corpus in fit.corpora]
        named = [fit for fit in candidates if fit.run.sae == host]
        of_baseline = [fit for fit in candidates if fit.run is table.baseline]
        if len(candidates) > 1:
            hosts[corpus] = [*named, *of_baseline, *candidates][0]
    if not hosts:
        raise NothingToDrawError(
            f"{figure} needs a host and a fit to compare with it on one corpus, "
            "both with the metric robustness"
        )
    return hosts


def fit_styles(fits: Sequence[Fit]) -> dict[str, RunStyle]:
    """Style of each fit by label; the first is black."""
    styles = {fit.label: nth_style(i) for i, fit in enumerate(fits[1:])}
    return {fits[0].label: BASELINE_STYLE} | styles


def fit_handles(
    fits: Sequence[Fit], styles: dict[str, RunStyle], *, line: bool = True
) -> list[Line2D]:
    """Legend entries: markers, with lines if `line` is set."""
    handles = []
    for fit in fits:
        color, marker, dash = styles[fit.label]
        label = clip(fit.label)
        handle = Line2D([], [], color=color, marker=marker, markersize=5, label=label)
        handle.set_linestyle(dash if line else "")
        handles.append(handle)
    return handles
