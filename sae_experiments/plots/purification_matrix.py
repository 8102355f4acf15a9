"""Purification: what helps against what. Feature change under each kind of noise (columns) after training with each (rows)."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sae_experiments.plots.base import (
    NothingToDrawError,
    caption,
    clip,
    finish,
    limit,
    panels,
    styled,
)
from sae_experiments.plots.purification_runs import Fit, fits_of, hosts_of
from sae_experiments.results.table import RunTable


@styled
def draw(table: RunTable, *, title: str, host: str, max_fits: int, max_corpora: int) -> Figure:
    """A panel for each corpus, a row for each fit, a column for each kind of noise it is tested with: feature change in per cent of the host's.

    Numbers are means over seeds; a frame marks the kinds of noise that a fit was trained with.
    """
    notes: list[str] = []
    fits = limit(fits_of(table, "rob_kind_change"), max_fits, "fits", notes)
    hosts = hosts_of(fits, table, host)
    if not hosts:
        raise NothingToDrawError("a noise matrix needs a host and a fit to compare with it on one corpus, both with the metric robustness")
    corpora = limit(list(hosts), max_corpora, "corpora", notes)
    rows = [f for f in fits if f not in hosts.values() and any(c in f.corpora for c in corpora)]
    kinds = [str(k) for k in rows[0].arrays(next(c for c in corpora if c in rows[0].corpora))[0]["rob_kinds"]]
    fig, axes = panels(1, len(corpora), width=1.0 + 0.47 * len(kinds), height=0.6 + 0.27 * len(rows), sharey=True)
    colours = mpl.colormaps["RdYlGn_r"]
    for ax, corpus in zip(axes[0], corpora, strict=True):
        grid = np.array([[_ratio(fit, hosts[corpus], corpus, kind) for kind in kinds] for fit in rows])
        ax.imshow(grid, cmap=colours, vmin=0, vmax=150, aspect="auto")
        ax.grid(visible=False)
        for i, fit in enumerate(rows):
            trained = _trained_with(fit)
            for j, kind in enumerate(kinds):
                text = f"{grid[i, j]:.0f}" if np.isfinite(grid[i, j]) else "–"
                ax.text(j, i, text, ha="center", va="center", fontsize=7.5, color="black")
                if trained.get(kind):
                    ax.add_patch(Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, linewidth=1.4, edgecolor="black"))
        ax.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
        ax.set_yticks(range(len(rows)), [clip(fit.label, 34) for fit in rows])
        ax.tick_params(length=0)
        ax.set_title(corpus, weight="bold", loc="left")
    notes += [f"Feature change in % of that of the host ({clip(hosts[corpora[0]].label)}) under noise of size metric.robustness.eps (10 % of R unless "
              "changed): below 100 is more stable. Frames: kinds of noise used in training. – : not measured."]  # fmt: skip
    reports = [hosts[c].reports[c] for c in corpora]
    return finish(fig, title, notes + caption(table, table.runs, reports, error="means over seeds"))


def _ratio(fit: Fit, base: Fit, corpus: str, kind: str) -> float:
    mine, theirs = (f.values(corpus, f"rob_change_{kind}") for f in (fit, base))
    return float(100 * mine.mean() / theirs.mean()) if len(mine) and len(theirs) and theirs.mean() > 0 else np.nan


def _trained_with(fit: Fit) -> dict[str, float]:
    """Shares of the kinds of noise that the configuration of a fit names."""
    arms = fit.run.config.get("arms")
    arm = arms.get(fit.arm or next(iter(arms), ""), {}) if isinstance(arms, dict) else {}
    model = arm.get("model") if isinstance(arm, dict) else None
    if (
        not isinstance(model, dict)
        or "mixture" not in model
        or not any(model.get("weights", {}).get(t) for t in ("stability", "denoise", "targeted"))
    ):
        return {}
    noise = str(model.get("noise", "mixture"))
    if noise in model["mixture"]:
        return {noise: 1.0}
    return {kind: share for kind, share in model["mixture"].items() if share and noise != f"not_{kind}"}
