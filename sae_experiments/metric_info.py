"""Description of a metric: name, formula, unit and direction, declared beside its code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from sae_experiments.conditions import CONDITIONS, ON_ACTIVATIONS

Better = Literal["up", "down", "none", "target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricInfo:
    """Description of one metric of `final_info.json`."""

    name: str
    """Key in `final_info.json`."""
    title: str
    """Heading of its column or axis."""
    formula: str
    """Definition in one line."""
    unit: str = ""
    """Unit; empty for a pure number."""
    better: Better
    """Direction of improvement; `target`: neither end is good, `none`: descriptive only."""
    shown: bool = True
    """Part of the printed and Markdown tables; the CSV table holds every metric."""
    depends: tuple[str, ...] = ON_ACTIVATIONS
    """Conditions that two runs must share for their values to be comparable.

    These are all of the conditions that the value depends on besides what the metric measures;
    the name of the text and the preset are always compared.
    """

    def __post_init__(self) -> None:
        if self.better not in get_args(Better):
            raise ValueError(
                f"better={self.better!r} of metric {self.name} is not one of "
                f"{', '.join(get_args(Better))}"
            )
        unknown = set(self.depends) - set(CONDITIONS)
        if unknown or not self.depends:
            raise ValueError(
                f"depends={self.depends} of metric {self.name} must name some of "
                f"{', '.join(CONDITIONS)}"
            )


class SelfDescribed(ABC):
    """A metric that carries its own description and conditions, which others have in a module."""

    @property
    @abstractmethod
    def infos(self) -> list[MetricInfo]:
        """Descriptions of its values."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Conditions that two values must share to be compared."""


def info(
    name: str,
    title: str,
    formula: str,
    better: Better,
    *,
    unit: str = "",
    shown: bool = True,
    depends: tuple[str, ...] = ON_ACTIVATIONS,
) -> MetricInfo:
    """A description in one call, for tables of many metrics; arguments as in `MetricInfo`."""
    return MetricInfo(
        name=name,
        title=title,
        formula=formula,
        unit=unit,
        better=better,
        shown=shown,
        depends=depends,
    )


def describe(infos: Iterable[MetricInfo]) -> dict[str, dict[str, Any]]:
    """Build the `metrics` entry of the manifest.

    Args:
        infos: Descriptions in the order in which tables show them.

    Returns:
        The fields of each metric by name. `order` keeps the given order, which sorted JSON keys
        would lose.
    """
    described: dict[str, dict[str, Any]] = {}
    for order, info in enumerate(infos):
        described[info.name] = asdict(info) | {"order": order}
    return described
