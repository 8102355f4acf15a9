"""The comparison as a Markdown page with every shown metric, formulas and configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from sae_experiments.results.choices import chosen_differences, config_diff
from sae_experiments.results.compare import DIRECTION
from sae_experiments.results.notes import corpus_lines, notes
from sae_experiments.results.numbers import delta_text, value_text
from sae_experiments.results.table import Run, RunTable

LONGEST_VALUE = 200


def markdown(table: RunTable, rows: pd.DataFrame) -> str:
    """Format the comparison: notes, a table per dataset, formulas, differing settings."""
    lines = ["# Comparison of runs", "", *(f"{note}  " for note in notes(table, rows))]
    for dataset in table.datasets:
        lines += ["", f"## {dataset}", ""]
        lines += [f"{line}  " for line in corpus_lines(table, dataset)]
        lines += ["", "| metric | run | mean ± standard error | delta | |"]
        lines += ["|---|---|---:|---:|---|", *_rows(table, rows, dataset)]
    lines += _formulas(table)
    for run, *_ in table.folders:
        if table.baselines and not table.is_baseline(run) and table.baselines[0].whole_config:
            lines += _differences(run, table.baselines[0])
    return "\n".join(lines) + "\n"


def _rows(table: RunTable, rows: pd.DataFrame, dataset: str) -> Iterator[str]:
    shown = rows.loc[(rows["dataset"] == dataset) & rows["shown"]]
    last = ""
    for row in shown.to_dict("records"):
        name = f"`{row['metric']}`{_about(row)}" if row["metric"] != last else ""
        last = row["metric"]
        label = row["label"]
        title = row["name"] if label in ("", row["name"]) else f"{row['name']}: {label}"
        yield _line([name, title, value_text(row), delta_text(row), _remark(table, row)])


def _remark(table: RunTable, row: Mapping[str, Any]) -> str:
    if not table.baselines:
        return ""
    if row["is_baseline"]:
        return "baseline"
    if row["not_comparable"]:
        return f"not comparable: {row['not_comparable']}"
    return row["verdict"]


def _about(row: Mapping[str, Any]) -> str:
    title = "" if row["title"] == row["metric"] else row["title"]
    if title and row["unit"]:
        title += f" ({row['unit']})"
    about = ", ".join(filter(None, [title, DIRECTION[row["better"]]]))
    return f"  {about}" if about else ""


def _formulas(table: RunTable) -> list[str]:
    lines = []
    for metric in table.metrics:
        info = table.info(metric)
        if info["formula"] and info["shown"]:
            lines.append(f"- `{metric}` ({info['title']}): {info['formula']}")
    return ["", "## Formulas", "", *lines] if lines else []


def _differences(run: Run, baseline: Run) -> list[str]:
    lines = ["", f"## What differs: {run.folder} against {baseline.folder}", ""]
    for key, was, now in chosen_differences(run, baseline):
        lines.append(f"- {_escape(key)}: {_escape(was)} -> {_escape(now)}")
    lines += ["", "Every recorded setting:", "", "| key | baseline | run |", "|---|---|---|"]
    for difference in config_diff(run, baseline):
        lines.append(_line([f"`{_cut(cell)}`" for cell in difference]))
    return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(_escape(cell) for cell in cells)} |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"
