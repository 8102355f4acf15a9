"""Panels: titles of datasets, logarithmic axes with plain numbers, text in place of data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from sae_experiments.plots.style import ALARM
from sae_experiments.results.notes import short_list
from sae_experiments.results.table import Run


def head_panel(ax: Axes, runs: Iterable[Run], dataset: str, *, title: bool = True) -> None:
    """Mark the panel of a dataset: red title and background if a run used stand-in text.

    Args:
        ax: Panel.
        runs: Runs in the figure.
        dataset: Dataset of the panel.
        title: Write the name of the dataset above the panel.
    """
    with_dataset = [run for run in runs if dataset in run.stats]
    stand_in = [run.name for run in with_dataset if run.stand_in(dataset)]
    tint(ax, bool(stand_in))
    if not title:
        return
    text, color = dataset, "black"
    if stand_in:
        some = len(stand_in) < len(with_dataset)
        where = f" in {short_list(stand_in, 1)}" if some else ""
        text, color = f"{dataset}\nSTAND-IN TEXT{where}", ALARM
    ax.set_title(text, color=color, weight="bold", loc="left")


def tint(ax: Axes, stand_in: bool) -> None:
    """Colour the background of a panel: reddish for stand-in text, else white."""
    ax.set_facecolor("#FFF4F1" if stand_in else "white")


def center_text(ax: Axes, text: str, color: str = "black") -> None:
    """Write a text into the middle of a panel without data."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=color)


def first_image(axes: np.ndarray) -> Any:
    """The first image in any panel, for a colour bar that all panels share."""
    return next(image for ax in axes.flat for image in ax.images)


def plain_log(
    ax: Axes, which: Literal["x", "y"], low: float, high: float, *, least: float = 4.0
) -> None:
    """Make an axis logarithmic, with ticks such as 1, 2, 5 in plain numbers.

    Args:
        ax: Panel.
        which: Axis to change.
        low: Smallest value drawn, above 0.
        high: Largest value drawn.
        least: Smallest ratio of the axis limits.
    """
    stretch = max((high / low) ** 0.07, (least * low / high) ** 0.5, 1.05)
    bottom, top = low / stretch, high * stretch
    if which == "x":
        axis = ax.xaxis
        ax.set_xscale("log")
        ax.set_xlim(bottom, top)
    else:
        axis = ax.yaxis
        ax.set_yscale("log")
        ax.set_ylim(bottom, top)
    multiples = _tick_multiples(np.log10(top) - np.log10(bottom))
    axis.set_major_locator(LogLocator(subs=multiples, numticks=99))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _tick_multiples(decades: float) -> tuple[float, ...]:
    """Multiples of powers of ten that get a tick, on an axis over so many decades."""
    if decades < 1:
        return (1, 1.5, 2, 3, 4, 5, 7)
    if decades < 2.5:
        return (1, 2, 5)
    return (1,)
