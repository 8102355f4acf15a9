"""Circuits: attribution graph of a downstream latent, with upstream latents by their position."""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sae_experiments.plots.base import finish, panels, styled
from sae_experiments.plots.captions import row_caption
from sae_experiments.plots.selection import find_rows, limit
from sae_experiments.plots.style import GREY, PALETTE
from sae_experiments.plots.text import minus
from sae_experiments.results.records import read_graphs
from sae_experiments.results.table import Run, RunTable

RAISES, LOWERS = PALETTE[0], PALETTE[1]
SUMS = ("others", "error")  # nodes for all other latents, and for what the SAE leaves out
Graph = dict[str, Any]


@styled
def draw(table: RunTable, *, title: str, graphs: int, nodes: int, max_rows: int) -> Figure:
    """Draw a row of panels per run and dataset, a panel per graph, with the rules of its latents.

    Args:
        table: Runs.
        title: Title of the figure.
        graphs: Maximum number of graphs per row.
        nodes: Number of upstream latents per graph, those with the strongest edges.
        max_rows: Maximum number of rows to draw.

    Raises:
        NothingToDrawError: No run has an attribution graph.
    """
    notes: list[str] = []
    rows = find_rows(
        table, _first_graphs, missing="no run has an attribution graph (graphs/*.json)"
    )
    rows = limit(rows, max_rows, "runs and datasets", notes)
    several_runs = len({row.run.name for row in rows}) > 1
    columns = min(graphs, max(len(row.data) for row in rows))
    height = 0.55 + 0.27 * (nodes + 2)
    fig, axes = panels(len(rows), columns, width=6.0, height=height)
    for row, row_axes in zip(rows, axes, strict=True):
        where = f"{row.run.title}, {row.dataset}" if several_runs else row.dataset
        for ax, graph in zip(row_axes, row.data, strict=False):
            _draw_graph(ax, graph, nodes)
            ax.set_title(f"{where}: {graph['title'].split(';')[0]}", fontsize=8, loc="left")
        for ax in row_axes:
            ax.set_axis_off()
    handles = [
        Line2D([], [], color=RAISES, linewidth=2, label="raises it"),
        Line2D([], [], color=LOWERS, linewidth=2, label="lowers it"),
    ]
    notes.append(
        "Numbers: mean attribution z dA/dz over firings (in brackets: mean effect of really "
        "removing the latent). @-1: one position before. First seed."
    )
    return finish(fig, title, notes + row_caption(rows), handles)


def _first_graphs(run: Run, dataset: str) -> list[Graph] | None:
    """The graphs of the first seed that has any."""
    if run.path is None:
        return None
    for seed in sorted(record.seed for record in run.records if record.dataset == dataset):
        # Graphs of other studies have more than two columns.
        graphs = [g for g in read_graphs(run.path, dataset, seed) if "firings" in g]
        if graphs:
            return graphs
    return None


def _draw_graph(ax: Axes, graph: Graph, nodes: int) -> None:
    """Draw a table of the upstream nodes on the left, and edges to the target on the right."""
    by_id = {node["id"]: node for node in graph["nodes"]}
    edges = _strongest_edges(graph, by_id, nodes)
    largest = max((abs(edge["weight"]) for edge in edges), default=1.0) or 1.0
    middle, right = -(len(edges) - 1) / 2, 0.80
    for i, edge in enumerate(edges):
        color = RAISES if edge["weight"] > 0 else LOWERS
        ax.plot(
            [0.675, right],
            [-i, middle],
            color=color,
            linewidth=0.4 + 3.6 * abs(edge["weight"]) / largest,
            alpha=0.75,
            solid_capstyle="butt",
            zorder=1,
        )
        _write_node(ax, -i, by_id[edge["from"]])
        numbers = f"{edge['weight']:+.3f}"
        if "effect" in edge:
            numbers += f" ({edge['effect']:+.3f})"
        ax.text(0.665, -i, minus(numbers), ha="right", va="center", fontsize=6.5, color=color)
    ax.text(right + 0.015, middle, _target_text(graph), ha="left", va="center", fontsize=7.5)
    ax.set_xlim(0, 1.0)
    ax.set_ylim(-len(edges) + 0.4, 0.7)


def _strongest_edges(graph: Graph, by_id: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """The edges to draw, from top to bottom.

    The strongest `most` of latents come first, by position and weight, then those of `SUMS`.
    """
    of_latents = [edge for edge in graph["edges"] if edge["from"] not in SUMS]
    strongest = sorted(of_latents, key=lambda edge: -abs(edge["weight"]))[:most]
    strongest.sort(key=lambda edge: (-by_id[edge["from"]]["row"], -edge["weight"]))
    return strongest + [edge for edge in graph["edges"] if edge["from"] in SUMS]


def _write_node(ax: Axes, y: float, node: dict[str, Any]) -> None:
    """Write name, position and rule of an upstream node."""
    name, rule, color = node["label"], "", GREY
    if node["id"] not in SUMS:
        name, color = minus(f"{node['label']}@{node['row']}"), "black"
        ellipsis = "\N{HORIZONTAL ELLIPSIS}"
        rule = textwrap.shorten(str(node["rule"] or ""), 28, placeholder=ellipsis)
    ax.text(0.0, y, name, ha="left", va="center", fontsize=7, color=color)
    ax.text(0.215, y, rule, ha="left", va="center", fontsize=7, color="#333333")


def _target_text(graph: Graph) -> str:
    target = next(node for node in graph["nodes"] if node["column"] == 1)
    rule = "\n".join(textwrap.wrap(str(target["rule"] or ""), 19)[:3])
    return f"{target['label']}\n{rule}\nmean A {target['value']:.3g}\n{graph['firings']} firings"
