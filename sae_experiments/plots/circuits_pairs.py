"""Circuits: gradients of chosen latents, gradients against cosines, attribution against effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr

from sae_experiments.errors import UserError
from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import row_caption
from sae_experiments.plots.selection import Arrays, find_rows, first_arrays, limit
from sae_experiments.plots.style import GREY, PALETTE
from sae_experiments.plots.text import minus
from sae_experiments.results.table import RunTable

SAME, EARLIER = PALETTE[0], PALETTE[1]  # pairs at the same position, and at an earlier one
MARKED = PALETTE[1]
Points = tuple[np.ndarray, np.ndarray]  # x (n,) and y (n,)
Pairs = tuple[Points, Points]  # pairs at the same position, and at an earlier one


@styled
def draw_gradients(
    table: RunTable, *, title: str, latents: int, max_rows: int, pool: str
) -> Figure:
    """Draw histograms of dA/dz of chosen downstream latents, each at its strongest firing.

    Rows of panels are runs and datasets; columns are downstream latents. The upstream latent of
    interest (the one asked for, or the one of largest attribution) is marked.

    Args:
        table: Runs.
        title: Title of the figure.
        latents: Maximum number of downstream latents per row.
        max_rows: Maximum number of rows to draw.
        pool: Upstream latents to draw. `active`: every one that is active at the firing or at an
            earlier position; `all`: every one, active or not, at the position of the firing.

    Raises:
        UserError: `pool` is neither `active` nor `all`.
        NothingToDrawError: No run stored gradients of chosen latents.
    """
    if pool not in ("active", "all"):
        raise UserError(f"pool={pool!r} in the figure of gradients is not one of active, all")
    notes: list[str] = []
    marked = "chosen_marked" if pool == "active" else "chosen_interest"
    rows = find_rows(
        table,
        first_arrays(marked, "chosen_latent", "chosen_gram"),
        missing=f"no run has gradients of chosen latents ({marked})",
    )
    rows = limit(rows, max_rows, "runs and datasets", notes)
    columns = min(latents, max(len(row.data[marked]) for row in rows))
    fig, axes = panels(len(rows), columns, width=2.5, height=2.0)
    for row, row_axes in zip(rows, axes, strict=True):
        for i, ax in enumerate(row_axes):
            _draw_latent(ax, row.data, i, pool)
        label = f"{row.dataset}\nupstream latents"
        row_axes[0].set_ylabel(f"{row.run.title}\n{label}" if len(rows) > 1 else label)
    for ax in axes[-1]:
        ax.set_xlabel("dA/dz")
        ax.xaxis.set_major_locator(MaxNLocator(4))
    notes.append(
        "Line: the upstream latent of largest attribution (or the one asked for). Each panel: one "
        "firing, the strongest in the prompts; first seed."
    )
    colors = {"all upstream latents": GREY, "active at this position": SAME}
    if pool == "active":
        colors = {"all active": SAME}
    handles = [Line2D([], [], color=c, linewidth=5, label=name) for name, c in colors.items()]
    handles.append(Line2D([], [], color=MARKED, linewidth=1.6, label="of interest"))
    return finish(fig, title, notes + row_caption(rows), handles)


def _draw_latent(ax: Axes, arrays: Arrays, i: int, pool: str) -> None:
    """Draw the gradients of the `i`-th chosen latent; hide the panel if there are fewer."""
    if i >= len(arrays["chosen_marked" if pool == "active" else "chosen_interest"]):
        ax.set_axis_off()
        return
    if pool == "active":
        _draw_histogram(ax, arrays[f"chosen_{i}_gradient"], int(arrays["chosen_marked"][i]))
    else:
        active = arrays[f"chosen_{i}_here"]
        interest = int(arrays["chosen_interest"][i])
        _draw_histogram(ax, arrays[f"chosen_{i}_every"], interest, active)
    quoted = (
        f"\N{LEFT DOUBLE QUOTATION MARK}{arrays['chosen_gram'][i]}\N{RIGHT DOUBLE QUOTATION MARK}"
    )
    ax.set_title(f"latent {arrays['chosen_latent'][i]}: {quoted}")


def _draw_histogram(
    ax: Axes, gradients: np.ndarray, marked: int, active: np.ndarray | None = None
) -> None:
    """Draw a histogram of gradients.

    Args:
        ax: Panel.
        gradients: Gradient of every upstream latent, (n,).
        marked: Index of the gradient that gets a line, with its value and rank by size.
        active: Mask (n,) of those that are drawn in a colour of their own; None for all.
    """
    span = float(np.abs(gradients).max()) or 1.0
    bins = np.linspace(-span, span, 61).tolist()
    if active is None:
        ax.hist(gradients, bins=bins, color=SAME, log=True)
    else:
        ax.hist(gradients, bins=bins, color=GREY, log=True)
        ax.hist(gradients[active], bins=bins, color=SAME, log=True)
    value = float(gradients[marked])
    ax.axvline(value, color=MARKED, linewidth=1.6)
    rank = int((np.abs(gradients) > abs(value)).sum()) + 1
    text = minus(f"{value:.2g}\nrank {rank}\nof {len(gradients):,}")
    x, side = (0.03, "left") if value > 0 else (0.97, "right")  # away from the line
    ax.text(x, 0.97, text, transform=ax.transAxes, va="top", ha=side, color=MARKED, fontsize=7)
    ax.set_ylim(0.7, None)


@styled
def draw_cosines(table: RunTable, *, title: str, points: int, max_rows: int) -> Figure:
    """Draw |gradient| against |cosine| of the weights, over active pairs of many prompts.

    Args:
        table: Runs.
        title: Title of the figure.
        points: Maximum number of pairs of each kind to draw, at random.
        max_rows: Maximum number of panels to draw, one per run and dataset.

    Raises:
        NothingToDrawError: No run stored a survey of pairs.
    """
    names = ("survey_gradient", "survey_cosine", "survey_same")
    return _scatter(table, title, max_rows, points, names, _cosine_pairs, _label_cosines)


def _cosine_pairs(arrays: Arrays) -> Pairs:
    same = arrays["survey_same"]
    cosine, gradient = np.abs(arrays["survey_cosine"]), np.abs(arrays["survey_gradient"])
    return (cosine[same], gradient[same]), (cosine[~same], gradient[~same])


def _label_cosines(ax: Axes, pairs: Pairs) -> str:
    """Scale and label a panel; returns its title."""
    gradients = np.concatenate([gradient for _, gradient in pairs])
    positive = gradients[gradients > 0]
    ax.set_yscale("log")
    ax.set_ylim(max(float(np.quantile(positive, 0.02)), 1e-12), float(positive.max()) * 2)
    ax.set_xlabel("|cosine| of the weights")
    ax.set_ylabel("|dA/dz|")
    same, earlier = (spearmanr(x, y)[0] if len(x) > 2 else np.nan for x, y in pairs)
    return f"rank correlation {same:.2f} (same), {earlier:.2f} (earlier)"


@styled
def draw_effects(table: RunTable, *, title: str, points: int, max_rows: int) -> Figure:
    """Draw the effect of removing one upstream latent against the one that attribution predicts.

    Args:
        table: Runs.
        title: Title of the figure.
        points: Maximum number of pairs of each kind to draw, at random.
        max_rows: Maximum number of panels to draw, one per run and dataset.

    Raises:
        NothingToDrawError: No run stored effects of removal.
    """
    names = ("pair_attribution", "pair_effect")
    return _scatter(table, title, max_rows, points, names, _effect_pairs, _label_effects)


def _effect_pairs(arrays: Arrays) -> Pairs:
    earlier = (np.zeros(0), np.zeros(0))
    if "earlier_pair_attribution" in arrays:
        earlier = (arrays["earlier_pair_attribution"], arrays["earlier_pair_effect"])
    return (arrays["pair_attribution"], arrays["pair_effect"]), earlier


def _label_effects(ax: Axes, pairs: Pairs) -> str:
    """Draw the diagonal and label a panel; returns its title."""
    values = np.concatenate([np.concatenate(points) for points in pairs])
    ends = [float(values.min()), float(values.max())]
    ax.plot(ends, ends, color=GREY, linewidth=0.8, linestyle="--", zorder=3)
    ax.set_xlabel("attribution z dA/dz")
    ax.set_ylabel("effect of removing it")
    same, earlier = (np.corrcoef(x, y)[0, 1] if len(x) > 2 else np.nan for x, y in pairs)
    return f"r = {same:.3f} (same), {earlier:.3f} (earlier)"


def _scatter(
    table: RunTable,
    title: str,
    max_rows: int,
    points: int,
    names: Sequence[str],
    pairs_of: Callable[[Arrays], Pairs],
    label_panel: Callable[[Axes, Pairs], str],
) -> Figure:
    """Draw a panel per run and dataset, with pairs at the same and at earlier positions.

    Args:
        table: Runs.
        title: Title of the figure.
        max_rows: Maximum number of panels to draw.
        points: Maximum number of pairs of each kind to draw, at random.
        names: Arrays that the figure needs.
        pairs_of: Takes the pairs from the arrays.
        label_panel: Labels a panel of pairs and returns its title.
    """
    notes: list[str] = []
    missing = f"no run has the pairs of a circuit ({', '.join(names)})"
    rows = find_rows(table, first_arrays(*names), missing)
    rows = limit(rows, max_rows, "runs and datasets", notes)
    several_runs = len({row.run.name for row in rows}) > 1
    columns = min(len(rows), 3)
    fig, axes = panels(-(-len(rows) // columns), columns, width=3.4, height=2.8)
    rng = np.random.default_rng(0)
    counts = []
    for ax, row in zip(axes.flat, rows, strict=False):
        pairs = pairs_of(row.data)
        counts.append(sum(len(x) for x, _ in pairs))
        text = label_panel(ax, pairs)
        where = f"{row.run.title}\n{row.dataset}: " if several_runs else f"{row.dataset}\n"
        ax.set_title(where + text, fontsize=8)
        for (x, y), color, zorder in zip(pairs, (SAME, EARLIER), (1, 2), strict=True):
            few = rng.permutation(len(x))[:points]
            style = {"s": 3, "color": color, "alpha": 0.35, "linewidths": 0, "zorder": zorder}
            ax.scatter(x[few], y[few], rasterized=True, **style)
    for ax in axes.flat[len(rows) :]:
        ax.set_axis_off()
    notes.append(_count_note(counts, points))
    handles = [
        Line2D([], [], color=SAME, marker="o", linestyle="", markersize=4, label="same position"),
        Line2D(
            [], [], color=EARLIER, marker="o", linestyle="", markersize=4, label="earlier position"
        ),
    ]
    return finish(fig, title, notes + row_caption(rows), handles)


def _count_note(counts: Sequence[int], points: int) -> str:
    if len(set(counts)) > 1:
        pairs = f"{min(counts):,} to {max(counts):,} pairs a panel"
    else:
        pairs = f"{counts[0]:,} pairs"
    return f"{pairs}, at most {points:,} of each kind drawn; first seed."
