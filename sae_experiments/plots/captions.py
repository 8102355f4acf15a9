"""Captions: seeds, presets, corpora, and which runs must not be compared with the baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from sae_experiments.plots.selection import Row
from sae_experiments.results.notes import short_list
from sae_experiments.results.table import Run, RunTable

OVER_SEEDS = "error bars: ±1 standard error over seeds (none where n = 1)"
OF_THE_MEAN = "error bars: ±1 standard error of the mean (none where n = 1)"


def caption(runs: Iterable[Run], datasets: Sequence[str], *, error: str = "") -> list[str]:
    """Describe what was drawn.

    Args:
        runs: Runs in the figure.
        datasets: Datasets in the figure.
        error: Meaning of error bars, bands or averages.

    Returns:
        Paragraphs: seeds, `error`, presets and corpora; then stand-in text, if there is any; then
        the runs that are not finished.
    """
    runs = list(runs)
    seeds = _seeds(runs, datasets)
    if error:
        seeds += f"; {error}"
    presets = {run.name: run.preset or "unknown" for run in runs}
    facts = [f"{seeds}.", _grouped("Preset", presets), *_corpora(runs, datasets)]
    paragraphs = [" ".join(facts)]
    stand_ins = [dataset for dataset in datasets if any(run.stand_in(dataset) for run in runs)]
    if stand_ins:
        paragraphs.append(
            f"STAND-IN TEXT, not the real corpus: {', '.join(stand_ins)}. "
            "Compare with no published number."
        )
    unfinished = [f"{run.name} {run.status}" for run in runs if run.status not in ("", "done")]
    if unfinished:
        paragraphs.append(f"Not finished in good order: {', '.join(unfinished)}.")
    return paragraphs


def row_caption(rows: Sequence[Row], *, error: str = "") -> list[str]:
    """Describe what was drawn in a figure with a row of panels per run and dataset."""
    runs = {row.run.name: row.run for row in rows}
    datasets = sorted({row.dataset for row in rows})
    return caption(runs.values(), datasets, error=error)


def not_comparable(
    table: RunTable, runs: Iterable[Run], datasets: Sequence[str], metrics: Sequence[str]
) -> list[str]:
    """Name the runs with hollow markers, and why they must not be compared with the baseline."""
    runs_by_reason: dict[str, dict[str, None]] = {}  # the inner dictionaries are ordered sets
    for run in runs:
        for dataset in datasets:
            for metric in metrics:
                has_metric = metric in run.stats.get(dataset, {})
                if has_metric and hollow(table, run, dataset, metric):
                    reason = table.why_not(run, dataset, metric)
                    runs_by_reason.setdefault(reason, {})[run.name] = None
    if not runs_by_reason:
        return []
    reasons = [f"{short_list(list(names))} ({why})" for why, names in runs_by_reason.items()]
    return [f"Hollow: not comparable with the baseline: {'; '.join(reasons)}."]


def hollow(table: RunTable, run: Run, dataset: str, *metrics: str) -> bool:
    """True if the baseline has the dataset but one of the metrics must not be compared with it."""
    baseline = table.baseline
    if baseline is None or run is baseline or dataset not in baseline.stats:
        return False
    return any(table.why_not(run, dataset, metric) for metric in metrics)


def _seeds(runs: Sequence[Run], datasets: Sequence[str]) -> str:
    """`n = 3 seeds`, or `n = 1 to 3 seeds`, over the runs and datasets."""
    counts: set[int] = set()
    for run in runs:
        seeds = Counter(record.dataset for record in run.records)
        counts |= {seeds[dataset] for dataset in datasets if dataset in run.stats}
    counts.discard(0)
    if not counts:
        return "seeds unknown"
    if counts == {1}:
        return "n = 1 seed"
    if len(counts) == 1:
        return f"n = {max(counts)} seeds"
    return f"n = {min(counts)} to {max(counts)} seeds"


def _corpora(runs: Sequence[Run], datasets: Sequence[str]) -> list[str]:
    """The corpora of each dataset that are not called like the dataset itself."""
    texts = []
    for dataset in datasets:
        used = [run for run in runs if dataset in run.stats]
        corpora = {run.name: str(run.provenance(dataset).get("corpus") or "") for run in used}
        if set(corpora.values()) - {"", dataset}:
            named = {name: corpus or "unknown" for name, corpus in corpora.items()}
            texts.append(_grouped(f"{dataset}: corpus", named))
    return texts


def _grouped(label: str, value_of_run: dict[str, str]) -> str:
    """`Preset laptop; full for run_6.`: the value of most runs, then the exceptions."""
    names_of_value: dict[str, list[str]] = {}
    for name, value in value_of_run.items():
        names_of_value.setdefault(value, []).append(name)
    common, *others = sorted(names_of_value, key=lambda value: -len(names_of_value[value]))
    exceptions = [f"{value} for {short_list(names_of_value[value])}" for value in others]
    return f"{label} {'; '.join([common, *exceptions])}."
