"""Colours, markers and line styles, and their assignment to runs, the same in every figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from matplotlib.lines import Line2D

from sae_experiments.plots.text import clip
from sae_experiments.results.table import Run, RunTable

# The palette of Okabe and Ito (without its yellow, which is too pale on white), then two colours
# of Tol's. They stay distinct under any kind of colour vision; markers differ as well.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
Line = Literal["-", "--", "-.", ":"]
LINES: tuple[Line, ...] = ("-", "--", "-.", ":")
BASELINE_COLOR = "#222222"
GREY = "#777777"
ALARM = "#B00020"  # stand-in text, dead latents, failures


class RunStyle(NamedTuple):
    """Colour, marker and line style of a run."""

    color: str
    marker: str
    line: Line


BASELINE_STYLE = RunStyle(BASELINE_COLOR, "*", "-")


def nth_style(i: int) -> RunStyle:
    """Style number `i`: eight colours; beyond these, marker and line tell equal colours apart."""
    return RunStyle(PALETTE[i % 8], MARKERS[(i + i // 8) % 8], LINES[(i // 8) % 4])


def run_styles(table: RunTable) -> dict[str, RunStyle]:
    """Style of each run by name; a baseline that others are compared with is black.

    A variant has the same colour in every figure; its runs differ in marker and line. If all runs
    are of one variant, colours tell the runs apart, from that of the variant on.
    """
    baseline = compared_with(table)
    others = [run for run in table.runs if run is not baseline]
    variants = {run.variant for run in others}
    if len(variants) < 2:
        first = sum(map(variant_index, variants))
        styles = {run.name: nth_style(first + i) for i, run in enumerate(others)}
    else:
        styles = variant_styles(others)
    if baseline:
        styles[baseline.name] = BASELINE_STYLE
    return styles


def compared_with(table: RunTable) -> Run | None:
    """The baseline, unless it is the only run."""
    is_alone = all(run is table.baseline for run in table.runs)
    return None if is_alone else table.baseline


def variant_styles(runs: Sequence[Run]) -> dict[str, RunStyle]:
    """Styles by name of the run: the colour of its variant, with a marker and line of its own."""
    styles: dict[str, RunStyle] = {}
    drawn: Counter[int] = Counter()
    for run in runs:
        color = variant_index(run.variant)
        n = drawn[color]
        marker = MARKERS[(color + n) % len(MARKERS)]
        line = LINES[(n + n // len(MARKERS)) % len(LINES)]
        styles[run.name] = RunStyle(PALETTE[color], marker, line)
        drawn[color] += 1
    return styles


def run_handle(run: Run, style: RunStyle, *, line: bool) -> Line2D:
    """Legend entry of a run, as a line or as a marker."""
    kind: dict[str, Any] = {"linestyle": "", "marker": style.marker}
    if line:
        kind = {"linestyle": style.line, "marker": ""}
    size = 9 if style.marker == "*" else 6
    return Line2D([], [], color=style.color, markersize=size, label=clip(run.title), **kind)


#: Variants with a colour of their own, the same in every figure; see `PALETTE`.
VARIANTS = (
    "standard",
    "topk",
    "batch_topk",
    "gated",
    "jumprelu",
    "matryoshka",
    "hierarchical",
    "random",
)


def variant_index(variant: str) -> int:
    """Number of a variant's colour: its place in `VARIANTS`, else one made from its name."""
    name = variant.partition("-")[0]
    if name in VARIANTS:
        return VARIANTS.index(name)
    return sum(map(ord, name)) % len(PALETTE)
