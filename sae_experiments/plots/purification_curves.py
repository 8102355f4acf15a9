"""Purification: stability of the code as the noise grows, a line per fit with a band over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sae_experiments.plots.base import NothingToDrawError, finish, panels, styled
from sae_experiments.plots.captions import caption
from sae_experiments.plots.purification_runs import (
    Fit,
    all_corpora,
    fit_handles,
    fit_styles,
    fits_of,
)
from sae_experiments.plots.selection import limit
from sae_experiments.results.table import RunTable

LABELS = {
    "fss": "FSS (pooled)",
    "change": "feature change (%)",
    "sci": "SCI (mean r)",
    "jaccard": "Jaccard index",
    "fvu": "FVU under noise",
}
LOGARITHMIC = ("change", "fvu")


@styled
def draw(
    table: RunTable,
    *,
    title: str,
    value: str,
    kinds: Sequence[str],
    max_fits: int,
    max_corpora: int,
) -> Figure:
    """Draw a row of panels per kind of noise and a column per corpus, over the size of the noise.

    Lines are means over seeds; bands reach from the smallest to the largest seed.

    Args:
        table: Runs.
        title: Title of the figure.
        value: Measure to draw: fss, change, sci, jaccard or fvu.
        kinds: Kinds of noise; those that no fit was measured with are left out.
        max_fits: Maximum number of fits to draw.
        max_corpora: Maximum number of corpora to draw.

    Raises:
        NothingToDrawError: No run has robustness curves.
    """
    notes: list[str] = []
    fits = limit(fits_of(table, "rob_curve_fss"), max_fits, "fits", notes)
    if not fits:
        raise NothingToDrawError("no run has robustness curves: add robustness to its metrics")
    corpora = limit(all_corpora(fits), max_corpora, "corpora", notes)
    shown = [kind for kind in kinds if _is_measured(fits, corpora, value, kind)]
    fig, axes = panels(len(shown), len(corpora), width=3.5, height=2.3, sharex=True, sharey="row")
    styles = fit_styles(fits)
    for row, kind in enumerate(shown):
        for ax, corpus in zip(axes[row], corpora, strict=True):
            for fit in fits:
                sizes, lines = _lines(fit, corpus, value, kind)
                if lines.size:
                    color, marker, dash = styles[fit.label]
                    band = (lines.min(0), lines.max(0))
                    ax.fill_between(sizes, *band, color=color, alpha=0.2, linewidth=0)
                    mean = lines.mean(0)
                    ax.plot(sizes, mean, color=color, marker=marker, markersize=4, linestyle=dash)
            _scale_axes(ax, logarithmic=value in LOGARITHMIC)
            if row == 0:
                ax.set_title(corpus, weight="bold", loc="left")
        axes[row, 0].set_ylabel(f"{kind}\n{LABELS[value]}")
    for ax in axes[-1]:
        ax.set_xlabel("size of the noise (% of R)")
    notes.append(
        "Noise of size eps R, R = mean distance of the held-out rows from their mean. "
        "Size 0 is left out."
    )
    error = "lines: mean over seeds; bands: least to greatest seed"
    lines = notes + caption(table.runs, corpora, error=error)
    return finish(fig, title, lines, fit_handles(fits, styles))


def _is_measured(fits: Sequence[Fit], corpora: Sequence[str], value: str, kind: str) -> bool:
    curves = [_lines(fit, corpus, value, kind)[1] for fit in fits for corpus in corpora]
    return any(of_fit.size for of_fit in curves)


def _lines(fit: Fit, corpus: str, value: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of the noise above 0, (sizes,), and a curve for each seed, (seeds, sizes).

    Both are empty if no seed was measured with this kind of noise.
    """
    curves = []
    sizes = np.zeros(0)
    for arrays in fit.arrays(corpus):
        kinds = [str(known) for known in arrays["rob_kinds"]]
        if kind not in kinds:
            continue
        curve = arrays[f"rob_curve_{value}"][kinds.index(kind)]
        if np.isfinite(curve).all():
            sizes = arrays["rob_sizes"]
            curves.append(curve[sizes > 0])
    return sizes[sizes > 0], np.array(curves)


def _scale_axes(ax: Axes, *, logarithmic: bool) -> None:
    ax.set_xscale("log")
    ax.set_xticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{100 * size:g}"))
    ax.minorticks_off()
    if logarithmic and any((np.asarray(line.get_ydata()) > 0).any() for line in ax.lines):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
