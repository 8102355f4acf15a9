"""Purification: feature change under each kind of noise (columns), by kind trained with (rows)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import caption
from sae_experiments.plots.purification_runs import Fit, fits_of, hosts_of
from sae_experiments.plots.selection import limit
from sae_experiments.plots.text import clip
from sae_experiments.results.table import RunTable


@styled
def draw(table: RunTable, *, title: str, host: str, max_fits: int, max_corpora: int) -> Figure:
    """Draw a panel per corpus, a row per fit and a column per kind of noise in the test.

    Numbers are feature changes in per cent of the host's, means over seeds; a frame marks the kinds
    of noise that a fit was trained with.

    Args:
        table: Runs.
        title: Title of the figure.
        host: SAE that the others are compared with; see `hosts_of`.
        max_fits: Maximum number of fits to draw, hosts included.
        max_corpora: Maximum number of corpora to draw.

    Raises:
        NothingToDrawError: No corpus has a host and another fit.
    """
    notes: list[str] = []
    fits = limit(fits_of(table, "rob_kind_change"), max_fits, "fits", notes)
    hosts = hosts_of(fits, table, host, figure="a noise matrix")
    corpora = limit(list(hosts), max_corpora, "corpora", notes)
    rows = [fit for fit in fits if _is_compared(fit, hosts, corpora)]
    kinds = _kinds(rows[0], corpora)
    width, height = 1.0 + 0.47 * len(kinds), 0.6 + 0.27 * len(rows)
    fig, axes = panels(1, len(corpora), width=width, height=height, sharey=True)
    for ax, corpus in zip(axes[0], corpora, strict=True):
        ratios = [[_ratio(fit, hosts[corpus], corpus, kind) for kind in kinds] for fit in rows]
        _draw_ratios(ax, np.array(ratios))
        _frame_trained(ax, rows, kinds)
        ax.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
        ax.set_yticks(range(len(rows)), [clip(fit.label, 34) for fit in rows])
        ax.tick_params(length=0)
        ax.set_title(corpus, weight="bold", loc="left")
    notes.append(
        f"Feature change in % of that of the host ({clip(hosts[corpora[0]].label)}) under noise of "
        "size metric.robustness.eps (10 % of R unless changed): below 100 is more stable. "
        "Frames: kinds of noise used in training. – : not measured."
    )
    return finish(fig, title, notes + caption(table.runs, corpora, error="means over seeds"))


def _is_compared(fit: Fit, hosts: Mapping[str, Fit], corpora: Sequence[str]) -> bool:
    """Tell whether a fit has another one as its host on any of the corpora.

    The host on one corpus may be compared with another host on the next.
    """
    return any(corpus in fit.corpora and hosts[corpus] is not fit for corpus in corpora)


def _kinds(fit: Fit, corpora: Sequence[str]) -> list[str]:
    """The kinds of noise that a fit was tested with, on its first corpus."""
    corpus = next(corpus for corpus in corpora if corpus in fit.corpora)
    return [str(kind) for kind in fit.arrays(corpus)[0]["rob_kinds"]]


def _ratio(fit: Fit, host: Fit, corpus: str, kind: str) -> float:
    """Feature change in per cent of the host's; NaN if either was not measured."""
    change = fit.values(corpus, f"rob_change_{kind}")
    of_host = host.values(corpus, f"rob_change_{kind}")
    if not len(change) or not len(of_host) or of_host.mean() <= 0:
        return np.nan
    return float(100 * change.mean() / of_host.mean())


def _draw_ratios(ax: Axes, ratios: np.ndarray) -> None:
    """Draw the ratios, (fits, kinds), as coloured cells with numbers."""
    ax.imshow(ratios, cmap="RdYlGn_r", vmin=0, vmax=150, aspect="auto")
    ax.grid(visible=False)
    for (i, j), ratio in np.ndenumerate(ratios):
        text = f"{ratio:.0f}" if np.isfinite(ratio) else "–"
        ax.text(j, i, text, ha="center", va="center", fontsize=7.5, color="black")


def _frame_trained(ax: Axes, fits: Sequence[Fit], kinds: Sequence[str]) -> None:
    """Frame the cells of the kinds of noise that each fit was trained with."""
    for i, fit in enumerate(fits):
        trained = _trained_with(fit)
        for j, kind in enumerate(kinds):
            if trained.get(kind):
                corner = (j - 0.46, i - 0.46)
                frame = Rectangle(corner, 0.92, 0.92, fill=False, linewidth=1.4, edgecolor="black")
                ax.add_patch(frame)


def _trained_with(fit: Fit) -> dict[str, float]:
    """Shares of the kinds of noise in the training of a fit, from its configuration."""
    model = _model_config(fit)
    if "mixture" not in model:
        return {}
    weights = model.get("weights", {})
    if not any(weights.get(term) for term in ("stability", "denoise", "targeted")):
        return {}
    mixture = model["mixture"]
    noise = str(model.get("noise", "mixture"))  # one kind, "mixture", or "not_" and a kind
    if noise in mixture:
        return {noise: 1.0}
    return {kind: share for kind, share in mixture.items() if share and noise != f"not_{kind}"}


def _model_config(fit: Fit) -> dict[str, Any]:
    """The configuration of a fit's SAE; empty if the run does not record it."""
    sae = fit.run.config.get("sae")
    model = sae.get("model") if isinstance(sae, dict) else None
    return model if isinstance(model, dict) else {}
