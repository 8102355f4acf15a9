"""The few metrics that tables on the terminal and the first table of a report show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sae_experiments.results.records import ORDINARY_FVU, Stat, has_outliers
from sae_experiments.results.table import RunTable

#: Metrics of the language model, which every SAE of a run shares.
OF_THE_MODEL = ("best_val_loss",)
GROUPS = {
    "fidelity": ("sae_fvu", "sae_fvu_ordinary", "ce_delta_bits", "loss_recovered"),
    "sparsity": ("sae_l0", "sae_dead_frac"),
    "interpretation": (
        "rule_f1",
        "rule_interpretable_frac",
        "probe_auc_word_k1",
        "seed_found_again",
    ),
    "cost": ("bits_per_char", "sae_train_time"),
}
MOST = 8
FVU = "sae_fvu"
SHORT = {
    "sae_l0": "L0",
    "sae_fvu": "FVU",
    "sae_fvu_ordinary": "FVU (ordinary)",
    "ce_delta_bits": "ΔCE",
    "loss_recovered": "CE recov.",
    "sae_dead_frac": "dead",
    "sae_dense_frac": "dense",
    "rule_f1": "rule F1",
    "rule_interpretable_frac": "rule-like",
    "probe_auc_word_k1": "word AUC",
    "seed_found_again": "found again",
    "bits_per_char": "bits/char",
    "sae_train_time": "fit s",
    "best_val_loss": "val loss",
}
ARROWS = {"up": "↑", "down": "↓"}


def headline(table: RunTable, dataset: str, most: int = MOST) -> list[str]:
    """The metrics that matter most on a dataset, in the order of `GROUPS`.

    Metrics that no run has a value of are left out; if fewer than three are left, the first shown
    metrics stand in.

    Args:
        table: Runs.
        dataset: Name of the dataset.
        most: Maximum number of metrics to choose.
    """
    other = {FVU, ORDINARY_FVU} - {error_metric(table, dataset)}
    valued = _valued(table, dataset) - other
    known = [metric for group in GROUPS.values() for metric in group if metric in valued]
    if len(known) >= 3:
        return known[:most]
    shown = [m for m in table.metrics if m in valued and table.info(m)["shown"]]
    rest = [m for m in shown or table.metrics if m in valued and m not in OF_THE_MODEL]
    return rest[:most]


def error_metric(table: RunTable, dataset: str) -> str:
    """The metric that measures the reconstruction error on a dataset.

    It is the FVU of all rows, unless some are outliers: these hold most of the variance, and SAEs
    are not fitted to them. Then it is the FVU of the ordinary rows, if every SAE has it.
    """
    of_dataset = [run.stats.get(dataset, {}) for run in table.runs]
    fitted = [stats for stats in of_dataset if _mean(stats, FVU) is not None]
    known = all(_mean(stats, ORDINARY_FVU) is not None for stats in fitted)
    return ORDINARY_FVU if known and any(map(has_outliers, fitted)) else FVU


def _mean(stats: Mapping[str, Stat], metric: str) -> float | None:
    return stats[metric].mean if metric in stats else None


def of_the_model(table: RunTable, dataset: str) -> list[str]:
    """Metrics of the language model that some run has on a dataset."""
    valued = _valued(table, dataset)
    return [metric for metric in OF_THE_MODEL if metric in valued]


def model_lines(
    table: RunTable, dataset: str, names: Sequence[str], texts: Callable[[str, str], str | None]
) -> list[str]:
    """Lines with the numbers of the language model; one that all runs share is shown once.

    Args:
        table: The runs.
        dataset: The dataset.
        names: Names of the runs to list.
        texts: Maps the names of a run and a metric to the value as text; None if there is none.
    """
    lines = []
    for metric in of_the_model(table, dataset):
        given = [(name, texts(name, metric)) for name in names]
        values = [(name, text) for name, text in given if text is not None]
        info = table.info(metric)
        label = f"{info['title']} ({info['unit']})" if info["unit"] else info["title"]
        if len({text for _, text in values}) == 1:
            lines.append(f"{label}: {values[0][1]}")
        else:
            lines.append(f"{label}: " + "; ".join(f"{name} {text}" for name, text in values))
    return lines


def _valued(table: RunTable, dataset: str) -> set[str]:
    return {
        metric
        for run in table.runs
        for metric, stat in run.stats.get(dataset, {}).items()
        if stat.mean is not None
    }


def heading(table: RunTable, metric: str) -> str:
    """Short heading of a metric with an arrow towards the better end."""
    info = table.info(metric)
    title = SHORT.get(metric, info["title"])
    return f"{title} {ARROWS.get(info['better'], '')}".strip()


def groups_of(metrics: Sequence[str]) -> dict[str, list[str]]:
    """Metrics by group; all in one nameless group if none of them has a group."""
    groups = {
        name: [metric for metric in metrics if metric in group] for name, group in GROUPS.items()
    }
    groups = {name: members for name, members in groups.items() if members}
    return groups or {"": list(metrics)}
