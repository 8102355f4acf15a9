"""Purification: what stability costs. FSS and feature change against FVU, relative to the host; a marker for each fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sae_experiments.plots.base import (
    GREY,
    NothingToDrawError,
    caption,
    clip,
    finish,
    limit,
    panels,
    styled,
)
from sae_experiments.plots.purification_runs import Fit, fits_of, handles_of, hosts_of, looks_of
from sae_experiments.results.table import RunTable


class Row(NamedTuple):
    """A row of panels: ``metric`` over FVU, as it is or in per cent of the host's."""

    title: str
    metric: str
    relative: bool


@styled
def draw(
    table: RunTable,
    *,
    title: str,
    kinds: Sequence[str],
    host: str,
    most_fvu: float,
    least_gain: float,
    shown_fvu: float,
    max_fits: int,
    max_corpora: int,
) -> Figure:
    """FSS in the first row, then a row of feature change for each kind of noise; a column for each corpus (two columns of panels for a single one). The
    shaded corner holds what the study asks for: FVU at most ``most_fvu`` of the host's and feature change at most ``least_gain`` of it. Thin line: fits
    that no other beats in both. ``host``: arm or run that is compared with. Fits with more than ``shown_fvu`` of its FVU lie outside the panels.
    """
    notes: list[str] = []
    fits = limit(fits_of(table, "rob_kind_change"), max_fits, "fits", notes)
    hosts = hosts_of(fits, table, host)
    if not hosts:
        raise NothingToDrawError("a front needs a host and a fit to compare with it on one corpus, both with the metric robustness")
    corpora = limit(list(hosts), max_corpora, "corpora", notes)
    fits = [f for f in fits if any(c in f.corpora for c in corpora)]
    first, outside = hosts[corpora[0]], set[str]()
    look = looks_of([first, *(f for f in fits if f is not first)])
    rows = [Row("FSS\n(median latent)", "rob_fss", False)]
    rows += [Row(f"{kind}\nfeature change\n(% of the host's)", f"rob_change_{kind}", True) for kind in kinds]
    alone = len(corpora) == 1
    fig, axes = (
        panels(-(-len(rows) // 2), 2, width=3.7, height=2.5)
        if alone
        else panels(len(rows), len(corpora), width=3.5, height=2.5, sharey="row", sharex="col")
    )
    axes = axes.reshape(-1, 1)[: len(rows)] if alone else axes
    for line, row in enumerate(rows):
        for column, corpus in enumerate(corpora):
            ax, points = axes[line, column], []
            for fit in fits:
                x, y = _relative(fit, hosts[corpus], corpus, "sae_fvu"), _values(row, fit, hosts[corpus], corpus)
                if not len(x) or not len(y):
                    continue
                x, (colour, marker, _) = 100 * (x - 1), look[fit.label]
                if x.mean() > 100 * (shown_fvu - 1):
                    outside.add(clip(fit.label))
                    continue
                points.append((x.mean(), y.mean()))
                size = 6 if marker != "*" else 9
                ax.errorbar(x.mean(), y.mean(), xerr=_error(x), yerr=_error(y), color=colour, marker=marker, markersize=size, linewidth=0.8)
            _front(ax, points, -1 if row.relative else 1)
            _axes(ax, points, row.relative, corpus if line == 0 else "", line >= len(rows) - (2 if alone else 1))
            if row.relative:
                ax.fill_between([-1000, 100 * (most_fvu - 1)], 0, 100 * least_gain, color="#009E73", alpha=0.1, linewidth=0, zorder=0)
        axes[line, 0].set_ylabel(row.title)
    notes += [f"Green corner: FVU at most {100 * (most_fvu - 1):g} % above the host's ({clip(first.label)}) and at most {100 * least_gain:g} % of its "
              "feature change. Grey line: the fits that no other beats in both. Noise of size metric.robustness.eps (10 % of R unless changed)."]  # fmt: skip
    notes += [f"Not shown, with more than {100 * (shown_fvu - 1):g} % more FVU: {', '.join(sorted(outside))}."] if outside else []
    reports = [hosts[c].reports[c] for c in corpora]
    error = "error bars: ±1 standard error of the mean of the paired ratios (none where n = 1)"
    return finish(fig, title, notes + caption(table, table.runs, reports, error=error), handles_of(fits, look, clip, line=False))


def _values(row: Row, fit: Fit, base: Fit, corpus: str) -> np.ndarray:
    return 100 * _relative(fit, base, corpus, row.metric) if row.relative else fit.values(corpus, row.metric)


def _relative(fit: Fit, base: Fit, corpus: str, metric: str) -> np.ndarray:
    """Values over the host's, seed by seed where both have the same seeds."""
    mine, theirs = fit.values(corpus, metric), base.values(corpus, metric)
    if not len(mine) or not len(theirs):
        return np.zeros(0)
    return mine / theirs if len(mine) == len(theirs) else mine / theirs.mean()


def _error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _front(ax: Axes, points: list[tuple[float, float]], up: int) -> None:
    """The line through the best points: least FVU and, by the sign of ``up``, most or least of the other."""
    signed = [(x, -up * y) for x, y in points]
    best = sorted(p for p in signed if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in signed))
    if len(best) > 1:
        ax.plot([x for x, _ in best], [-up * y for _, y in best], color=GREY, linewidth=0.8, zorder=1)


def _axes(ax: Axes, points: list[tuple[float, float]], relative: bool, corpus: str, last: bool) -> None:
    xs = [p[0] for p in points] + [0, 4]
    width = max(xs) - min(xs)
    ax.set_xlim(min(xs) - 0.1 * width, max(xs) + 0.1 * width)
    if relative:
        ax.set_ylim(0, max([p[1] for p in points] + [100]) * 1.08)
        ax.axhline(100, color=GREY, linewidth=0.6, linestyle=":")
    ax.axvline(0, color=GREY, linewidth=0.6, linestyle=":")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g}" if v else "0"))
    if corpus:
        ax.set_title(corpus, weight="bold", loc="left")
    if last:
        ax.set_xlabel("FVU against the host's (%)")
