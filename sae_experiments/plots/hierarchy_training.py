"""Training of a hierarchical SAE by phase: sparsity against its targets, L1 coefficients, gate."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sae_experiments.plots.axes import head_panel, plain_log, tint
from sae_experiments.plots.base import NothingToDrawError, finish, panels, styled
from sae_experiments.plots.captions import caption
from sae_experiments.plots.selection import Arrays, PanelKey, find_panels, limit
from sae_experiments.plots.style import GREY, PALETTE
from sae_experiments.results.table import Run, RunTable

LEVEL_COLORS = {"bottom": PALETTE[0], "top": PALETTE[1]}
GATE_COLOR = PALETTE[2]
PHASES = ("bottom", "top", "both")
# Columns of `levels_trace`: after the progress, zeros and L1 coefficients of bottom and top, gate.
ZEROS = (1, 2)
COEFFICIENTS = (3, 4)
GATE = 5
Traces = list[Arrays]  # the arrays of each seed


@styled
def draw(table: RunTable, *, title: str, run: str | None, max_datasets: int) -> Figure:
    """Draw one run: a column of panels per dataset, a line per level, mean and range over seeds.

    Args:
        table: Runs.
        title: Title of the figure.
        run: Name of the run to draw; None for the first with both levels, else the first.
        max_datasets: Maximum number of datasets to draw.

    Raises:
        NothingToDrawError: No run, or not the named one, stored `levels_trace`.
    """
    notes: list[str] = []
    missing = "no run has the record of a hierarchical fit (levels_trace)"
    traces = find_panels(table, _traces, missing)
    chosen = _choose_run(table, traces, run)
    if chosen is None:
        raise NothingToDrawError(missing)
    datasets = [dataset for name, dataset in traces if name == chosen.name]
    datasets = limit(datasets, max_datasets, "datasets", notes)
    traces_of = {dataset: traces[chosen.name, dataset] for dataset in datasets}

    labels = ["zeros in a code (share)", "L1 coefficient"]
    if any(np.isfinite(_columns(of_seeds, GATE)).any() for of_seeds in traces_of.values()):
        labels.append("gate (active latents)")
    fig, axes = panels(len(labels), len(datasets), width=3.7, height=1.9, sharex=True, sharey="row")
    for column, (dataset, of_seeds) in enumerate(traces_of.items()):
        _draw_zeros(axes[0, column], of_seeds)
        _draw_coefficients(axes[1, column], of_seeds)
        for ax in axes[2:, column]:
            _draw_gate(ax, of_seeds)
        for ax in axes[:, column]:
            tint(ax, chosen.stand_in(dataset))
            _draw_phases(ax, of_seeds[0])
        head_panel(axes[0, column], [chosen], dataset)
        _name_phases(axes[0, column], of_seeds[0]["levels_phase_ends"])
        axes[-1, column].set_xlabel("share of the steps done")
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label)
    axes[0, 0].set_ylim(0.45, 1.06)
    notes.append(_run_note(chosen, traces))
    error = "lines: mean over seeds, bands: their range"
    return finish(fig, title, notes + caption([chosen], datasets, error=error), _handles())


def _traces(run: Run, dataset: str) -> Traces | None:
    """The arrays of the seeds that recorded the sparsity of the bottom level; None without any."""
    stored = [a for a in run.arrays(dataset).values() if "levels_trace" in a]
    return [a for a in stored if np.isfinite(a["levels_trace"][:, ZEROS[0]]).any()] or None


def _choose_run(table: RunTable, traces: dict[PanelKey, Traces], name: str | None) -> Run | None:
    """The run called `name`; without a name the first with both levels, else the first."""
    recorded = {of_run for of_run, _ in traces}
    runs = [run for run in table.runs if run.name in recorded]
    if name:
        return next((run for run in runs if run.name == name), None)
    both_levels = {
        of_run
        for (of_run, _), of_seeds in traces.items()
        if any(len(a["levels_targets"]) == 2 for a in of_seeds)
    }
    return next((run for run in runs if run.name in both_levels), runs[0])


def _run_note(chosen: Run, traces: dict[PanelKey, Traces]) -> str:
    others = [name for name in dict.fromkeys(name for name, _ in traces) if name != chosen.name]
    left_out = f"; not drawn: {', '.join(others)}" if others else ""
    return (
        f"Run {chosen.title}{left_out}. "
        "In training; inference uses thresholds calibrated at the end."
    )


def _handles() -> list[Line2D]:
    handles = [Line2D([], [], color=color, label=level) for level, color in LEVEL_COLORS.items()]
    return [*handles, Line2D([], [], color=GREY, linestyle="--", label="target")]


def _columns(traces: Traces, column: int) -> np.ndarray:
    """One column of the trace of every seed, (seeds, records)."""
    return np.stack([a["levels_trace"][:, column] for a in traces])


def _draw_zeros(ax: Axes, traces: Traces) -> None:
    """Draw the share of zeros in the code of each level, and its target."""
    targets = traces[0]["levels_targets"]
    for i, (column, color) in enumerate(zip(ZEROS, LEVEL_COLORS.values(), strict=True)):
        columns = _columns(traces, column)
        if not np.isfinite(columns).any():
            continue
        _draw_seeds(ax, columns, color)
        if i < len(targets):
            ax.axhline(targets[i], color=color, linestyle="--", linewidth=0.9)


def _draw_coefficients(ax: Axes, traces: Traces) -> None:
    """Draw the L1 coefficient of each level; that of the top starts with its phase."""
    starts = (0.0, float(traces[0]["levels_phase_ends"][0]))
    colors = LEVEL_COLORS.values()
    for column, color, start in zip(COEFFICIENTS, colors, starts, strict=True):
        _draw_seeds(ax, _columns(traces, column), color, start)
    both = np.concatenate([_columns(traces, column) for column in COEFFICIENTS])
    positive = both[both > 0]
    plain_log(ax, "y", positive.min(), positive.max())


def _draw_gate(ax: Axes, traces: Traces) -> None:
    """Draw the number of latents that the gate leaves active."""
    _draw_seeds(ax, _columns(traces, GATE), GATE_COLOR)
    ax.set_ylim(0, None)


def _draw_seeds(ax: Axes, columns: np.ndarray, color: str, start: float = 0.0) -> None:
    """Draw mean and range over seeds, where all are known and after `start` of the training.

    Args:
        ax: Panel.
        columns: Recorded values, (seeds, records); nothing is drawn if all are NaN.
        color: Colour of line and band.
        start: Fraction of training before which nothing is drawn.
    """
    if not np.isfinite(columns).any():
        return
    x = (np.arange(columns.shape[1]) + 0.5) / columns.shape[1]
    known = np.isfinite(columns).all(0) & (x > start)
    x, columns = x[known], columns[:, known]
    ax.plot(x, columns.mean(0), color=color, linewidth=1.1)
    ax.fill_between(x, columns.min(0), columns.max(0), color=color, alpha=0.2, linewidth=0)


def _draw_phases(ax: Axes, arrays: Arrays) -> None:
    for end in arrays["levels_phase_ends"][:-1]:
        ax.axvline(end, color=GREY, linewidth=0.8)
    ax.set_xlim(0, 1)


def _name_phases(ax: Axes, ends: np.ndarray) -> None:
    starts = [0.0, *ends[:-1]]
    top = ax.get_xaxis_transform()
    for name, start, end in zip(PHASES, starts, ends, strict=False):
        x = (start + end) / 2
        ax.text(x, 0.99, name, transform=top, ha="center", va="top", fontsize=7.5, color=GREY)
