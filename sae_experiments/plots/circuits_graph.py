"""Circuits: the attribution graph of a chosen downstream latent, upstream latents by how far back they are."""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

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
from sae_experiments.results.records import read_graphs
from sae_experiments.results.table import Run, RunTable

FOR, AGAINST = PALETTE[0], PALETTE[1]


@styled
def draw(table: RunTable, *, title: str, graphs: int, nodes: int, max_rows: int) -> Figure:
    """A row for each run and dataset, a panel for each of its first ``graphs``: the ``nodes`` strongest upstream latents, with their rules."""
    notes: list[str] = []
    rows = limit([(run, d, g) for run in table.runs for d in sorted(run.stats) if (g := _first(run, d))], max_rows, "runs and datasets", notes)
    if not rows:
        raise NothingToDrawError("no run has an attribution graph (graphs/*.json)")
    columns = min(graphs, max(len(g) for _, _, g in rows))
    fig, axes = panels(len(rows), columns, width=6.0, height=0.55 + 0.27 * (nodes + 2))
    for row, (run, dataset, found) in enumerate(rows):
        for ax, graph in zip(axes[row], found, strict=False):
            _panel(ax, graph, nodes, f"{run.title}, {dataset}" if len({r.name for r, _, _ in rows}) > 1 else dataset)
        for ax in axes[row, len(found) :]:
            ax.set_axis_off()
    handles = [Line2D([], [], color=c, lw=2, label=n) for c, n in ((FOR, "raises it"), (AGAINST, "lowers it"))]
    notes += [
        "Numbers: mean attribution z dA/dz over firings (in brackets: mean effect of really removing the latent). @-1: one position before. First seed."
    ]
    runs = list({run.name: run for run, _, _ in rows}.values())
    return finish(fig, title, notes + caption(table, runs, sorted({d for _, d, _ in rows})), handles)


def _first(run: Run, dataset: str) -> list[dict[str, Any]]:
    seeds = sorted(record.seed for record in run.records if record.dataset == dataset)
    return next((g for seed in seeds if run.path is not None and (g := read_graphs(run.path, dataset, seed))), [])


def _panel(ax: Axes, graph: dict[str, Any], most: int, where: str) -> None:
    ax.set_axis_off()
    by_id = {n["id"]: n for n in graph["nodes"]}
    target = next(n for n in graph["nodes"] if n["column"] == 1)
    plain = [e for e in graph["edges"] if e["from"] not in ("others", "error")]
    edges = sorted(plain, key=lambda e: -abs(e["weight"]))[:most]
    edges = sorted(edges, key=lambda e: (-by_id[e["from"]]["row"], -e["weight"]))
    edges += [e for e in graph["edges"] if e["from"] in ("others", "error")]
    largest = max((abs(e["weight"]) for e in edges), default=1.0) or 1.0
    middle, x = -(len(edges) - 1) / 2, 0.80
    for i, e in enumerate(edges):
        node, color = by_id[e["from"]], FOR if e["weight"] > 0 else AGAINST
        ax.plot([0.675, x], [-i, middle], color=color, lw=0.4 + 3.6 * abs(e["weight"]) / largest, alpha=0.75, solid_capstyle="butt", zorder=1)
        special = node["id"] in ("others", "error")
        name = node["label"] if special else f"{node['label']}@{node['row']}".replace("-", "\N{MINUS SIGN}")
        rule = "" if special else textwrap.shorten(str(node["rule"] or ""), 28, placeholder="\N{HORIZONTAL ELLIPSIS}")
        ax.text(0.0, -i, name, ha="left", va="center", fontsize=7, color=GREY if special else "black")
        ax.text(0.215, -i, rule, ha="left", va="center", fontsize=7, color="#333333")
        effect = f" ({e['effect']:+.3f})" if "effect" in e else ""
        ax.text(0.665, -i, f"{e['weight']:+.3f}{effect}".replace("-", "\N{MINUS SIGN}"), ha="right", va="center", fontsize=6.5, color=color)
    rule = "\n".join(textwrap.wrap(str(target["rule"] or ""), 19)[:3])
    ax.text(
        x + 0.015,
        middle,
        f"{target['label']}\n{rule}\nmean A {target['value']:.3g}\n{graph['firings']} firings",
        ha="left",
        va="center",
        fontsize=7.5,
    )
    ax.set_xlim(0, 1.0)
    ax.set_ylim(-len(edges) + 0.4, 0.7)
    ax.set_title(f"{where}: {graph['title'].split(';')[0]}", fontsize=8, loc="left")
