"""Runs against the baseline: deltas with their standard errors, what differs in configuration, and the tables that show both.

A metric of a run is never subtracted from one that was measured under other conditions (preset, text, and what the metric says it depends
on): the table says why instead.
"""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from sae_experiments import quality_warnings as warned
from sae_experiments.results.records import RESULT_NEUTRAL_KEYS, Stat, mean_stderr
from sae_experiments.results.table import Run, RunTable

WIDTH = 100
NAME_WIDTH = 32
ABSENT = "(absent)"
WARNING = "Warning:"
DIRECTION = {
    "up": "higher is better",
    "down": "lower is better",
    "target": "has a target",
    "none": "",
}
COLOURS = {"better": "\033[32m", "worse": "\033[31m"}
NUMBERS = (
    "mean",
    "stderr",
    "baseline_mean",
    "baseline_stderr",
    "baseline_n",
    "delta",
    "delta_stderr",
    "pairs",
    "believable",
)
HOW = "±: one standard error over the n seeds; delta: run - baseline, paired by seed where the seeds are the same."
RULE = (
    "better, worse, differs: the delta exceeds 2 of its standard errors, and the noise of the evaluation itself (2 sqrt(2) standard errors of the "
    "metric over resampled text) where it is known; with fewer than 5 seeds that is a hint, not a proof."
)


class Delta(NamedTuple):
    """A difference of means: paired by seed, or Welch's (unpaired); ``stderr`` is None where either side has fewer than 2 values."""

    value: float | None
    stderr: float | None
    test: str  # paired | welch | ""
    n: int  # pairs, for paired


def delta(run: Stat, baseline: Stat) -> Delta:
    """run - baseline, with stdev(differences)/sqrt(n) for the same seeds, else sqrt(se_run^2 + se_baseline^2)."""
    if run.mean is None or baseline.mean is None:
        return Delta(None, None, "", 0)
    mine, theirs = (
        {seed: v for seed, v in stat.values.items() if v is not None} for stat in (run, baseline)
    )
    if mine.keys() == theirs.keys() and len(mine) > 1:
        mean, spread, n = mean_stderr(mine[seed] - theirs[seed] for seed in mine)
        return Delta(mean, spread, "paired", n)
    if run.stderr is None or baseline.stderr is None:
        return Delta(run.mean - baseline.mean, None, "", 0)
    return Delta(run.mean - baseline.mean, math.hypot(run.stderr, baseline.stderr), "welch", 0)


def verdict(found: Delta, scale: float, better: str, believable: float | None = None) -> str:
    """better, worse or differs, only when |delta| > 2 standard errors, above rounding error and above what is ``believable``; else ''."""
    if (
        found.value is None
        or found.stderr is None
        or abs(found.value) <= max(2 * found.stderr, 1e-9 * scale, believable or 0.0)
    ):
        return ""
    if better not in ("up", "down"):
        return "differs"
    return "better" if (found.value > 0) == (better == "up") else "worse"


def smallest_believable(runs: Iterable[Run], dataset: str, metric: str) -> float | None:
    """The smallest difference worth believing, 2 sqrt(2) times the evaluation's standard error (the largest of all cells); None: not known.

    Runs are evaluated on the same text, so most of the noise is shared and this errs on the side of caution.
    """
    known = [
        r.noise[metric]
        for run in runs
        for r in run.records
        if r.dataset == dataset and metric in r.noise
    ]
    return 2 * math.sqrt(2) * max(known) if known else None


def compare(table: RunTable) -> pd.DataFrame:
    """One row for each dataset, metric and run (the baseline first): everything the tables show and ``comparison.csv`` holds."""
    baseline = table.baseline
    runs = ([baseline] if baseline else []) + [run for run in table.runs if run is not baseline]
    rows = []
    for dataset in table.datasets:
        for metric in table.metrics:
            of_metric = [
                _row(table, run, dataset, metric)
                for run in runs
                if metric in run.stats.get(dataset, {})
            ]
            rows += (
                of_metric
                if any(row["run"] in {run.name for run in table.runs} for row in of_metric)
                else []
            )
    found = pd.DataFrame(rows)
    return found.astype(dict.fromkeys(NUMBERS, "float64")) if rows else found


def _row(table: RunTable, run: Run, dataset: str, metric: str) -> dict[str, Any]:
    info, stat, baseline = table.info(metric), run.stats[dataset][metric], table.baseline
    base = baseline.stats.get(dataset, {}).get(metric) if baseline else None
    why_not = (
        ""
        if run is baseline
        else "baseline has no value"
        if baseline and base is None
        else table.why_not(run, dataset, metric)
    )
    found = (
        delta(stat, base)
        if base and run is not baseline and not why_not
        else Delta(None, None, "", 0)
    )
    scale = max(abs(stat.mean or 0), abs(base.mean or 0)) if base else 0
    believable = (
        smallest_believable([run, baseline], dataset, metric)
        if baseline and found.value is not None
        else None
    )
    reasons = [
        why
        for record in run.records
        if record.dataset == dataset and (why := record.why_null.get(metric))
    ]
    return {
        "dataset": dataset,
        "metric": metric,
        "title": info["title"],
        "unit": info["unit"],
        "better": info["better"],
        "shown": info["shown"],
        "run": run.name,
        "label": run.label,
        "is_baseline": run is baseline,
        "preset": run.preset,
        "corpus": run.provenance(dataset).get("corpus"),
        "stand_in": run.stand_in(dataset),
        "status": run.status,
        "mean": stat.mean,
        "stderr": stat.stderr,
        "n": stat.n,
        "why_null": "; ".join(dict.fromkeys(reasons)),
        "baseline": baseline.name if baseline else None,
        "baseline_mean": base.mean if base else None,
        "baseline_stderr": base.stderr if base else None,
        "baseline_n": base.n if base else None,
        "delta": found.value,
        "delta_stderr": found.stderr,
        "test": found.test,
        "pairs": found.n or None,
        "believable": believable,
        "verdict": verdict(found, scale, info["better"], believable),
        "not_comparable": why_not,
    }


def config_diff(run: Run, baseline: Run) -> list[tuple[str, str, str]]:
    """(key, baseline, run) for every value that differs: resolved configuration, preset, device, code and library versions."""
    mine, theirs = _facts(run), _facts(baseline)
    keys = [
        key
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key, ABSENT) != theirs.get(key, ABSENT)
    ]
    return [(key, theirs.get(key, ABSENT), mine.get(key, ABSENT)) for key in keys]


def flat_config(config: Mapping[str, Any]) -> dict[str, str]:
    """``{"a": {"b": 1}}`` as ``{"a.b": "1"}``, by key."""
    return dict(sorted(_flat(config).items()))


def _facts(run: Run) -> dict[str, str]:
    config = {key: value for key, value in run.config.items() if key not in RESULT_NEUTRAL_KEYS}
    around = {
        key: run.manifest[key]
        for key in ("preset", "device", "git", "versions")
        if key in run.manifest
    }
    return _flat(around) | _flat(config)


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        value = {str(i): v for i, v in enumerate(value)}
    if not isinstance(value, Mapping) or not value:
        return {prefix: value if isinstance(value, str) else json.dumps(value, default=str)}
    return {
        key: v
        for name, part in value.items()
        for key, v in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def terminal(table: RunTable, rows: pd.DataFrame, *, colour: bool = False) -> str:
    """The comparison as text of at most 100 columns: for each dataset and metric, a line a run."""
    lines: list[str] = []
    for dataset in table.datasets:
        lines += ["", f"== {dataset} ==", *(f"   {line}" for line in corpus_lines(table, dataset))]
        for metric, of_metric in itertools.groupby(
            _shown(rows, dataset), key=lambda row: row["metric"]
        ):
            for i, row in enumerate(of_metric):
                lines += ["", _cut(f"{metric}{_about(row)}", WIDTH)] if i == 0 else []
                lines += _terminal_row(table, row, colour)
    lines += [
        "",
        *(
            line
            for text in notes(table, rows)
            for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")
        ),
    ]
    for run in table.runs:
        if table.baseline and run is not table.baseline and table.baseline.config:
            lines += _diff_lines(run, table.baseline)
    return "\n".join(lines).strip("\n")


def _shown(rows: pd.DataFrame, dataset: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = rows.to_dict("records")
    return [row for row in found if row["shown"] and row["dataset"] == dataset]


def _terminal_row(table: RunTable, row: dict[str, Any], colour: bool) -> list[str]:
    name = _cut(
        row["run"] if row["label"] in ("", row["run"]) else f"{row['run']}: {row['label']}",
        NAME_WIDTH,
    )
    left = f"  {name:<{NAME_WIDTH}} {'null' if _missing(row['mean']) else value_text(row):>24}"
    if row["is_baseline"] or _missing(row["mean"]):
        return [
            _cut(
                f"{left}  {' '.join(filter(None, [row['why_null'], '(baseline)' if row['is_baseline'] else '']))}",
                WIDTH,
            )
        ]
    if table.baseline is None:
        return [left]
    if row["not_comparable"]:
        parts = textwrap.wrap(f"not comparable: {row['not_comparable']}", WIDTH - len(left) - 2)
        return [f"{left if i == 0 else ' ' * len(left)}  {part}" for i, part in enumerate(parts)]
    mark = (
        f"{COLOURS[row['verdict']]}{row['verdict']}\033[0m"
        if colour and row["verdict"] in COLOURS
        else row["verdict"]
    )
    return [f"{left}  {delta_text(row):<21}  {mark}".rstrip()]


def _diff_lines(run: Run, baseline: Run, most: int = 12) -> list[str]:
    found = config_diff(run, baseline)
    lines = [
        "",
        _cut(
            f"{run.name} differs from {baseline.name} in {len(found) or 'no'} recorded setting{'s' * (len(found) != 1)}:",
            WIDTH,
        ),
    ]
    lines += [
        _cut(f"  {_cut(key, 36)}: {_tail(was, 28)} -> {_tail(now, 28)}", WIDTH)
        for key, was, now in found[:most]
    ]
    return lines + (
        [f"  and {len(found) - most} more, listed in comparison.md"] if len(found) > most else []
    )


def markdown(table: RunTable, rows: pd.DataFrame) -> str:
    """The comparison as a Markdown page: tables, notes, formulas, differences in configuration."""
    lines = ["# Comparison of runs", "", *(f"{text}  " for text in notes(table, rows))]
    for dataset in table.datasets:
        lines += [
            "",
            f"## {dataset}",
            "",
            *(f"{line}  " for line in corpus_lines(table, dataset)),
            "",
        ]
        lines += ["| metric | run | mean ± standard error | delta | |", "|---|---|---:|---:|---|"]
        last = ""
        for row in _shown(rows, dataset):
            name = f"`{row['metric']}`{_about(row)}" if row["metric"] != last else ""
            last = row["metric"]
            text = (
                "baseline"
                if row["is_baseline"]
                else f"not comparable: {row['not_comparable']}"
                if row["not_comparable"]
                else row["verdict"]
            )
            title = (
                row["run"] if row["label"] in ("", row["run"]) else f"{row['run']}: {row['label']}"
            )
            cells = [name, title, value_text(row), delta_text(row), text if table.baseline else ""]
            lines.append("| " + " | ".join(_escape(cell) for cell in cells) + " |")
    formulas = [
        (metric, info)
        for metric in table.metrics
        if (info := table.info(metric))["formula"] and info["shown"]
    ]
    lines += ["", "## Formulas", ""] if formulas else []
    lines += [f"- `{metric}` ({info['title']}): {info['formula']}" for metric, info in formulas]
    for run in table.runs:
        if table.baseline and run is not table.baseline and table.baseline.config:
            lines += [
                "",
                f"## What differs: {run.title} against {table.baseline.name}",
                "",
                "| key | baseline | run |",
                "|---|---|---|",
            ]
            lines += [
                "| " + " | ".join(f"`{_escape(_cut(cell, 200))}`" for cell in found) + " |"
                for found in config_diff(run, table.baseline)
            ]
    return "\n".join(lines) + "\n"


def corpus_lines(table: RunTable, dataset: str) -> list[str]:
    """One line for each preset and corpus the runs used for a dataset; stand-in text in capitals."""
    groups: dict[str, list[str]] = {}
    for run in table.runs:
        if dataset in run.stats:
            corpus = run.provenance(dataset).get("corpus") or "unknown"
            text = f"preset {run.preset or 'unknown'}, corpus {corpus}{', STAND-IN TEXT (not the real corpus)' if run.stand_in(dataset) else ''}"
            groups.setdefault(text, []).append(run.name)
    return [
        text if len(groups) == 1 else _cut(f"{text}: {', '.join(names)}", WIDTH - 3)
        for text, names in groups.items()
    ]


def notes(table: RunTable, rows: pd.DataFrame) -> list[str]:
    """What a reader of any of the tables must know."""
    found = [
        f"Baseline: {table.baseline.title}."
        if table.baseline
        else "No baseline: there is no run_0, so no deltas (--baseline=RUN names one)."
    ]
    if table.baseline and table.baseline.path is None:
        found.append(str(table.baseline.manifest.get("provenance", "")))
    found += [HOW, RULE] if table.baseline else []
    states = [f"{run.name} {run.status}" for run in table.runs if run.status not in ("done", "")]
    hidden = rows.loc[~rows["shown"], "metric"].nunique() if len(rows) else 0
    found += [f"Not finished in good order: {', '.join(states)}."] if states else []
    found += warning_lines(table)
    devices = {
        str(run.manifest.get("device") or "unknown")
        for run in [*table.runs, *filter(None, [table.baseline])]
    }
    found += (
        [
            f"Times and speeds are from different devices ({', '.join(sorted(devices))}): do not compare them."
        ]
        if len(devices) > 1
        else []
    )
    return found + (
        [f"In comparison.csv only: {hidden} more metric{'s' * (hidden > 1)}."] if hidden else []
    )


def warning_lines(table: RunTable) -> list[str]:
    """``Warning: ...`` for each kind of warning of each run, the baseline's first."""
    runs = list({id(run): run for run in [*filter(None, [table.baseline]), *table.runs]}.values())
    found = []
    for run in runs:
        cells = [(record.dataset, record.seed, record.warnings) for record in run.records]
        name = f"{run.name}, " if len(runs) > 1 else ""
        found += [f"{WARNING} {name}{line}" for line in warned.lines(cells)]
    return found


def value_text(row: Mapping[str, Any]) -> str:
    """``0.281 ± 0.003 (n=3)``, or why there is no value."""
    if _missing(row["mean"]):
        return f"null ({row['why_null']})" if row["why_null"] else "null"
    return with_error(row["mean"], row["stderr"]) + (f" (n={row['n']})" if row["n"] else "")


def delta_text(row: Mapping[str, Any]) -> str:
    """``-0.031 ± 0.005``; '' where nothing was subtracted."""
    if row["delta"] == 0 and (_missing(row["delta_stderr"]) or not row["delta_stderr"]):
        return "0"
    return "" if _missing(row["delta"]) else with_error(row["delta"], row["delta_stderr"], sign="+")


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """A value to the second digit of its error; to four significant digits where the error is not known."""
    if _missing(error):
        return f"{value:{sign},.0f}" if abs(value) >= 1e4 else f"{value:{sign}.4g}"
    digits = 1 - math.floor(math.log10(error)) if error else 4
    if digits > 7 or abs(value) >= 1e9:
        return f"{value:{sign}.3g} ± {error:.1g}"
    return f"{value:{sign},.{max(digits, 0)}f} ± {error:,.{max(digits, 0)}f}"


def _about(row: Mapping[str, Any]) -> str:
    title = (
        []
        if row["title"] == row["metric"]
        else [row["title"] + (f" ({row['unit']})" if row["unit"] else "")]
    )
    return "".join(
        f"  {text}"
        for text in [", ".join([*title, *filter(None, [DIRECTION[row["better"]]])])]
        if text
    )


def _missing(value: Any) -> bool:
    return value is None or math.isnan(value)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _tail(text: str, width: int) -> str:
    return text if len(text) <= width else f"…{text[1 - width :]}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
