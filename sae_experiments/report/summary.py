"""The parts of a report that are plain tables: what was run, final numbers against the baseline, configuration, times, formulas."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from sae_experiments.report.markup import Markup, join, table, tag
from sae_experiments.results.choices import config_diff, flat_config
from sae_experiments.results.compare import DIRECTION
from sae_experiments.results.notes import WARNING, corpus_lines, notes, warning_lines
from sae_experiments.results.numbers import delta_text, value_text
from sae_experiments.results.records import mean_stderr
from sae_experiments.results.table import Run, RunTable

MARKS = {"better": "▲ better", "worse": "▼ worse", "differs": "◆ differs"}
TALL = 6  # more runs than this are rows, not columns


def header(runs: RunTable, title: str) -> Markup:
    """Title, and for each run its state in a few words."""
    return tag(
        "header",
        tag("h1", title),
        [_about(run, len(runs.runs) > 1) for run in runs.runs[:12]],
        _alarm(runs),
        _warnings(runs),
        id="top",
    )


def _about(run: Run, named: bool) -> Markup:
    manifest = run.manifest
    git = manifest.get("git") if isinstance(manifest.get("git"), dict) else {}
    commit = (
        f"commit {str(git.get('commit', ''))[:7]}{' + changes' if git.get('dirty') else ''}"
        if git.get("commit")
        else None
    )
    facts = [
        tag("strong", run.title) if named else None,
        run.status
        and tag("span", run.status, class_=f"chip {'good' if run.status == 'done' else 'bad'}"),
        f"preset {run.preset}" if run.preset else None,
        manifest.get("device"),
        str(manifest.get("ended") or manifest.get("started") or "").replace("T", " ")[:16] or None,
        commit,
    ]
    return tag(
        "p",
        [tag("span", fact) if not isinstance(fact, Markup) else fact for fact in facts if fact],
        class_="facts",
    )


def _alarm(runs: RunTable) -> Markup | None:
    stand_in = sorted({d for run in runs.runs for d in run.stats if run.stand_in(d)})
    if not stand_in:
        return None
    return tag(
        "p",
        f"STAND-IN TEXT, not the real corpus: {', '.join(stand_in)}. Compare these numbers with nothing published.",
        class_="alarm",
    )


def _warnings(runs: RunTable) -> Markup | None:
    """What is worse than its number looks, of every run."""
    found = [tag("li", line.removeprefix(WARNING).strip()) for line in warning_lines(runs)]
    return (
        tag("div", tag("strong", "Warnings"), tag("ul", found), class_="alarm") if found else None
    )


def final_numbers(runs: RunTable, rows: pd.DataFrame) -> Markup:
    """The shown metrics: for one run a column each dataset, for several a table each dataset; deltas below the values."""
    found: list[dict[str, Any]] = rows.to_dict("records")
    cells = {(row["dataset"], row["metric"], row["name"]): row for row in found}
    hidden = [m for m in runs.metrics if not runs.info(m)["shown"]]
    shown = [m for m in runs.metrics if runs.info(m)["shown"]] or hidden
    parts = _tables(runs, cells, shown)
    more = _tables(runs, cells, hidden) if len(shown) < len(runs.metrics) else []
    folded = (
        tag("details", tag("summary", f"{len(hidden)} more metric{'s' * (len(hidden) > 1)}"), more)
        if more
        else None
    )
    texts = [
        tag("li", text)
        for text in notes(runs, rows)
        if not text.startswith(("In comparison.csv", WARNING))
    ]
    return join(parts, folded, tag("ul", texts, class_="notes"))


def _tables(
    runs: RunTable, cells: Mapping[tuple[str, str, str], dict[str, Any]], metrics: list[str]
) -> list[Markup]:
    if len(runs.runs) == 1:
        groups: dict[str, list[str]] = {}
        for dataset in runs.datasets:
            groups.setdefault(dataset.split(".")[0] if "." in dataset else "", []).append(dataset)
        return [_one_run(runs, cells, metrics, name, datasets) for name, datasets in groups.items()]
    return [
        join(
            tag("h3", d),
            [tag("p", line, class_="quiet") for line in corpus_lines(runs, d)],
            _many_runs(runs, cells, metrics, d),
        )
        for d in runs.datasets
    ]


def _one_run(
    runs: RunTable,
    cells: Mapping[tuple[str, str, str], dict[str, Any]],
    metrics: list[str],
    group: str,
    datasets: list[str],
) -> Markup:
    run = runs.runs[0]
    there = [m for m in metrics if any((d, m, run.name) in cells for d in datasets)]
    heads = [
        "metric",
        *(tag("th", d.removeprefix(f"{group}.") if group else d, scope="col") for d in datasets),
    ]
    body = [
        [_metric(runs, m), *(_value(cells.get((d, m, run.name)), False) for d in datasets)]
        for m in there
    ]
    return (
        join(tag("h3", group) if group else None, table(heads, body, class_="numbers"))
        if there
        else Markup("")
    )


def _many_runs(
    runs: RunTable,
    cells: Mapping[tuple[str, str, str], dict[str, Any]],
    metrics: list[str],
    dataset: str,
) -> Markup:
    base = runs.baseline
    shown = (
        [base] if base is not None and base not in runs.runs and dataset in base.stats else []
    ) + [r for r in runs.runs if dataset in r.stats]
    there = [m for m in metrics if any((dataset, m, run.name) in cells for run in shown)]
    if not there:
        return Markup("")
    if len(shown) > TALL:
        body = [
            [run.title, *(_value(cells.get((dataset, m, run.name)), run is base) for m in there)]
            for run in shown
        ]
        return table(["run", *(_metric(runs, m) for m in there)], body, class_="numbers wide")
    body = [
        [
            _metric(runs, m),
            *(_value(cells.get((dataset, m, run.name)), run is base) for run in shown),
        ]
        for m in there
    ]
    return table(["metric", *(run.title for run in shown)], body, class_="numbers")


def _metric(runs: RunTable, metric: str) -> Markup:
    info = runs.info(metric)
    arrow = {"up": " ↑", "down": " ↓"}.get(info["better"], "")
    title = tag(
        "span",
        f"{info['title']}{arrow}",
        title=join(f"{info['formula']}. " if info["formula"] else "", DIRECTION[info["better"]]),
    )
    unit = f" {info['unit']}" if info["unit"] else ""
    return join(title, tag("small", f"{metric}{unit}") if info["title"] != metric or unit else None)


def _value(row: Mapping[str, Any] | None, is_baseline: bool) -> Markup:
    if row is None:
        return tag("td", "", class_="none")
    if row["mean"] is None or math.isnan(row["mean"]):
        return tag("td", "–", tag("small", row["why_null"] or None), class_="none")
    text = value_text(row)
    delta = delta_text(row)
    if is_baseline or not delta:
        return tag(
            "td",
            text,
            tag("small", "baseline")
            if is_baseline
            else tag("small", f"not comparable: {row['not_comparable']}")
            if row["not_comparable"] and row["baseline"]
            else None,
        )
    mark = MARKS.get(row["verdict"], "")
    return tag(
        "td",
        text,
        tag(
            "small", f"Δ {delta} ", tag("b", mark) if mark else None, class_=row["verdict"] or None
        ),
    )


def differences(runs: RunTable) -> Markup | None:
    """What each run's configuration has different from the baseline's."""
    base = runs.baseline
    parts = []
    for run in runs.runs:
        if base is None or run is base or not base.config:
            continue
        found = config_diff(run, base)
        body = [
            [tag("code", key), tag("td", tag("code", was)), tag("td", tag("code", now))]
            for key, was, now in found
        ]
        content = (
            table(["key", f"{base.name} (baseline)", run.name], body, class_="config")
            if body
            else tag("p", "Nothing that is recorded.")
        )
        title = f"{run.title}: {len(body) or 'no'} setting{'s' * (len(body) != 1)} differ{'s' * (len(body) == 1)} from {base.name}"
        parts.append(
            tag(
                "details",
                tag("summary", title),
                content,
                open=len(runs.runs) <= 3 and len(body) <= 30,
            )
        )
    return join(parts) if parts else None


def configuration(run: Run) -> Markup:
    """The command that made the run and its whole resolved configuration."""
    argv = " ".join(map(str, run.manifest.get("argv") or []))
    body = [
        [tag("code", key), tag("td", tag("code", value))]
        for key, value in flat_config(run.config).items()
    ]
    command = (
        tag("pre", f"python experiment.py {argv}".rstrip(), class_="command")
        if run.manifest.get("argv") is not None
        else None
    )
    return tag(
        "details",
        tag("summary", f"{run.title}: {len(body)} settings"),
        command,
        table(["key", "value"], body, class_="config"),
    )


def provenance(run: Run) -> Markup | None:
    """Where every text came from, and the versions of what computed."""
    corpora = run.manifest.get("corpora")
    rows = []
    for name, about in sorted(corpora.items()) if isinstance(corpora, dict) else []:
        if isinstance(about, dict):
            known = [(k, v) for k, v in about.items() if not isinstance(v, dict)] + [
                (k, json.dumps(v)) for k, v in about.items() if isinstance(v, dict)
            ]
            rows.append([name, tag("td", "; ".join(f"{k}: {v}" for k, v in known))])
    versions = run.manifest.get("versions")
    if isinstance(versions, dict):
        rows.append(["versions", tag("td", ", ".join(f"{k} {v}" for k, v in versions.items()))])
    return (
        tag(
            "details",
            tag("summary", f"{run.title}: corpora and versions"),
            table(["what", "about"], rows, class_="config"),
        )
        if rows
        else None
    )


def times(run: Run) -> Markup | None:
    """Seconds of every stage of every dataset, mean over the seeds."""
    datasets = list(dict.fromkeys(r.dataset for r in run.records))
    stages = list(
        dict.fromkeys(stage for r in run.records for stage in r.seconds if stage != "cell")
    )
    if not stages:
        return None

    def cell(dataset: str, stage: str) -> str:
        mean, _, _ = mean_stderr(r.seconds.get(stage) for r in run.records if r.dataset == dataset)
        return "" if mean is None else f"{mean:.1f}"

    body = [[stage, *(cell(d, stage) for d in datasets)] for stage in [*stages, "cell"]]
    named = [["whole cell" if name == "cell" else name, *rest] for name, *rest in body]
    return tag(
        "details",
        tag("summary", f"{run.title}: seconds"),
        table(["stage", *datasets], named, class_="numbers"),
    )


def formulas(runs: RunTable) -> Markup | None:
    """Title and formula of every metric."""
    known: Iterable[tuple[str, dict[str, Any]]] = ((m, runs.info(m)) for m in runs.metrics)
    body = [
        [tag("code", m), info["title"], tag("td", info["formula"]), info["unit"]]
        for m, info in known
        if info["formula"]
    ]
    return (
        tag(
            "details",
            tag("summary", f"Formulas of {len(body)} metrics"),
            table(["metric", "title", "formula", "unit"], body, class_="config"),
        )
        if body
        else None
    )
