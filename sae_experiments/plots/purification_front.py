"""Purification: cost of stability. FSS and feature change against FVU, relative to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import caption
from sae_experiments.plots.purification_runs import (
    Fit,
    fit_handles,
    fit_styles,
    fits_of,
    hosts_of,
)
from sae_experiments.plots.selection import limit
from sae_experiments.plots.style import GREY, PALETTE, RunStyle
from sae_experiments.plots.text import clip
from sae_experiments.results.table import RunTable


class Measure(NamedTuple):
    """Vertical axis of a row of panels: a metric as it is, or in per cent of the host's."""

    title: str
    metric: str
    relative: bool


class Mark(NamedTuple):
    """One fit in a panel: means and standard errors over seeds."""

    x: float
    y: float
    x_error: float | None
    y_error: float | None


@styled
def draw(  # noqa: PLR0913 (keyword-only settings)
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
    """Draw a row of panels with FSS, then a row per kind of noise with feature change.

    Columns are corpora; the panels of a single corpus are set in two columns. The shaded corner is
    the target of the study. A thin line joins the Pareto-optimal fits.

    Args:
        table: Runs.
        title: Title of the figure.
        kinds: Kinds of noise.
        host: SAE that the others are compared with; see `hosts_of`.
        most_fvu: Right end of the shaded corner, as a multiple of the host's FVU.
        least_gain: Top of the shaded corner, as a fraction of the host's feature change.
        shown_fvu: Multiple of the host's FVU beyond which fits are only named in the caption.
        max_fits: Maximum number of fits to draw.
        max_corpora: Maximum number of corpora to draw.

    Raises:
        NothingToDrawError: No corpus has a host and another fit.
    """
    notes: list[str] = []
    fits = limit(fits_of(table, "rob_kind_change"), max_fits, "fits", notes)
    hosts = hosts_of(fits, table, host, figure="a front")
    corpora = limit(list(hosts), max_corpora, "corpora", notes)
    fits = [fit for fit in fits if not set(corpora).isdisjoint(fit.corpora)]
    first = hosts[corpora[0]]
    styles = fit_styles([first, *(fit for fit in fits if fit is not first)])
    measures = _measures(kinds)
    fig, axes = _panels(len(measures), len(corpora))
    outside: set[str] = set()
    for row, measure in zip(axes, measures, strict=True):
        for ax, corpus in zip(row, corpora, strict=True):
            marks = _marks(fits, hosts[corpus], corpus, measure)
            outside |= _take_beyond(marks, 100 * (shown_fvu - 1))
            _draw_marks(ax, marks, styles, measure.relative)
            if measure.relative:
                _shade_corner(ax, 100 * (most_fvu - 1), 100 * least_gain)
        row[0].set_ylabel(measure.title)
    for ax, corpus in zip(axes[0], corpora, strict=True):
        ax.set_title(corpus, weight="bold", loc="left")
    for ax in axes.flat[-2 if len(corpora) == 1 else -len(corpora) :]:
        ax.set_xlabel("FVU against the host's (%)")
    notes.append(
        f"Green corner: FVU at most {100 * (most_fvu - 1):g} % above the host's "
        f"({clip(first.label)}) and at most {100 * least_gain:g} % of its feature change. "
        "Grey line: the fits that no other beats in both. "
        "Noise of size metric.robustness.eps (10 % of R unless changed)."
    )
    notes += _outside_note(outside, 100 * (shown_fvu - 1))
    error = "error bars: ±1 standard error of the mean of the paired ratios (none where n = 1)"
    lines = notes + caption(table.runs, corpora, error=error)
    return finish(fig, title, lines, fit_handles(fits, styles, line=False))


def _measures(kinds: Sequence[str]) -> list[Measure]:
    measures = [Measure("FSS\n(median latent)", "rob_fss", relative=False)]
    for kind in kinds:
        label = f"{kind}\nfeature change\n(% of the host's)"
        measures.append(Measure(label, f"rob_change_{kind}", relative=True))
    return measures


def _panels(measures: int, corpora: int) -> tuple[Figure, np.ndarray]:
    """The figure and its axes, (measures, corpora); those of a single corpus fill two columns."""
    if corpora > 1:
        return panels(measures, corpora, width=3.5, height=2.5, sharey="row", sharex="col")
    rows = -(-measures // 2)
    fig, axes = panels(rows, 2, width=3.7, height=2.5)
    return fig, axes.reshape(-1, 1)[:measures]


def _marks(fits: Sequence[Fit], host: Fit, corpus: str, measure: Measure) -> dict[str, Mark]:
    """Marks of the fits by label: FVU above the host's in per cent, and the measure."""
    marks = {}
    for fit in fits:
        x = 100 * (_relative(fit, host, corpus, "sae_fvu") - 1)
        if measure.relative:
            y = 100 * _relative(fit, host, corpus, measure.metric)
        else:
            y = fit.values(corpus, measure.metric)
        if len(x) and len(y):
            marks[fit.label] = Mark(x.mean(), y.mean(), _stderr(x), _stderr(y))
    return marks


def _relative(fit: Fit, host: Fit, corpus: str, metric: str) -> np.ndarray:
    """Values over the host's, (seeds,): seed by seed if both have as many, else over its mean."""
    values, of_host = fit.values(corpus, metric), host.values(corpus, metric)
    if not len(values) or not len(of_host):
        return np.zeros(0)
    return values / (of_host if len(values) == len(of_host) else of_host.mean())


def _stderr(values: np.ndarray) -> float | None:
    if len(values) < 2:
        return None
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _take_beyond(marks: dict[str, Mark], most_x: float) -> set[str]:
    """Remove the marks to the right of `most_x`; returns the names of their fits."""
    beyond = [label for label, mark in marks.items() if mark.x > most_x]
    for label in beyond:
        del marks[label]
    return {clip(label) for label in beyond}


def _outside_note(names: set[str], most_x: float) -> list[str]:
    if not names:
        return []
    return [f"Not shown, with more than {most_x:g} % more FVU: {', '.join(sorted(names))}."]


def _draw_marks(
    ax: Axes, marks: dict[str, Mark], styles: dict[str, RunStyle], relative: bool
) -> None:
    """Draw the marks of a panel and their front, and scale the panel to them."""
    for label, mark in marks.items():
        style = styles[label]
        ax.errorbar(
            mark.x,
            mark.y,
            xerr=mark.x_error,
            yerr=mark.y_error,
            color=style.color,
            marker=style.marker,
            markersize=9 if style.marker == "*" else 6,
            linewidth=0.8,
        )
    _draw_front(ax, list(marks.values()), sign=-1 if relative else 1)
    _scale_axes(ax, list(marks.values()), relative)


def _draw_front(ax: Axes, marks: Sequence[Mark], sign: int) -> None:
    """Draw a line through the best marks: least x and, if `sign` is 1, largest y, else least y."""
    points = [(mark.x, -sign * mark.y) for mark in marks]
    best = sorted(point for point in points if not _is_beaten(point, points))
    if len(best) > 1:
        xs = [x for x, _ in best]
        ys = [-sign * y for _, y in best]
        ax.plot(xs, ys, color=GREY, linewidth=0.8, zorder=1)


def _is_beaten(point: tuple[float, float], points: Sequence[tuple[float, float]]) -> bool:
    """True if another point is at most as large in both coordinates."""
    others = [other for other in points if other != point]
    return any(x <= point[0] and y <= point[1] for x, y in others)


def _scale_axes(ax: Axes, marks: Sequence[Mark], relative: bool) -> None:
    """Set the limits, and draw lines where the host is."""
    xs = [mark.x for mark in marks] + [0, 4]
    margin = 0.1 * (max(xs) - min(xs))
    ax.set_xlim(min(xs) - margin, max(xs) + margin)
    if relative:
        ys = [mark.y for mark in marks] + [100]
        ax.set_ylim(0, max(ys) * 1.08)
        ax.axhline(100, color=GREY, linewidth=0.6, linestyle=":")
    ax.axvline(0, color=GREY, linewidth=0.6, linestyle=":")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}" if x else "0"))


def _shade_corner(ax: Axes, most_x: float, most_y: float) -> None:
    ax.fill_between([-1000, most_x], 0, most_y, color=PALETTE[2], alpha=0.1, linewidth=0, zorder=0)
