"""What a metric is called, how it is computed and which way is better: data only, next to each metric's code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from sae_experiments.conditions import CONDITIONS, ON_ACTIVATIONS

Better = Literal["up", "down", "none", "target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricInfo:
    """One metric of ``final_info.json``; ``target`` means that neither end is good, ``none`` that it only describes.

    ``shown`` metrics stand in the printed and Markdown tables; the CSV table holds all. ``depends`` names what must be the same in two
    runs whose values are subtracted, beside the text's name and the preset: all that the value depends on but what it measures.
    """

    name: str
    title: str
    formula: str
    unit: str
    better: Better
    shown: bool = True
    depends: tuple[str, ...] = ON_ACTIVATIONS

    def __post_init__(self) -> None:
        if self.better not in get_args(Better):
            raise ValueError(f"better={self.better!r} of metric {self.name} is not one of {', '.join(get_args(Better))}")
        unknown = set(self.depends) - set(CONDITIONS)
        if unknown or not self.depends:
            raise ValueError(f"depends={self.depends} of metric {self.name} must name some of {', '.join(CONDITIONS)}")


def describe(infos: Iterable[MetricInfo]) -> dict[str, dict[str, Any]]:
    """What the manifest stores under ``metrics``; ``order`` keeps the given order, which sorted JSON keys would lose."""
    found: dict[str, dict[str, Any]] = {}
    for i, info in enumerate(infos):
        fields = asdict(info)
        found[fields.pop("name")] = fields | {"order": i}
    return found
