"""Circuits: deletion curves, what removing the first latents of an order takes from the target."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sae_experiments.plots.base import (
    GREY,
    PALETTE,
    NothingToDrawError,
    caption,
    finish,
    limit,
    panels,
    styled,
)
from sae_experiments.plots.circuits_pairs import found
from sae_experiments.results.table import RunTable

STYLES = {
    "attribution": (PALETTE[0], "-", "attribution"), "cosine": (PALETTE[1], "-", "cosine of weights"),
    "gated_cosine": (PALETTE[4], "--", "cosine, mean slopes"), "coactivation": (PALETTE[2], "-", "co-activation"),
    "activation": (PALETTE[3], "-.", "|activation|"), "random": (GREY, ":", "random active"),
}  # fmt: skip


@styled
def draw(table: RunTable, *, title: str, max_rows: int) -> Figure:
    """A row for each run and dataset: latents at the target's position, and all that it can depend on; bands: 95 % bootstrap over prompts."""
    notes: list[str] = []
    rows = limit(found(table, "deletion_counts", "deletion_attribution"), max_rows, "runs and datasets", notes)
    if not rows:
        raise NothingToDrawError("no run has deletion curves (deletion_counts)")
    fig, axes = panels(len(rows), 2, width=3.6, height=2.3)
    seen: dict[str, None] = {}
    for row, (run, dataset, a) in enumerate(rows):
        for ax, prefix, pool in zip(axes[row], ("", "all_"), ("at the target's position", "at all positions up to it"), strict=True):
            counts = a[f"{prefix}deletion_counts"]
            for method, (color, line, _) in STYLES.items():
                curve = a.get(f"{prefix}deletion_{method}")
                if curve is None:
                    continue
                seen[method] = None
                ax.plot(counts, curve[0], color=color, ls=line, marker="o", ms=2.5)
                if np.isfinite(curve[1:]).all():
                    ax.fill_between(counts, curve[1], curve[2], color=color, alpha=0.15, linewidth=0)
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_locator(FixedLocator(counts.tolist()))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            ax.axhline(0, color=GREY, lw=0.6)
            if row == 0:
                ax.set_title(pool, weight="bold")
            ax.set_xlabel("upstream latents removed" if row == len(rows) - 1 else "")
        axes[row, 0].set_ylabel(f"{run.title}\n{dataset}\nshare of A removed" if len(rows) > 1 else f"{dataset}\nshare of A removed")
    handles = [Line2D([], [], color=STYLES[m][0], ls=STYLES[m][1], label=STYLES[m][2]) for m in STYLES if m in seen]
    notes += ["A: pre-activation of the downstream latent; shares are ratios of sums over targets. First seed."]
    runs = list({run.name: run for run, _, _ in rows}.values())
    text = caption(table, runs, sorted({d for _, d, _ in rows}), error="bands: 95 % bootstrap over prompts")
    return finish(fig, title, notes + text, handles)
