"""Purification: activations clean against perturbed, of all latents and of some single ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sae_experiments.plots.base import NothingToDrawError, finish, panels, styled
from sae_experiments.plots.captions import caption
from sae_experiments.plots.purification_runs import all_corpora, fits_of
from sae_experiments.plots.selection import Arrays, limit
from sae_experiments.plots.style import PALETTE
from sae_experiments.plots.text import clip
from sae_experiments.results.table import RunTable

CLEAN, PERTURBED = PALETTE[0], PALETTE[1]
SMALL: Any = {"loc": "left", "fontsize": 7.5}  # titles


@styled
def draw(table: RunTable, *, title: str, corpus: str | None, latents: int, max_fits: int) -> Figure:
    """Draw a row of panels per fit, of its first seed: all latents on the left, then single ones.

    Args:
        table: Runs.
        title: Title of the figure.
        corpus: Corpus to draw; None for the first.
        latents: Number of single latents, from the least to the most stable.
        max_fits: Maximum number of fits to draw.

    Raises:
        NothingToDrawError: No run has distributions under noise, or none on this corpus.
    """
    notes: list[str] = []
    fits = fits_of(table, "rob_hist_all")
    chosen = corpus or next(iter(all_corpora(fits)), "")
    stored = [(fit, fit.arrays(chosen)) for fit in fits if chosen in fit.corpora]
    drawn = [(fit, of_seeds[0]) for fit, of_seeds in stored if of_seeds]
    drawn = limit(drawn, max_fits, "fits", notes)
    if not drawn:
        raise NothingToDrawError(
            "no run has distributions under noise: add robustness to its metrics"
        )
    fig, axes = panels(len(drawn), latents + 1, width=1.9, height=1.75)
    for row, (fit, arrays) in zip(axes, drawn, strict=True):
        _draw_histogram(row[0], arrays["rob_hist_all_edges"], arrays["rob_hist_all"])
        row[0].set_ylabel(f"{clip(fit.label, 26)}\nactivations (log)", fontsize=7.5)
        _draw_latents(row[1:], arrays)
    axes[0, 0].set_title("all latents", **SMALL)
    axes[-1, 0].set_xlabel("value / latent's mean", fontsize=7.5)
    for ax in axes[-1, 1:]:
        ax.set_xlabel("value", fontsize=7.5)
    notes.append(
        f"{chosen}, one seed. Non-zero activations; single latents go from less to more stable "
        "(5th to 95th percentile of FSS); 'off' is the share of rows without the latent, clean to "
        "perturbed."
    )
    handles = [
        Patch(color=CLEAN, alpha=0.5, label="clean"),
        Patch(facecolor="none", edgecolor=PERTURBED, label="under Gaussian noise"),
    ]
    return finish(fig, title, notes + caption(table.runs, [chosen]), handles)


def _draw_latents(axes: np.ndarray, arrays: Arrays) -> None:
    """Draw a panel for each of some stored latents, spread over their order; hide what is left."""
    stored = len(arrays["rob_hist_latents"])
    picked = np.linspace(0, stored - 1, min(len(axes), stored)).astype(int)
    for ax, i in zip(axes, picked, strict=False):
        _draw_histogram(ax, arrays["rob_hist_edges"][i], arrays["rob_hist_counts"][i])
        latent, fss = arrays["rob_hist_latents"][i], arrays["rob_hist_fss"][i]
        off = " to ".join(f"{100 * float(share):.3g} %" for share in arrays["rob_hist_zeros"][i])
        ax.set_title(f"latent {latent}, FSS {fss:.0f}\noff: {off}", **SMALL)
    for ax in axes[len(picked) :]:
        ax.set_visible(False)


def _draw_histogram(ax: Axes, edges: np.ndarray, counts: np.ndarray) -> None:
    """Draw the activations of clean and of perturbed rows; `counts` is (2, bins)."""
    clean, perturbed = counts
    ax.stairs(clean, edges, fill=True, color=CLEAN, alpha=0.5)
    ax.stairs(perturbed, edges, color=PERTURBED, linewidth=1.1)
    ax.set_yscale("symlog", linthresh=1)
    ax.tick_params(labelsize=6.5)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.set_xlim(edges[0], edges[-1])
