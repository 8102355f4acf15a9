"""Purification: how the code holds out as the noise grows, a line for each run with a band over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sae_experiments.plots.base import (
    NothingToDrawError,
    caption,
    clip,
    finish,
    limit,
    panels,
    styled,
)
from sae_experiments.plots.purification_runs import Fit, fits_of, handles_of, looks_of
from sae_experiments.results.table import RunTable

LABELS = {"fss": "FSS (pooled)", "change": "feature change (%)", "sci": "SCI (mean r)", "jaccard": "Jaccard index", "fvu": "FVU under noise"}


@styled
def draw(table: RunTable, *, title: str, value: str, kinds: Sequence[str], max_fits: int, max_corpora: int) -> Figure:
    """A row for each kind of noise, a column for each corpus: ``value`` (fss, change, sci, jaccard or fvu) over the size of the noise.

    Lines are means over seeds, bands reach from the least to the greatest seed.
    """
    notes: list[str] = []
    fits = limit(fits_of(table, "rob_curve_fss"), max_fits, "fits", notes)
    if not fits:
        raise NothingToDrawError("no run has robustness curves: add robustness to its metrics")
    corpora = limit(list(dict.fromkeys(c for fit in fits for c in fit.corpora)), max_corpora, "corpora", notes)
    present = [k for k in kinds if any(np.isfinite(line).any() for fit in fits for c in corpora if (line := _lines(fit, c, value, k)[1]).size)]
    fig, axes = panels(len(present), len(corpora), width=3.5, height=2.3, sharex=True, sharey="row")
    look = looks_of(fits)
    for row, kind in enumerate(present):
        for column, corpus in enumerate(corpora):
            ax = axes[row, column]
            for fit in fits:
                sizes, lines = _lines(fit, corpus, value, kind)
                if lines.size:
                    colour, marker, dash = look[fit.label]
                    ax.fill_between(sizes, lines.min(0), lines.max(0), color=colour, alpha=0.2, linewidth=0)
                    ax.plot(sizes, lines.mean(0), color=colour, marker=marker, markersize=4, linestyle=dash)
            _axes(ax, value, corpus if row == 0 else "", row == len(present) - 1)
        axes[row, 0].set_ylabel(f"{kind}\n{LABELS[value]}")
    notes += ["Noise of size eps R, R = mean distance of the held-out rows from their mean. Size 0 is left out."]
    reports = list(fits[0].reports.values())
    band = "lines: mean over seeds; bands: least to greatest seed"
    return finish(fig, title, notes + caption(table, table.runs, reports, error=band), handles_of(fits, look, clip))


def _lines(fit: Fit, corpus: str, value: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Sizes above 0, and a curve for each seed (n, sizes)."""
    found = []
    sizes = np.zeros(0)
    for a in fit.arrays(corpus):
        names = [str(k) for k in a["rob_kinds"]]
        if kind in names and np.isfinite(curve := a[f"rob_curve_{value}"][names.index(kind)]).all():
            sizes = a["rob_sizes"]
            found.append(curve[sizes > 0])
    return sizes[sizes > 0], np.array(found)


def _axes(ax: Axes, value: str, corpus: str, last: bool) -> None:
    ax.set_xscale("log")
    ax.set_xticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}"))
    ax.minorticks_off()
    if value in ("change", "fvu"):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    if corpus:
        ax.set_title(corpus, weight="bold", loc="left")
    if last:
        ax.set_xlabel("size of the noise (% of R)")
