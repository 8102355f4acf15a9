"""The end of a report: what differs from the baseline, settings, sources, times, formulas."""

from __future__ import annotations

import json
from typing import Any

from sae_experiments.report.markup import Markup, join, table, tag
from sae_experiments.results.choices import chosen_differences, config_diff, flat_config
from sae_experiments.results.records import mean_stderr
from sae_experiments.results.runs import mapping
from sae_experiments.results.table import Run, RunTable


def differences(runs: RunTable) -> Markup | None:
    """Choices in which each run differs from the baseline, and a folded list of all differences."""
    baseline = runs.baselines[0] if runs.baselines else None
    if baseline is None or not baseline.whole_config:
        return None
    parts = [
        _difference(of_folder[0], baseline)
        for of_folder in runs.folders
        if not runs.is_baseline(of_folder[0])
    ]
    return join(parts) if parts else None


def _difference(run: Run, baseline: Run) -> Markup:
    chosen = [
        [key, tag("td", tag("code", was)), tag("td", tag("code", now))]
        for key, was, now in chosen_differences(run, baseline)
    ]
    recorded = [
        [tag("code", key), tag("td", tag("code", was)), tag("td", tag("code", now))]
        for key, was, now in config_diff(run, baseline)
    ]
    heads = ["choice", f"{baseline.folder} (baseline)", run.folder]
    few = table(heads, chosen, class_="config") if chosen else None
    nothing = None if chosen else tag("p", "Nothing that was chosen differs.")
    plural = "" if len(recorded) == 1 else "s"
    title = f"{len(recorded) or 'No'} recorded setting{plural} differ{'' if plural else 's'}"
    full = table(["key", *heads[1:]], recorded, class_="config") if recorded else None
    return join(
        tag("h3", f"{run.title} against {baseline.folder}"),
        few,
        nothing,
        tag("details", tag("summary", title), full),
    )


def details(runs: RunTable, most: int = 20) -> Markup:
    """Configuration, provenance and times of the first `most` folders, and the formulas."""
    parts = [
        [_settings(of_folder[0]), _provenance(of_folder[0]), _times(of_folder)]
        for of_folder in runs.folders[:most]
    ]
    return join(parts, _formulas(runs))


def _settings(run: Run) -> Markup:
    """The command that made a run, and its whole resolved configuration."""
    settings = flat_config(run.whole_config)
    body = [[tag("code", key), tag("td", tag("code", value))] for key, value in settings.items()]
    argv = run.manifest.get("argv")
    command = None
    if isinstance(argv, list):
        line = f"python experiment.py {' '.join(map(str, argv))}".rstrip()
        command = tag("pre", line, class_="command")
    title = tag("summary", f"{run.folder}: command and {len(body)} settings")
    return tag("details", title, command, table(["key", "value"], body, class_="config"))


def _provenance(run: Run) -> Markup | None:
    """Source of every text, and the versions of the software."""
    rows: list[list[Any]] = []
    for name, about in sorted(mapping(run.manifest.get("corpora")).items()):
        known = [f"{k}: {_word(v)}" for k, v in mapping(about).items()]
        rows.append([name, tag("td", "; ".join(known))])
    versions = mapping(run.manifest.get("versions"))
    if versions:
        rows.append(["versions", tag("td", ", ".join(f"{k} {v}" for k, v in versions.items()))])
    if not rows:
        return None
    title = tag("summary", f"{run.folder}: corpora and versions")
    return tag("details", title, table(["what", "about"], rows, class_="config"))


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _times(of_folder: list[Run]) -> Markup | None:
    """Seconds of every stage, mean over the seeds, a column for each dataset and SAE."""
    columns: dict[str, list[dict[str, float]]] = {}
    for run in of_folder:
        for record in run.records:
            columns.setdefault(f"{record.dataset} {run.sae}".strip(), []).append(record.seconds)
    of_cells = [seconds for cells in columns.values() for seconds in cells]
    stages = list(dict.fromkeys(stage for seconds in of_cells for stage in seconds))
    if not stages:
        return None
    stages = [stage for stage in stages if stage != "cell"] + ["cell"]
    body = [
        ["whole cell" if stage == "cell" else stage, *(_mean(c, stage) for c in columns.values())]
        for stage in stages
    ]
    title = tag("summary", f"{of_folder[0].folder}: seconds")
    return tag("details", title, table(["stage", *columns], body, class_="numbers"))


def _mean(cells: list[dict[str, float]], stage: str) -> str:
    mean, _, _ = mean_stderr(seconds.get(stage) for seconds in cells)
    return "" if mean is None else f"{mean:.1f}"


def _formulas(runs: RunTable) -> Markup | None:
    """Title and formula of every metric."""
    infos = {metric: runs.info(metric) for metric in runs.metrics}
    body = [
        [tag("code", metric), info["title"], tag("td", info["formula"]), info["unit"]]
        for metric, info in infos.items()
        if info["formula"]
    ]
    if not body:
        return None
    heads = ["metric", "title", "formula", "unit"]
    title = tag("summary", f"Formulas of {len(body)} metrics")
    return tag("details", title, table(heads, body, class_="config"))
