"""What the purification figures share: the fits of all runs (a run may hold several SAEs), their names and looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.lines import Line2D

from sae_experiments.plots.base import BASELINE_COLOUR, LINES, MARKERS, PALETTE
from sae_experiments.results.table import Run, RunTable

Looks = dict[str, tuple[str, str, str]]


@dataclass(frozen=True)
class Fit:
    """One SAE of one run on every corpus: ``reports`` are its top-level names by corpus (``text8`` or ``text8.purified``)."""

    run: Run
    arm: str
    reports: dict[str, str]
    label: str

    @property
    def corpora(self) -> list[str]:
        """The corpora it was fitted on."""
        return list(self.reports)

    def arrays(self, corpus: str) -> list[dict[str, np.ndarray]]:
        """The stored arrays of the metric, one a seed."""
        return [a for a in self.run.arrays(self.reports.get(corpus, "")).values() if "rob_kinds" in a]

    def values(self, corpus: str, metric: str) -> np.ndarray:
        """A metric's values, one a seed (empty where there is none)."""
        stat = self.run.stats.get(self.reports.get(corpus, ""), {}).get(metric)
        if stat is None:
            return np.zeros(0)
        listed = [v for v in stat.values.values() if v is not None]
        return np.array(listed or ([stat.mean] if stat.mean is not None else []))


def fits_of(table: RunTable, array: str) -> list[Fit]:
    """Every fit that has the array; named by its run, or by its arm where a run has several."""
    found: list[Fit] = []
    for run in table.runs:
        arms: dict[str, dict[str, str]] = {}
        for report in sorted(run.stats):
            corpus, _, arm = report.partition(".")
            if any(array in a for a in run.arrays(report).values()):
                arms.setdefault(arm, {})[corpus] = report
        for arm, reports in arms.items():
            found.append(Fit(run, arm, reports, f"{run.name}: {arm}" if arm else run.title))
    return found


def host_of(fits: Sequence[Fit], table: RunTable, host: str, corpus: str) -> Fit | None:
    """The fit that others are compared with on a corpus: the arm called ``host``, else the baseline run's only SAE, else the first."""
    here = [fit for fit in fits if corpus in fit.corpora]
    ranked = [f for f in here if f.arm == host] + [f for f in here if not f.arm and f.run is table.baseline] + here
    return ranked[0] if len(here) > 1 else None


def looks_of(fits: Sequence[Fit]) -> Looks:
    """Colour, marker and line of each fit by label; the first is black."""
    first = fits[0].label
    others = [fit.label for fit in fits[1:]]
    return {first: (BASELINE_COLOUR, "*", "-")} | {
        label: (PALETTE[i % 8], MARKERS[(i + i // 8) % 8], LINES[(i // 8) % 4]) for i, label in enumerate(others)
    }


def handles_of(fits: Sequence[Fit], look: Looks, name: Callable[[str], str], *, line: bool = True) -> list[Line2D]:
    """Legend entries."""
    return [
        Line2D([], [], color=colour, marker=marker, markersize=5, linestyle=dash if line else "", label=name(fit.label))
        for fit in fits
        for colour, marker, dash in [look[fit.label]]
    ]


def hosts_of(fits: Sequence[Fit], table: RunTable, host: str) -> dict[str, Fit]:
    """The host of each corpus that has one, in the order of the fits."""
    corpora = dict.fromkeys(c for fit in fits for c in fit.corpora)
    return {c: found for c in corpora if (found := host_of(fits, table, host, c)) is not None}
