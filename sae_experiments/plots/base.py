"""Figures with panels, a title, a legend and a caption, and how they are saved.

A figure is a function `draw(table, **options) -> Figure` in a file of its own, with a YAML file in
`conf/plot` that sets the options. It raises `NothingToDrawError` if no run has its data. Figures
are drawn with matplotlib's Agg canvas, without pyplot.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, MaxNLocator

from sae_experiments.errors import UserError
from sae_experiments.files import write_bytes

DPI = 150
LINE_HEIGHT = 0.13  # inches of one line of the caption
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 5),
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType: text of a PDF can be searched and edited
    "svg.hashsalt": "sae_experiments",  # the same figure gives the same bytes
}
#: Decorator of every `draw` function: applies `STYLE` while it runs.
styled = mpl.rc_context(STYLE)


class NothingToDrawError(UserError):
    """No run holds the data of a figure."""


def panels(
    rows: int, cols: int, *, width: float, height: float, **options: Any
) -> tuple[Figure, np.ndarray]:
    """Make a figure with a grid of panels; the layout engine adds room around them.

    Args:
        rows: Rows of panels.
        cols: Columns of panels.
        width: Width of a panel, in inches.
        height: Height of a panel, in inches.
        **options: Passed to `Figure.subplots`, such as `sharex`.

    Returns:
        The figure and its axes, (rows, cols).
    """
    size = (max(cols * width, 4.2), rows * height + 1.2)
    fig = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(fig)
    engine: Any = fig.get_layout_engine()
    engine.set(w_pad=0.08, h_pad=0.06)
    return fig, fig.subplots(rows, cols, squeeze=False, **options)


def finish(fig: Figure, title: str, caption: Sequence[str], handles: Sequence[Any] = ()) -> Figure:
    """Add the title above, the legend to the right and the caption below the panels.

    The figure grows for the legend and the caption.

    Args:
        fig: Figure with its panels drawn.
        title: Title of the figure.
        caption: Paragraphs of the caption; each is wrapped to the width of the figure.
        handles: Legend entries; none for a figure without a legend.

    Returns:
        The same figure.
    """
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        fig.set_figwidth(fig.get_figwidth() + 0.55 + 0.068 * longest)
        fig.set_figheight(max(fig.get_figheight(), 1.4 + 0.2 * len(handles)))
        fig.legend(handles=list(handles), loc="outside right upper")
    chars = int(fig.get_figwidth() * 17)
    lines = [line for text in caption for line in textwrap.wrap(text, chars)]
    fig.set_figheight(fig.get_figheight() + LINE_HEIGHT * len(lines))
    fig.suptitle(title, x=0.01, ha="left", weight="bold")
    fig.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7.5, color="#444444")
    return fig


def bare(fig: Figure) -> tuple[str, str, bytes]:
    """Take title and caption off a figure, for pages that set them as text.

    The figure is changed: save it before.

    Returns:
        Title, caption, and the figure without them as SVG.
    """
    title = fig.get_suptitle()
    caption = fig.get_supxlabel()
    freed = LINE_HEIGHT * len(caption.splitlines()) + 0.35
    fig.suptitle("")
    fig.supxlabel("")
    fig.set_figheight(max(fig.get_figheight() - freed, 1.0))
    return title, " ".join(caption.split()), _rendered(fig, "svg")


def save(fig: Figure, name: str, folder: Path) -> list[Path]:
    """Write `<folder>/<name>.png` and `.svg`, each whole or not at all; returns their paths."""
    paths = []
    engine = fig.get_layout_engine()
    for kind in ("png", "svg"):
        path = folder / f"{name}.{kind}"
        write_bytes(path, _rendered(fig, kind))
        paths.append(path)
        fig.set_layout_engine("none")  # the places of the first file are those of the next
    fig.set_layout_engine(engine)
    return paths


#: Widths of a paper's column and of its text block, in inches, by the ending of the file's name.
PAPER_WIDTHS = {"1col": 3.25, "2col": 6.75}
PAPER_FONTS = (6.0, 8.0)  # smallest and largest, in points
LEGEND_LINE = 0.16  # inches
SMALLEST_MARKER = 0.6  # size of markers on paper, as a share of theirs on the screen
LEAST_HEIGHT = 0.75  # height of panels on paper, as a share of theirs on the screen
INCHES_PER_CHARACTER = 0.048  # of the smallest font
INCHES_PER_TICK = (0.42, 0.2)  # room that a tick needs on a horizontal and a vertical axis of print


def save_for_paper(fig: Figure, name: str, width: str, folder: Path) -> Path:
    """Write `<folder>/<name>_<width>.pdf` in the size of print, without title and caption.

    Fonts are embedded as TrueType. The legend moves below the panels. The figure is changed.

    Args:
        fig: Figure as `draw` made it.
        name: Name of the figure.
        width: Key of `PAPER_WIDTHS`.
        folder: Folder of the file.
    """
    inches = PAPER_WIDTHS[width]
    caption = fig.get_supxlabel()
    fig.suptitle("")
    fig.supxlabel("")
    height = fig.get_figheight() - LINE_HEIGHT * len(caption.splitlines()) - 0.35
    scale = inches / fig.get_figwidth()
    smallest, largest = PAPER_FONTS
    for text in cast("list[Text]", fig.findobj(Text)):
        text.set_fontsize(min(max(float(text.get_fontsize()) * scale, smallest), largest))
    for line in cast("list[Line2D]", fig.findobj(Line2D)):
        line.set_markersize(float(line.get_markersize()) * max(scale, SMALLEST_MARKER))
    entries = _legend_below(fig, inches)
    # Fonts do not shrink below what can be read, so neither do the panels.
    tall = max(height * max(scale, LEAST_HEIGHT), 0.55 * inches)
    fig.set_size_inches(inches, tall + LEGEND_LINE * entries)
    _fit_panels(fig, inches, tall)
    fig.draw_without_rendering()
    for ax in fig.axes:
        _hide_crowded(ax.get_xticklabels(), 0)
        if not isinstance(ax.yaxis.get_major_formatter(), FixedFormatter):  # no names of runs
            _hide_crowded(ax.get_yticklabels(), 1)
    path = folder / f"{name}_{width}.pdf"
    write_bytes(path, _rendered(fig, "pdf"))
    return path


def _fit_panels(fig: Figure, width: float, height: float) -> None:
    """In panels of print, leave the ticks on linear axes that have room, and wrap names of axes."""
    for ax in fig.axes:
        place = ax.get_subplotspec()
        if place is None:
            continue
        grid = place.get_gridspec()
        room = (
            0.75 * width * len(place.colspan) / grid.ncols,
            0.75 * height * len(place.rowspan) / grid.nrows,
        )
        for axis, inches, each in zip((ax.xaxis, ax.yaxis), room, INCHES_PER_TICK, strict=True):
            locator = axis.get_major_locator()
            if isinstance(locator, MaxNLocator):
                locator.set_params(nbins=int(min(max(inches / each, 1), 6)))
        lines = ax.get_xlabel().splitlines()
        chars = max(int(room[0] / INCHES_PER_CHARACTER), 8)
        ax.set_xlabel("\n".join(part for line in lines for part in textwrap.wrap(line, chars)))


def _hide_crowded(labels: Sequence[Text], direction: int) -> None:
    """Hide every second label of the ticks along an axis, until none touches its neighbour.

    Args:
        labels: Labels of the ticks, drawn before.
        direction: 0 for a horizontal axis, 1 for a vertical one.
    """
    shown = [label for label in labels if label.get_visible() and label.get_text()]
    while len(shown) > 2:
        spans = sorted(tuple(t.get_window_extent().get_points()[:, direction]) for t in shown)
        if all(end < start for (_, end), (start, _) in pairwise(spans)):
            return
        for label in shown[1::2]:
            label.set_visible(False)
        shown = shown[::2]


def _legend_below(fig: Figure, inches: float) -> int:
    """Move the legend below the panels; returns the number of its lines."""
    if not fig.legends:
        return 0
    old = fig.legends[0]
    handles = [handle for handle in old.legend_handles if handle is not None]
    labels = [text.get_text() for text in old.get_texts()]
    old.remove()
    longest = max(map(len, labels))
    columns = max(1, min(len(labels), int(inches / (0.35 + 0.062 * longest))))
    fig.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=6.5, frameon=False
    )
    return -(-len(labels) // columns)


def _rendered(fig: Figure, kind: str) -> bytes:
    """The figure as a file of this kind, without the date or the version that wrote it."""
    undated = {"png": {"Software": None}, "svg": {"Date": None}}
    metadata = undated.get(kind, {"CreationDate": None, "Producer": None, "Creator": None})
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        fig.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()
