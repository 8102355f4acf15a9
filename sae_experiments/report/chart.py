"""The picture of the first screen: sparsity against fidelity, as SVG that follows the theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sae_experiments.plots.style import variant_index
from sae_experiments.report.markup import Markup, join, tag
from sae_experiments.results.headline import ORDINARY_FVU, error_metric
from sae_experiments.results.table import Run, RunTable

X = "sae_l0"
WIDTH = 360
HEIGHT_ALONE, HEIGHT = 280, 150  # of a panel, and of one among several
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 38
LABEL_HEIGHT = 13
LABEL_ROOM = 108  # pixels, more for long names
LONGEST_LABEL = 22  # characters
CHARACTER = 6.2  # pixels
MOST_DATASETS = 3
MOST_LABELS = 8


class Point(NamedTuple):
    """A run in a panel: means, standard error of the vertical value, name and colour class."""

    x: float
    y: float
    y_error: float
    name: str
    look: str


class Scale(NamedTuple):
    """An axis from values to pixels, logarithmic or not."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def __call__(self, value: float) -> float:
        low, high, value = (self._warp(v) for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def _warp(self, value: float) -> float:
        return math.log(value) if self.is_log else value

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if not self.is_log:
            return _round_steps(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        inside = [v for v in values if self.low <= v <= self.high]
        return inside if len(inside) > 1 else _round_steps(self.low, self.high)


def _round_steps(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(m for m in (5, 2, 1) if (high - low) / (m * step) >= 2)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def sparsity_against_fidelity(table: RunTable) -> Markup | None:
    """A panel for each of the first datasets; None if no run has both metrics."""
    datasets = [dataset for dataset in table.datasets if _points(table, dataset)]
    if not datasets:
        return None
    shown = datasets[:MOST_DATASETS]
    height = HEIGHT_ALONE if len(shown) == 1 else HEIGHT
    panels = [_panel(table, dataset, height) for dataset in shown]
    caption = (
        "FVU (share of the variance that is lost, lower is better) against L0 (active latents per "
        "row)."
    )
    if any(error_metric(table, dataset) == ORDINARY_FVU for dataset in shown):
        caption += " FVU is that of the rows that are no outliers."
    if any(point.y_error for dataset in shown for point in _points(table, dataset)):
        caption += " Bars: one standard error."
    return tag("figure", tag("div", panels, class_="panels"), tag("figcaption", caption))


def _points(table: RunTable, dataset: str) -> list[Point]:
    points = []
    y_metric = error_metric(table, dataset)
    for run in [*_outside(table), *table.runs]:
        x, y = (run.stats.get(dataset, {}).get(metric) for metric in (X, y_metric))
        if not x or not y or not x.mean or x.mean <= 0 or y.mean is None:
            continue
        points.append(Point(x.mean, y.mean, y.stderr or 0.0, run.name, _look(table, run)))
    return points


def _outside(table: RunTable) -> list[Run]:
    return [run for run in table.baselines if not any(run is other for other in table.runs)]


def _look(table: RunTable, run: Run) -> str:
    if run is table.baseline and len(table.runs) > 1:
        return "base"
    return f"v{variant_index(run.variant) % 8}"


def _panel(table: RunTable, dataset: str, height: int) -> Markup:
    points = _points(table, dataset)
    named = sorted(points, key=lambda p: p.y)[:MOST_LABELS]  # the best
    longest = max(len(_label(p)) for p in named)
    room = max(LABEL_ROOM, 12 + math.ceil(CHARACTER * longest))
    x = _scale([p.x for p in points], LEFT, WIDTH - RIGHT - room)
    ends = [p.y + sign * p.y_error for p in points for sign in (-1, 1)]
    ends = [v for v in ends if v > 0]
    if len(points) == 1:
        ends.append(0.0)  # with nothing to compare, what counts is the distance from zero
    y = _scale(ends, height - BOTTOM, TOP)
    parts = [_axes(x, y, height), [_mark(p, x, y) for p in points]]
    parts.append(_labels(named, x, y, height))
    title = tag("text", dataset, class_="head", x=LEFT, y=14)
    label = f"{dataset}: " + "; ".join(f"{p.name} L0 {p.x:.3g}, FVU {p.y:.3g}" for p in points)
    return tag(
        "svg",
        title,
        parts,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=label,
        class_="pareto",
    )


def _scale(values: Sequence[float], start: float, end: float) -> Scale:
    low, high = min(values), max(values)
    is_log = high > 3 * low > 0
    if is_log:
        return Scale(low / (high / low) ** 0.08, high * (high / low) ** 0.08, start, end, True)
    room = max(0.12 * (high - low), 0.04 * high, 1e-9)
    return Scale(low - room if low else 0.0, high + room, start, end, False)


def _axes(x: Scale, y: Scale, height: int) -> Markup:
    bottom, right = height - BOTTOM, x.end
    lines = [tag("line", class_="axis", x1=LEFT, x2=right, y1=bottom, y2=bottom)]
    for value in y.ticks():
        at = f"{y(value):.1f}"
        lines.append(tag("line", class_="axis", x1=LEFT, x2=right, y1=at, y2=at))
        lines.append(_text(f"{value:.3g}", x=LEFT - 5, y=f"{y(value) + 4:.1f}", anchor="end"))
    for value in x.ticks():
        lines.append(_text(f"{value:.4g}", x=f"{x(value):.1f}", y=bottom + 14))
    lines.append(_text("L0", x=(LEFT + right) / 2, y=height - 8))
    lines.append(_text("FVU", x=4, y=14, anchor="start"))
    return join(lines)


def _text(words: str, *, anchor: str = "middle", class_: str | None = None, **at: object) -> Markup:
    return tag("text", words, class_=class_, text_anchor=anchor, **at)


def _mark(point: Point, x: Scale, y: Scale) -> Markup:
    cx, cy = f"{x(point.x):.1f}", f"{y(point.y):.1f}"
    bar = None
    if point.y_error:
        low, high = (f"{y(max(point.y + s * point.y_error, y.low)):.1f}" for s in (-1, 1))
        bar = tag("line", class_=f"error {point.look}", x1=cx, x2=cx, y1=low, y2=high)
    title = tag("title", f"{point.name}: L0 {point.x:.4g}, FVU {point.y:.4g}")
    return join(bar, tag("circle", title, class_=f"dot {point.look}", cx=cx, cy=cy, r=5))


def _label(point: Point) -> str:
    name = point.name
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"


def _labels(points: Sequence[Point], x: Scale, y: Scale, height: int) -> Markup:
    """Names to the right of the panel, apart from one another, each with a line to its point."""
    ordered = sorted(points, key=lambda p: y(p.y))
    places: list[float] = []
    for point in ordered:
        lowest = places[-1] + LABEL_HEIGHT if places else TOP + 4
        places.append(max(y(point.y), lowest))
    over = max(places[-1] - (height - BOTTOM), 0) if places else 0
    left = x.end + 12
    parts = []
    for point, at in zip(ordered, places, strict=True):
        row = at - over
        ends = {"x1": f"{x(point.x) + 5:.1f}", "y1": f"{y(point.y):.1f}"}
        parts.append(tag("line", class_="lead", x2=left - 3, y2=f"{row:.1f}", **ends))
        parts.append(
            _text(
                _label(point),
                x=left,
                y=f"{row + 4:.1f}",
                anchor="start",
                class_=f"name {point.look}",
            )
        )
    return join(parts)
