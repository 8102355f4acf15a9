"""Circuits: gradients with the latent of interest marked, gradients against cosines, and predicted against actual effects of removal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import spearmanr

from sae_experiments.errors import UserError
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
from sae_experiments.results.table import Run, RunTable

SAME, EARLIER = PALETTE[0], PALETTE[1]
Found = tuple[Run, str, dict[str, np.ndarray]]


def found(table: RunTable, *names: str) -> list[Found]:
    """Run, dataset and arrays of the first seed that has all of ``names``, for every run and dataset."""
    return [
        (run, d, a) for run in table.runs for d in sorted(run.stats) if (a := next((a for a in run.arrays(d).values() if {*names} <= a.keys()), None))
    ]


@styled
def draw_gradients(table: RunTable, *, title: str, latents: int, max_rows: int, pool: str) -> Figure:
    """A row for each run and dataset, a panel for each chosen downstream latent: dA/dz at its strongest firing, the upstream latent of
    interest (asked for, or the largest attribution) marked. ``pool`` active: of every upstream latent that is active there or at an earlier
    position; all: of every upstream latent there is, at the position of the firing.
    """
    if pool not in ("active", "all"):
        raise UserError(f"pool={pool!r} in the figure of gradients is not one of active, all")
    notes: list[str] = []
    needed = "chosen_marked" if pool == "active" else "chosen_interest"
    rows = limit(found(table, needed, "chosen_latent", "chosen_gram"), max_rows, "runs and datasets", notes)
    if not rows:
        raise NothingToDrawError(f"no run has gradients of chosen latents ({needed})")
    shown = min(latents, max(len(a[needed]) for _, _, a in rows))
    fig, axes = panels(len(rows), shown, width=2.5, height=2.0)
    for row, (run, dataset, a) in enumerate(rows):
        for i, ax in enumerate(axes[row]):
            if i >= len(a[needed]):
                ax.set_axis_off()
                continue
            if pool == "active":
                _histogram(ax, a[f"chosen_{i}_gradient"], int(a[needed][i]))
            else:
                _histogram(ax, a[f"chosen_{i}_every"], int(a[needed][i]), a[f"chosen_{i}_here"])
            ax.set_title(f"latent {a['chosen_latent'][i]}: \N{LEFT DOUBLE QUOTATION MARK}{a['chosen_gram'][i]}\N{RIGHT DOUBLE QUOTATION MARK}")
            ax.set_xlabel("dA/dz" if row == len(rows) - 1 else "")
        axes[row, 0].set_ylabel(f"{run.title}\n{dataset}\nupstream latents" if len(rows) > 1 else f"{dataset}\nupstream latents")
    notes += [
        "Line: the upstream latent of largest attribution (or the one asked for). Each panel: one firing, the strongest in the prompts; first seed."
    ]
    bars = [(SAME, "all active")] if pool == "active" else [(GREY, "all upstream latents"), (SAME, "active at this position")]
    handles = [*(Line2D([], [], color=c, lw=5, label=n) for c, n in bars), Line2D([], [], color=PALETTE[1], lw=1.6, label="of interest")]
    return finish(fig, title, notes + caption(table, *_of(rows)), handles)


def _histogram(ax: Axes, gradient: np.ndarray, marked: int, active: np.ndarray | None = None) -> None:
    """``gradient`` (n,) with entry ``marked`` by a line; ``active`` (n,) tells some of them apart from the rest."""
    span = float(np.abs(gradient).max()) or 1.0
    bins = np.linspace(-span, span, 61).tolist()
    ax.hist(gradient, bins=bins, color=SAME if active is None else GREY, log=True)
    if active is not None:
        ax.hist(gradient[active], bins=bins, color=SAME, log=True)
    value = float(gradient[marked])
    ax.axvline(value, color=PALETTE[1], lw=1.6)
    rank = int((np.abs(gradient) > abs(value)).sum()) + 1
    text = f"{value:.2g}\nrank {rank}\nof {len(gradient):,}".replace("-", "\N{MINUS SIGN}")
    left = value > 0  # the text stands where the line is not
    ax.text(0.03 if left else 0.97, 0.97, text, transform=ax.transAxes, va="top", ha="left" if left else "right", color=PALETTE[1], fontsize=7)
    ax.set_ylim(0.7, None)


@styled
def draw_cosines(table: RunTable, *, title: str, points: int, max_rows: int) -> Figure:
    """|gradient| against |cosine| of the weights over active pairs of many prompts and positions."""
    return _scatter(table, title, max_rows, points, ("survey_gradient", "survey_cosine", "survey_same"), _cosine_panel, _cosine_parts)


def _cosine_parts(a: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    x, y = np.abs(a["survey_cosine"]), np.abs(a["survey_gradient"])
    return [(x[a["survey_same"]], y[a["survey_same"]]), (x[~a["survey_same"]], y[~a["survey_same"]])]


def _cosine_panel(ax: Axes, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    ax.set_yscale("log")
    positive = np.concatenate([y[y > 0] for _, y in parts])
    ax.set_ylim(max(float(np.quantile(positive, 0.02)), 1e-12), float(positive.max()) * 2)
    ax.set_xlabel("|cosine| of the weights")
    ax.set_ylabel("|dA/dz|")
    rho = [spearmanr(x, y).statistic if len(x) > 2 else np.nan for x, y in parts]
    ax.set_title(f"rank correlation {rho[0]:.2f} (same), {rho[1]:.2f} (earlier)", fontsize=8)


@styled
def draw_effects(table: RunTable, *, title: str, points: int, max_rows: int) -> Figure:
    """What the attribution says removing one upstream latent takes away, against what it really takes away."""
    return _scatter(table, title, max_rows, points, ("pair_attribution", "pair_effect"), _effect_panel, _effect_parts)


def _effect_parts(a: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    earlier = (a["earlier_pair_attribution"], a["earlier_pair_effect"]) if "earlier_pair_attribution" in a else (np.zeros(0), np.zeros(0))
    return [(a["pair_attribution"], a["pair_effect"]), earlier]


def _effect_panel(ax: Axes, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    every = np.concatenate([np.concatenate(part) for part in parts])
    low, high = float(every.min()), float(every.max())
    ax.plot([low, high], [low, high], color=GREY, lw=0.8, ls="--", zorder=3)
    r = [np.corrcoef(x, y)[0, 1] if len(x) > 2 else np.nan for x, y in parts]
    ax.set_title(f"r = {r[0]:.3f} (same), {r[1]:.3f} (earlier)", fontsize=8)
    ax.set_xlabel("attribution z dA/dz")
    ax.set_ylabel("effect of removing it")


def _scatter(
    table: RunTable, title: str, max_rows: int, points: int, names: Sequence[str], panel: Callable[..., None],
    parts_of: Callable[[dict[str, np.ndarray]], list[tuple[np.ndarray, np.ndarray]]],
) -> Figure:  # fmt: skip
    notes: list[str] = []
    rows = limit(found(table, *names), max_rows, "runs and datasets", notes)
    if not rows:
        raise NothingToDrawError(f"no run has the pairs of a circuit ({', '.join(names)})")
    columns = min(len(rows), 3)
    fig, axes = panels(-(-len(rows) // columns), columns, width=3.4, height=2.8)
    chance, counts = np.random.default_rng(0), []
    for ax, (run, dataset, a) in zip(axes.flat, rows, strict=False):
        parts = parts_of(a)
        panel(ax, parts)
        ax.set_title(
            f"{run.title}\n{dataset}: {ax.get_title()}" if len({r.name for r, _, _ in rows}) > 1 else f"{dataset}\n{ax.get_title()}", fontsize=8
        )
        counts.append(sum(len(x) for x, _ in parts))
        for (x, y), color, z in zip(parts, (SAME, EARLIER), (1, 2), strict=True):
            few = chance.permutation(len(x))[:points]
            ax.scatter(x[few], y[few], s=3, color=color, alpha=0.35, linewidths=0, zorder=z, rasterized=True)
    for ax in axes.flat[len(rows) :]:
        ax.set_axis_off()
    handles = [Line2D([], [], color=c, marker="o", ls="", ms=4, label=n) for c, n in ((SAME, "same position"), (EARLIER, "earlier position"))]
    notes += [f"{min(counts):,} to {max(counts):,} pairs a panel, at most {points:,} of each kind drawn; first seed." if len(set(counts)) > 1
              else f"{counts[0]:,} pairs, at most {points:,} of each kind drawn; first seed."]  # fmt: skip
    return finish(fig, title, notes + caption(table, *_of(rows)), handles)


def _of(rows: Sequence[Found]) -> tuple[list[Run], list[str]]:
    runs = list({run.name: run for run, _, _ in rows}.values())
    return runs, sorted({d for _, d, _ in rows})
