"""The comparison of a report: a table for each dataset with a row for each SAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from sae_experiments.report.markup import Markup, join, table, tag
from sae_experiments.results.compare import DIRECTION
from sae_experiments.results.headline import (
    ARROWS,
    GROUPS,
    SHORT,
    groups_of,
    headline,
    model_lines,
)
from sae_experiments.results.notes import WARNING, corpus_lines, notes
from sae_experiments.results.numbers import delta_text, missing, value_text, with_error
from sae_experiments.results.table import Run, RunTable

MARKS = {"better": "▲ better", "worse": "▼ worse", "differs": "◆ differs"}
PLACES = {
    "best": "best mean of the column",
    "tied": "within the error of the best",
    "behind": "believably behind the best",
    "": "",
}
TALL = 6  # more runs than this are rows of the full tables, not columns
MOST_METRICS = sum(map(len, GROUPS.values()))
Row = Mapping[str, Any]
Cells = Mapping[tuple[str, str, str], Row]  # by dataset, metric and name of the run


def comparison(runs: RunTable, rows: pd.DataFrame) -> Markup:
    """Tables of the main metrics, a folded table of all metrics, and notes on both."""
    cells: dict[tuple[str, str, str], Row] = {}
    for row in rows.to_dict("records"):
        cells[row["dataset"], row["metric"], row["name"]] = {str(k): v for k, v in row.items()}
    parts = [_dataset(runs, cells, dataset) for dataset in runs.datasets]
    lines = [
        tag("li", line)
        for line in notes(runs, rows)
        if not line.startswith(("In comparison.csv", WARNING, "Not comparable"))
    ]
    return join(parts, _every_metric(runs, cells), tag("ul", lines, class_="notes"))


def _shown(runs: RunTable, dataset: str) -> list[Run]:
    """The baseline, then the runs, as far as they have the dataset."""
    outside = [run for run in runs.baselines if not any(run is other for other in runs.runs)]
    return [run for run in [*outside, *runs.runs] if dataset in run.stats]


def _dataset(runs: RunTable, cells: Cells, dataset: str) -> Markup:
    shown = _shown(runs, dataset)
    metrics = headline(runs, dataset, MOST_METRICS)
    groups = groups_of(metrics)
    ordered = [metric for members in groups.values() for metric in members]
    body = [
        tag("tr", _name(runs, run), [_cell(cells.get((dataset, m, run.name))) for m in ordered])
        for run in shown
        if any((dataset, m, run.name) in cells for m in ordered)
    ]
    heads = [
        tag("th", name, colspan=len(members), scope="colgroup", class_="group")
        for name, members in groups.items()
    ]
    first = tag("th", "run" if len(runs.folders) > 1 else "SAE", scope="col", rowspan=2)
    names = [tag("th", _metric(runs, metric, short=True), scope="col") for metric in ordered]
    head = tag("thead", tag("tr", first, heads), tag("tr", names))
    grid = tag("table", head, tag("tbody", body), class_="numbers main")

    def text_of(name: str, metric: str) -> str | None:
        key = dataset, metric, name
        return value_text(cells[key]) if key in cells else None

    run_names = [run.name for run in shown]
    lines = [*corpus_lines(runs, dataset), *model_lines(runs, dataset, run_names, text_of)]
    return join(
        tag("h3", dataset),
        tag("p", "; ".join(lines), class_="quiet about-text"),
        tag("div", grid, class_="scroll", tabindex="0", role="region", aria_label=dataset),
    )


def _name(runs: RunTable, run: Run) -> Markup:
    label = run.label if run.label not in ("", run.name) else None
    base = "baseline" if runs.is_baseline(run) and len(runs.folders) > 1 else None
    small = " · ".join(filter(None, [label, base]))
    return tag("th", run.name, tag("small", small) if small else None, scope="row")


def _cell(row: Row | None) -> Markup:
    """Value and standard error, and below them the difference from the baseline."""
    if row is None:
        return tag("td", "", class_="none")
    if missing(row["mean"]):
        return tag("td", "–", tag("small", row["why_null"] or "null"), class_="none")
    best = row["place"] == "best"
    value = with_error(row["mean"], row["stderr"])
    title = PLACES[row["place"]] or None
    return tag("td", tag("b", value, title=title) if best else value, _delta(row), title=title)


def _delta(row: Row) -> Markup | None:
    delta = "" if row["is_baseline"] else delta_text(row)
    if not delta:
        return None
    mark = MARKS.get(row["verdict"])
    strong = tag("b", mark) if mark else None
    return tag("small", f"Δ {delta} ", strong, class_=row["verdict"] or None)


def _metric(runs: RunTable, metric: str, *, short: bool) -> Markup:
    info = runs.info(metric)
    name = SHORT.get(metric, info["title"]) if short else info["title"]
    arrow = f" {ARROWS[info['better']]}" if info["better"] in ARROWS else ""
    formula = f"{info['title']}: {info['formula']}. " if info["formula"] else ""
    title = tag("span", f"{name}{arrow}", title=join(formula, DIRECTION[info["better"]]))
    unit = f" {info['unit']}" if info["unit"] else ""
    if short:
        return title
    return join(title, tag("small", f"{metric}{unit}") if name != metric or unit else None)


def _every_metric(runs: RunTable, cells: Cells) -> Markup | None:
    if not runs.metrics:
        return None
    parts = [join(tag("h3", d), _full_table(runs, cells, d)) for d in runs.datasets]
    title = f"Every metric ({len(runs.metrics)})"
    return tag("details", tag("summary", title), parts, class_="every")


def _full_table(runs: RunTable, cells: Cells, dataset: str) -> Markup:
    shown = _shown(runs, dataset)
    having = [m for m in runs.metrics if any((dataset, m, run.name) in cells for run in shown)]
    if len(shown) > TALL:
        body = [
            [run.title, *(_full_cell(cells.get((dataset, m, run.name))) for m in having)]
            for run in shown
        ]
        heads = ["run", *(_metric(runs, metric, short=False) for metric in having)]
        return table(heads, body, class_="numbers wide")
    body = [
        [
            _metric(runs, metric, short=False),
            *(_full_cell(cells.get((dataset, metric, run.name))) for run in shown),
        ]
        for metric in having
    ]
    return table(["metric", *(run.title for run in shown)], body, class_="numbers")


def _full_cell(row: Row | None) -> Markup:
    if row is None or missing(row["mean"]):
        return _cell(row)
    return tag("td", value_text(row), _delta(row))
