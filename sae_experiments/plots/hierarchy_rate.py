"""Rate and distortion: bits per character of a code against the language model's added loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sae_experiments.plots.axes import head_panel, plain_log
from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import caption
from sae_experiments.plots.selection import choose_panels, find_panels
from sae_experiments.plots.style import GREY, Line, RunStyle, run_handle, run_styles
from sae_experiments.results.table import Run, RunTable

#: Legend text and line style of each part of a code, by its part of the arrays' names.
PARTS: dict[str, tuple[str, Line]] = {
    "": ("whole code", "-"),
    "_bottom": ("bottom alone", ":"),
    "_top": ("top alone", "--"),
}
Fronts = dict[str, np.ndarray]  # (2, n) rate and delta CE of each part's frontier


@styled
def draw(
    table: RunTable, *, title: str, least: float, most: float, max_runs: int, max_datasets: int
) -> Figure:
    """Draw delta CE over bits per character, a panel per dataset.

    Lines are the lower frontiers over all quantisers and numbers of entries kept; each point is the
    mean over seeds.

    Args:
        table: Runs.
        title: Title of the figure.
        least: Smallest delta CE to draw, in bits per character.
        most: Largest delta CE to draw, in bits per character.
        max_runs: Maximum number of runs to draw.
        max_datasets: Maximum number of datasets to draw.

    Raises:
        NothingToDrawError: No run stored the curve of its whole code.
    """
    notes: list[str] = []
    fronts = find_panels(
        table,
        lambda run, dataset: _fronts(run, dataset, least, most),
        missing="no run has a curve of delta CE over the rate (code_ce_bits)",
    )
    runs, datasets = choose_panels(
        table, fronts, max_runs=max_runs, max_datasets=max_datasets, notes=notes
    )
    styles = run_styles(table)
    fig, axes = panels(1, len(datasets), width=4.0, height=3.2, sharey=True)
    drawn: list[Fronts] = []
    for ax, dataset in zip(axes[0], datasets, strict=True):
        head_panel(ax, runs, dataset)
        for run in runs:
            of_run = fronts.get((run.name, dataset), {})
            _draw_fronts(ax, of_run, styles[run.name])
            drawn.append(of_run)
        for delta in _limits(runs, dataset):
            ax.axhline(delta, color=GREY, linewidth=0.8, linestyle="-.")
        ax.set_xlabel("rate (bit/char), logarithmic")
    _scale_axes(axes[0], drawn)
    axes[0, 0].set_ylabel("delta CE (bit/char), logarithmic\nlower is better")
    handles = [run_handle(run, styles[run.name], line=True) for run in runs]
    shown = {part for of_run in drawn for part in of_run}
    for part, (label, line) in PARTS.items():
        if part in shown and len(shown) > 1:
            handles.append(Line2D([], [], color="black", linestyle=line, label=label))
    notes.append(
        "Dash-dotted: the delta CE at which bits_per_char is taken. "
        "Only the frontier of each code is drawn."
    )
    return finish(
        fig, title, notes + caption(runs, datasets, error="points: mean over seeds"), handles
    )


def _fronts(run: Run, dataset: str, least: float, most: float) -> Fronts | None:
    """Frontiers of the parts with points in the range; None if the whole code has no curve."""
    fronts: Fronts = {}
    for part in PARTS:
        points = _points(run, dataset, part)
        if points is None and part == "":
            return None
        if points is None:
            continue
        in_range = (points[1] >= least) & (points[1] <= most)
        if in_range.any():
            fronts[part] = _frontier(points[:, in_range])
    return fronts


def _points(run: Run, dataset: str, part: str) -> np.ndarray | None:
    """Rate and delta CE, (2, n), mean over the seeds with as many points as the first."""
    bits, ce = f"code_ce{part}_bits", f"code_ce{part}_ce"
    curves = [
        np.stack([a[bits], a[ce]]) for a in run.arrays(dataset).values() if {bits, ce} <= a.keys()
    ]
    if not curves:
        return None
    return np.mean([curve for curve in curves if curve.shape == curves[0].shape], axis=0)


def _frontier(points: np.ndarray) -> np.ndarray:
    """The points that no other beats in both rate and delta CE, by rate; `points` is (2, n > 0)."""
    ordered = points[:, np.lexsort((points[1], points[0]))]
    best = np.minimum.accumulate(ordered[1])
    improves = np.r_[True, ordered[1][1:] < best[:-1]]
    return ordered[:, improves]


def _limits(runs: Sequence[Run], dataset: str) -> set[float]:
    """The values of delta CE at which the metric `bits_per_char` is taken."""
    arrays = [a for run in runs for a in run.arrays(dataset).values()]
    return {float(a["code_ce_limit"]) for a in arrays if "code_ce_limit" in a}


def _draw_fronts(ax: Axes, fronts: Fronts, style: RunStyle) -> None:
    for part, front in fronts.items():
        ax.plot(
            *front,
            linestyle=PARTS[part][1],
            color=style.color,
            marker=style.marker,
            markersize=4,
            linewidth=1.1,
            alpha=0.9,
        )


def _scale_axes(axes: Sequence[Axes], drawn: Sequence[Fronts]) -> None:
    """Scale all panels to the same limits."""
    fronts = [front for of_run in drawn for front in of_run.values()]
    points = np.concatenate(fronts, axis=1) if fronts else np.ones((2, 1))
    for ax in axes:
        plain_log(ax, "x", float(points[0].min()), float(points[0].max()))
        plain_log(ax, "y", float(points[1].min()), float(points[1].max()))
