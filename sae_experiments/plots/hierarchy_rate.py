"""Rate and distortion: what a code costs in bits a character against what the language model loses by it."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sae_experiments.plots.base import (
    GREY,
    NothingToDrawError,
    caption,
    finish,
    handle,
    head_panel,
    limit,
    looks,
    panels,
    plain_log,
    styled,
    tint,
)
from sae_experiments.results.table import Run, RunTable

PARTS = {"": ("whole code", "-"), "_bottom": ("bottom alone", ":"), "_top": ("top alone", "--")}


@styled
def draw(table: RunTable, *, title: str, least: float, most: float, max_runs: int, max_datasets: int) -> Figure:
    """Columns are datasets: delta CE over bits a character on the lower frontier of all quantisers and entries kept, mean over seeds of each point.

    Points outside ``least`` to ``most`` bits of delta CE are not drawn.
    """
    notes: list[str] = []
    runs = limit([r for r in table.runs if any(_points(r, d, "") is not None for d in r.stats)], max_runs, "runs", notes)
    datasets = limit([d for d in table.datasets if any(_points(r, d, "") is not None for r in runs)], max_datasets, "datasets", notes)
    if not datasets:
        raise NothingToDrawError("no run has a curve of delta CE over the rate (code_ce_bits)")
    look, drawn, seen = looks(table), [], set()
    fig, axes = panels(1, len(datasets), width=4.0, height=3.2, sharey=True)
    for ax, dataset in zip(axes[0], datasets, strict=True):
        head_panel(ax, runs, dataset)
        tint(ax, any(r.stand_in(dataset) for r in runs))
        for run in runs:
            for part, (_, style) in PARTS.items():
                front = _frontier(_within(run, dataset, part, least, most))
                if front.size:
                    drawn.append(front)
                    seen.add(part)
                    ax.plot(*front, style, color=look[run.name].color, marker=look[run.name].marker, markersize=4, linewidth=1.1, alpha=0.9)
        limits = {float(a["code_ce_limit"]) for r in runs for a in r.arrays(dataset).values() if "code_ce_limit" in a}
        for value in limits:
            ax.axhline(value, color=GREY, linewidth=0.8, linestyle="-.")
        ax.set_xlabel("rate (bit/char), logarithmic")
    _axes(axes[0], drawn)
    axes[0, 0].set_ylabel("delta CE (bit/char), logarithmic\nlower is better")
    handles = [handle(run, look[run.name], line=True) for run in runs]
    handles += [Line2D([], [], color="black", linestyle=style, label=words) for part, (words, style) in PARTS.items() if part in seen]
    notes += ["Dash-dotted: the delta CE at which bits_per_char is taken. Only the frontier of each code is drawn."]
    return finish(fig, title, notes + caption(table, runs, datasets, error="points: mean over seeds"), handles)


def _points(run: Run, dataset: str, part: str) -> np.ndarray | None:
    """(2, n): rate and delta CE, mean over seeds."""
    names = (f"code_ce{part}_bits", f"code_ce{part}_ce")
    found = [np.stack([a[n] for n in names]) for a in run.arrays(dataset).values() if all(n in a for n in names)]
    same = [f for f in found if f.shape == found[0].shape]
    return np.mean(same, axis=0) if same else None


def _within(run: Run, dataset: str, part: str, least: float, most: float) -> np.ndarray:
    points = _points(run, dataset, part)
    return np.zeros((2, 0)) if points is None else points[:, (points[1] >= least) & (points[1] <= most)]


def _frontier(points: np.ndarray) -> np.ndarray:
    """Points that no other beats in both rate and delta CE, by rate."""
    ordered = points[:, np.lexsort((points[1], points[0]))]
    best = np.minimum.accumulate(ordered[1]) if ordered.size else ordered[1]
    return ordered[:, np.r_[True, ordered[1][1:] < best[:-1]]] if ordered.size else ordered


def _axes(axes: np.ndarray, drawn: list[np.ndarray]) -> None:
    together = np.concatenate(drawn, axis=1) if drawn else np.ones((2, 1))
    for ax in axes:
        for which, values in zip("xy", together, strict=True):
            plain_log(ax, which, float(values.min()), float(values.max()))
