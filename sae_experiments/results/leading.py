"""The metrics that lead: their means come first in `final_info.json`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sae_experiments.metric_info import MetricInfo

#: Most important first; those that a study lacks are skipped.
LEADING = (
    "truth_f1",
    "truth_mcc",
    "sae_fvu_ordinary",  # where some rows are outliers
    "sae_fvu",
    "sae_l0",
    "ce_delta_bits",
    "sae_dead_frac",
    "rule_f1",
    "loss_recovered",
)


def leading(infos: Iterable[MetricInfo], first: Sequence[str] = ()) -> list[str]:
    """Names of metrics, most important first.

    Args:
        infos: Descriptions of all metrics; those shown in tables follow the known leaders.
        first: Metrics that the user defined, which come before all others.
    """
    infos = list(infos)
    known = {info.name for info in infos}
    shown = [info.name for info in infos if info.shown]
    return list(dict.fromkeys([*first, *(name for name in LEADING if name in known), *shown]))
