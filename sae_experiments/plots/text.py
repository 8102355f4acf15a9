"""Short texts on figures: shares, long names, lists, metric labels."""

from __future__ import annotations

from sae_experiments.results.compare import DIRECTION
from sae_experiments.results.table import RunTable


def percent(share: float) -> str:
    """Format a share in per cent with two significant digits and at most one decimal."""
    value = 100 * share
    if value == 0:
        return "0 %"
    if 0 < value < 0.1:
        return "< 0.1 %"
    if value < 9.95 and round(value, 1) % 1:
        return f"{value:.1f} %"
    return f"{value:.0f} %"


def minus(text: str) -> str:
    """Replace hyphens by minus signs, for numbers."""
    return text.replace("-", "\N{MINUS SIGN}")


def clip(text: str, width: int = 38) -> str:
    """Shorten a long name in its middle, where names differ least."""
    if len(text) <= width:
        return text
    head = width // 2
    tail = width - head - 1
    return f"{text[:head]}…{text[-tail:]}"


def metric_label(table: RunTable, metric: str, *, direction: bool = True) -> str:
    """Format an axis label: `title (unit)` and, on a second line, which direction is better."""
    info = table.info(metric)
    label = info["title"]
    if info["unit"]:
        label += f" ({info['unit']})"
    better = DIRECTION[info["better"]]
    if direction and better:
        label += f"\n{better}"
    return label
