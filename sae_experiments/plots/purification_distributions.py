"""Purification: activations clean against perturbed, over all latents and for some from the least to the most stable."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sae_experiments.plots.base import (
    NothingToDrawError,
    caption,
    clip,
    finish,
    limit,
    panels,
    styled,
)
from sae_experiments.plots.purification_runs import fits_of
from sae_experiments.results.table import RunTable

CLEAN, MOVED = "#0072B2", "#D55E00"


@styled
def draw(table: RunTable, *, title: str, corpus: str | None, latents: int, max_fits: int) -> Figure:
    """A row for each fit: all latents on the left, then ``latents`` single ones; of the first seed, on ``corpus`` (null: the first)."""
    notes: list[str] = []
    fits = fits_of(table, "rob_hist_all")
    names = [c for fit in fits for c in fit.corpora]
    chosen = corpus or (names[0] if names else "")
    fits = limit([f for f in fits if chosen in f.corpora and f.arrays(chosen)], max_fits, "fits", notes)
    if not fits:
        raise NothingToDrawError("no run has distributions under noise: add robustness to its metrics")
    fig, axes = panels(len(fits), latents + 1, width=1.9, height=1.75)
    for row, fit in enumerate(fits):
        found = fit.arrays(chosen)[0]
        _histogram(axes[row, 0], found["rob_hist_all_edges"], found["rob_hist_all"])
        axes[row, 0].set_ylabel(f"{clip(fit.label, 26)}\nactivations (log)", fontsize=7.5)
        picked = np.linspace(0, len(found["rob_hist_latents"]) - 1, min(latents, len(found["rob_hist_latents"]))).astype(int)
        for ax, i in zip(axes[row, 1:], picked, strict=False):
            _histogram(ax, found["rob_hist_edges"][i], found["rob_hist_counts"][i])
            off = " to ".join(f"{100 * float(z):.3g} %" for z in found["rob_hist_zeros"][i])
            ax.set_title(f"latent {found['rob_hist_latents'][i]}, FSS {found['rob_hist_fss'][i]:.0f}\noff: {off}", loc="left", fontsize=7.5)
        for ax in axes[row, 1 + len(picked) :]:
            ax.set_visible(False)
    axes[0, 0].set_title("all latents", loc="left", fontsize=7.5)
    axes[-1, 0].set_xlabel("value / latent's mean", fontsize=7.5)
    for ax in axes[-1, 1:]:
        ax.set_xlabel("value", fontsize=7.5)
    notes += [f"{chosen}, one seed. Non-zero activations; single latents go from less to more stable (5th to 95th percentile of FSS); 'off' is the share of rows without "
              "the latent, clean to perturbed."]  # fmt: skip
    legend = [Patch(color=CLEAN, alpha=0.5, label="clean"), Patch(facecolor="none", edgecolor=MOVED, label="under Gaussian noise")]
    return finish(fig, title, notes + caption(table, table.runs, [fits[0].reports[chosen]]), legend)


def _histogram(ax: Axes, edges: np.ndarray, counts: np.ndarray) -> None:
    ax.stairs(counts[0], edges, fill=True, color=CLEAN, alpha=0.5)
    ax.stairs(counts[1], edges, color=MOVED, linewidth=1.1)
    ax.set_yscale("symlog", linthresh=1)
    ax.tick_params(labelsize=6.5)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.set_xlim(edges[0], edges[-1])
