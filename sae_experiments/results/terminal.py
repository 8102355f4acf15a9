"""The comparison on the terminal: a table for each dataset with a row for each SAE."""

from __future__ import annotations

import io
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sae_experiments.results.choices import chosen_differences, config_diff
from sae_experiments.results.headline import heading, headline, model_lines
from sae_experiments.results.notes import corpus_lines, notes
from sae_experiments.results.numbers import missing, short, value_text
from sae_experiments.results.table import Run, RunTable

WIDEST = 120  # columns; longer lines are hard to read on any terminal
NARROWEST = 40
NAME_WIDTH = 30
MOST_DIFFERENCES = 6
STYLES = {"better": "green", "worse": "red", "differs": "yellow"}
BEST = "*"
Row = Mapping[str, Any]


def terminal_width() -> int:
    """Columns of the terminal, between 40 and 120; 100 if the output is not a terminal."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, NARROWEST), WIDEST)


def terminal(
    table: RunTable, rows: pd.DataFrame, *, colour: bool = False, width: int | None = None
) -> str:
    """The comparison as text.

    Args:
        table: Runs.
        rows: Result of `compare` for them.
        colour: Use ANSI colours and bold type.
        width: Columns; None for those of the terminal.
    """
    output = io.StringIO()
    console = Console(
        file=output,
        width=width or terminal_width(),
        force_terminal=colour,
        color_system="standard" if colour else None,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    for dataset in table.datasets:
        _dataset(console, table, rows.loc[rows["dataset"] == dataset], dataset)
    console.print()
    for line in [*_legend(rows), *notes(table, rows), *_difference_lines(table)]:
        console.print(_wrapped(line, console.width), soft_wrap=True)
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    return "\n".join(lines).strip("\n")


def _wrapped(line: str, width: int) -> str:
    return textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False)


def _dataset(console: Console, table: RunTable, rows: pd.DataFrame, dataset: str) -> None:
    cells: dict[tuple[str, str], Row] = {}
    for row in rows.to_dict("records"):
        cells[row["name"], row["metric"]] = {str(key): value for key, value in row.items()}
    shown = list(dict.fromkeys(rows["name"]))
    console.print()
    console.print(Text(f"== {dataset} ==", style="bold"))

    def text_of(name: str, metric: str) -> str | None:
        return value_text(cells[name, metric]) if (name, metric) in cells else None

    for line in [*corpus_lines(table, dataset), *model_lines(table, dataset, shown, text_of)]:
        console.print(_wrapped(line, console.width), soft_wrap=True)
    metrics = headline(table, dataset)
    while metrics:
        part = _fitting(console, table, cells, shown, metrics)
        console.print()
        console.print(_grid(table, cells, shown, part))
        metrics = metrics[len(part) :]


def _fitting(
    console: Console,
    table: RunTable,
    cells: Mapping[tuple[str, str], Row],
    names: Sequence[str],
    metrics: Sequence[str],
) -> list[str]:
    """As many of the metrics as fit into the width without cutting a word."""
    unlimited = console.options.update_width(10_000)
    for n in range(len(metrics), 1, -1):
        grid = _grid(table, cells, names, metrics[:n])
        if Measurement.get(console, unlimited, grid).maximum <= console.width:
            return list(metrics[:n])
    return list(metrics[:1])


def _grid(
    table: RunTable,
    cells: Mapping[tuple[str, str], Row],
    names: Sequence[str],
    metrics: Sequence[str],
) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    head = "run" if len(table.folders) > 1 else "SAE"
    grid.add_column(head, overflow="fold", max_width=NAME_WIDTH)
    for metric in metrics:
        grid.add_column(heading(table, metric), justify="right", no_wrap=True)
    for name in names:
        given = [cells.get((name, metric)) for metric in metrics]
        first = next((row for row in given if row is not None), None)
        if first is not None:
            grid.add_row(_name(first, name), *map(_cell, given))
    return grid


def _name(row: Row, name: str) -> Text:
    label = row.get("label") or ""
    text = Text(name, style="bold")
    if label and label != name:
        text.append(f"\n{label}", style="not bold dim")
    return text


def _cell(row: Row | None) -> Text:
    """Value, standard error and difference from the baseline below one another."""
    if row is None:
        return Text("")
    if missing(row["mean"]):
        return Text("null", style="dim")
    value, error = short(row["mean"], row["stderr"])
    best = row["place"] == "best"
    text = Text(f"{value}{BEST}" if best else value, style="bold" if best else "")
    if error:
        text.append(f"\n±{error}", style="not bold dim")
    if row["is_baseline"] or missing(row["delta"]):
        return text
    difference, _ = short(row["delta"], row["delta_stderr"], sign="+")
    called = row["verdict"]
    text.append(f"\n{difference}", style=f"not bold {STYLES.get(called, '')}".strip())
    if called:
        text.append(f" {called}", style=f"not bold {STYLES[called]}")
    return text


def _legend(rows: pd.DataFrame) -> list[str]:
    best = len(rows) and (rows["place"] == "best").any()
    return [f"{BEST} best mean of its column among the runs that may be compared"] if best else []


def _difference_lines(table: RunTable) -> Iterator[str]:
    """Differences of each folder from the baseline, a line each."""
    for run, *_ in table.folders:
        baseline = table.baselines[0] if table.baselines else None
        if baseline is None or table.is_baseline(run) or not baseline.whole_config:
            continue
        yield difference_line(run, baseline)


def difference_line(run: Run, baseline: Run) -> str:
    """`run_1 differs from run_0: preset smoke -> laptop; ... (117 recorded settings)`."""
    chosen, settings = chosen_differences(run, baseline), len(config_diff(run, baseline))
    parts = [f"{key} {was} -> {now}" for key, was, now in chosen[:MOST_DIFFERENCES]]
    if len(chosen) > MOST_DIFFERENCES:
        parts.append(f"{len(chosen) - MOST_DIFFERENCES} more choices")
    what = "; ".join(parts) or "in nothing that was chosen"
    recorded = f"{settings or 'no'} recorded setting{'s' * (settings != 1)}"
    return f"{run.folder} differs from {baseline.folder}: {what} ({recorded})."
