"""Purification: what stability costs. Feature change against FVU, both relative to the host, a marker for each fit and kind of noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sae_experiments.plots.base import GREY, NothingToDrawError, caption, clip, finish, limit, panels, styled
from sae_experiments.plots.purification_runs import Fit, fits_of, handles_of, host_of, looks_of
from sae_experiments.run_table import RunTable


@styled
def draw(
    table: RunTable, *, title: str, kinds: Sequence[str], host: str, most_fvu: float, least_gain: float, max_fits: int, max_corpora: int
) -> Figure:
    """A row for each kind of noise, a column for each corpus. The shaded corner holds what the study asks for: FVU at most ``most_fvu`` of the host's
    and feature change at most ``least_gain`` of it. Thin line: fits that no other beats in both. ``host``: arm or run that is compared with.
    """
    notes: list[str] = []
    fits = limit(fits_of(table, "rob_kind_change"), max_fits, "fits", notes)
    corpora = list(dict.fromkeys(c for fit in fits for c in fit.corpora))
    hosts = {c: found for c in corpora if (found := host_of(fits, table, host, c)) is not None}
    if not hosts:
        raise NothingToDrawError("a front needs a host and a fit to compare with it on one corpus, both with the metric robustness")
    corpora = limit(list(hosts), max_corpora, "corpora", notes)
    fits = [f for f in fits if any(c in f.corpora for c in corpora)]
    first = hosts[corpora[0]]
    look = looks_of([first, *(f for f in fits if f is not first)])
    fig, axes = panels(len(kinds), len(corpora), width=3.5, height=2.5, sharey="row", sharex="col")
    for row, kind in enumerate(kinds):
        for column, corpus in enumerate(corpora):
            ax, points = axes[row, column], []
            for fit in fits:
                base = hosts[corpus]
                x, y = _relative(fit, base, corpus, "sae_fvu"), _relative(fit, base, corpus, f"rob_change_{kind}")
                if not len(x) or not len(y):
                    continue
                x, y, (colour, marker, _) = 100 * (x - 1), 100 * y, look[fit.label]
                points.append((x.mean(), y.mean()))
                ax.errorbar(
                    x.mean(),
                    y.mean(),
                    xerr=_error(x),
                    yerr=_error(y),
                    color=colour,
                    marker=marker,
                    markersize=6 if marker != "*" else 9,
                    linewidth=0.8,
                )
            _front(ax, points)
            ax.fill_between([-1000, 100 * (most_fvu - 1)], 0, 100 * least_gain, color="#009E73", alpha=0.1, linewidth=0, zorder=0)
            _axes(ax, points, corpus if row == 0 else "", row == len(kinds) - 1)
        axes[row, 0].set_ylabel(f"{kind}\nfeature change\n(% of the host's)")
    notes += [f"Green corner: FVU at most {100 * (most_fvu - 1):g} % above the host's ({clip(first.label)}) and at most {100 * least_gain:g} % of its "
              "feature change. Grey line: the fits that no other beats in both."]  # fmt: skip
    reports = [hosts[c].reports[c] for c in corpora]
    error = "error bars: ±1 standard error of the mean of the paired ratios (none where n = 1)"
    return finish(fig, title, notes + caption(table, table.runs, reports, error=error), handles_of(fits, look, clip, line=False))


def _relative(fit: Fit, base: Fit, corpus: str, metric: str) -> np.ndarray:
    """Values over the host's, seed by seed where both have the same seeds."""
    mine, theirs = fit.values(corpus, metric), base.values(corpus, metric)
    if not len(mine) or not len(theirs):
        return np.zeros(0)
    return mine / theirs if len(mine) == len(theirs) else mine / theirs.mean()


def _error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _front(ax: Axes, points: list[tuple[float, float]]) -> None:
    best = sorted(p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points))
    if len(best) > 1:
        ax.plot(*zip(*best, strict=True), color=GREY, linewidth=0.8, zorder=1)


def _axes(ax: Axes, points: list[tuple[float, float]], corpus: str, last: bool) -> None:
    xs = [p[0] for p in points] + [0, 4]
    width = max(xs) - min(xs)
    ax.set_xlim(min(xs) - 0.1 * width, max(xs) + 0.1 * width)
    ax.set_ylim(0, max([p[1] for p in points] + [100]) * 1.08)
    ax.axhline(100, color=GREY, linewidth=0.6, linestyle=":")
    ax.axvline(0, color=GREY, linewidth=0.6, linestyle=":")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g}" if v else "0"))
    if corpus:
        ax.set_title(corpus, weight="bold", loc="left")
    if last:
        ax.set_xlabel("FVU against the host's (%)")
