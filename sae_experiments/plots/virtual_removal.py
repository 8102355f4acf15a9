"""Virtual weights: rise of the loss when the weak ones are removed."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import row_caption
from sae_experiments.plots.selection import Arrays, find_rows, first_arrays, limit
from sae_experiments.plots.style import GREY, PALETTE, Line
from sae_experiments.results.table import RunTable

#: Colour, line and label of each order in which weights are removed.
ORDERS: dict[str, tuple[str, Line, str]] = {
    "expected": (PALETTE[0], "-", "corrected by co-activation"),
    "size": (PALETTE[3], "-.", "size"),
    "random": (GREY, ":", "random"),
}


@styled
def draw(table: RunTable, *, title: str, max_rows: int) -> Figure:
    """Draw one panel per run and dataset: bits over the share of weights that is kept.

    Args:
        table: Runs.
        title: Title of the figure.
        max_rows: Maximum number of panels to draw.

    Raises:
        NothingToDrawError: No run removed virtual weights.
    """
    notes: list[str] = []
    rows = find_rows(
        table,
        first_arrays("virtual_removed", "virtual_rise_expected"),
        missing="no run removed virtual weights (virtual_removed)",
    )
    rows = limit(rows, max_rows, "runs and datasets", notes)
    fig, axes = panels(1, len(rows), width=3.2, height=2.4)
    for ax, row in zip(axes[0], rows, strict=True):
        _draw_curves(ax, row.data)
        ax.set_title(f"{row.run.title}, {row.dataset}" if len(rows) > 1 else row.dataset)
        ax.set_xlabel("share of virtual weights kept")
    axes[0][0].set_ylabel("rise of the loss (bit per token)")
    handles = [Line2D([], [], color=c, linestyle=s, label=name) for c, s, name in ORDERS.values()]
    notes.append(
        "Every MLP replaced by transcoders, attention and norms held. The smallest weights by each "
        "ranking are removed first; all are gone at the right edge. First seed."
    )
    return finish(fig, title, notes + row_caption(rows), handles)


def _draw_curves(ax: Axes, arrays: Arrays) -> None:
    """Draw the rise of every order over the share kept, the last point where none is."""
    kept = 1 - arrays["virtual_removed"]
    least = kept[kept > 0].min() / 2
    shown = kept.clip(min=least)
    for order, (color, line, _) in ORDERS.items():
        rise = arrays[f"virtual_rise_{order}"]
        ax.plot(shown, rise, color=color, linestyle=line, marker="o", markersize=2.5)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.invert_xaxis()
    ax.axhline(0, color=GREY, linewidth=0.6)
