"""From run folders to a folder of figures and tables: what ``plot.py`` does once its options are read."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_experiments.cache import clearing
from sae_experiments.errors import UserError
from sae_experiments.files import write_bytes
from sae_experiments.plots.base import NothingToDrawError, bare, save
from sae_experiments.report.page import Picture, write_report
from sae_experiments.results.compare import compare, markdown, terminal
from sae_experiments.results.table import RunTable, find_runs, load_table, runs_in

log = logging.getLogger(__name__)
Figures = Mapping[str, Callable[[], Callable[..., Any]]]  # name in conf/plot -> what makes its draw(table)
REPORT = "report.html"
NO_RUNS = "no runs in {}: make one with 'python experiment.py --out_dir=run_0', or name run folders: 'python plot.py runs/run_1'"


def found_runs(named: Sequence[Path], here: Path, home: Path) -> list[Path]:
    """The run folders to compare: those in ``named``; else ``runs/*`` and ``run_*`` in the current folder, else beside plot.py.

    Raises :class:`UserError`, which says what to run, where there are none.
    """
    if named:
        found = find_runs(named)
    else:
        roots = ([root / "runs", *sorted(root.glob("run_*"))] for root in (here, home))
        found = next((runs for paths in roots if (runs := [run.resolve() for path in paths for run in runs_in(path)])), [])
    if not found:
        raise UserError(NO_RUNS.format(", ".join(map(str, named)) or here / "runs"))
    return found


def default_out(runs: Sequence[Path]) -> Path:
    """``comparison`` in the folder that holds the runs."""
    return Path(os.path.commonpath([run.parent for run in runs])) / "comparison"


def write_tables(table: RunTable, out: Path) -> str:
    """Write ``comparison.csv`` (everything) and ``comparison.md``; returns the text for the terminal."""
    rows = compare(table)
    write_bytes(out / "comparison.csv", rows.to_csv(index=False).encode())
    write_bytes(out / "comparison.md", markdown(table, rows).encode())
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return terminal(table, rows, colour=colour)


def choose(names: str | None, known: Sequence[str]) -> list[str]:
    """The figures named, with commas; all where nothing is said."""
    chosen = [name.strip() for name in names.split(",")] if names else list(known)
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"--figures={name} is not in conf/plot" + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"))
    return chosen


def draw_all(table: RunTable, figures: Figures, out: Path | None, png_dir: Path | None) -> tuple[list[Path], list[Picture]]:
    """Draw every figure; ``figures`` makes each one's ``draw`` on demand. One that fails is a warning line and stops no other.

    Returns the files written to ``out`` (None: none), and the figures as a report shows them.
    """
    written: list[Path] = []
    pictures: list[Picture] = []
    without_data: list[str] = []
    for name, make in figures.items():
        try:
            fig = make()(table)
            files = save(fig, name, out) if out else []
            if png_dir and files:
                write_bytes(png_dir / f"{name}.png", files[0].read_bytes())
            written += files
            pictures.append(Picture(name, *bare(fig)))
        except NothingToDrawError as reason:
            without_data.append(name if len(figures) > 1 else f"{name} ({reason})")
        except Exception as error:  # whatever a figure of the user's raises, the others must be drawn
            log.warning("%s: not drawn, %s: %s", name, type(error).__name__, " ".join(str(error).split())[:300])
    if without_data:
        more = f" and {len(without_data) - 3} more" if len(without_data) > 3 else ""
        log.info("not drawn, since no run has their data: %s%s", ", ".join(without_data[:3]), more)
    return written, pictures


def report(table: RunTable, figures: Figures, out: Path, png_dir: Path | None, asked: Sequence[Path]) -> int:
    """Write tables, figures and ``report.html`` to ``out`` (PNGs to ``png_dir`` too) and print the comparison.

    Returns:
        The exit status: 1 where each of the runs that were ``asked`` for has failed.

    Raises:
        UserError: none of them has results.
    """
    own = [run for run in table.runs if run.path in {path.resolve() for path in asked}]
    if not own:
        raise UserError("no run has results yet; wait for a first cell to finish, or look at the warnings above")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue] (a terminal without ± must not end the program)
    with clearing(out):
        print(write_tables(table, out), flush=True)
        written, pictures = draw_all(table, figures, out, png_dir)
        page = write_report(table, pictures, out / REPORT)
    print(f"\n{len(written)} figure files, comparison.csv and comparison.md in {out}\nopen {page} in a browser: tables, figures, features")
    failed = all(run.manifest.get("status") == "failed" for run in own)
    if failed:
        log.warning("%s failed: these are no finished results", "the only run" if len(own) == 1 else f"all {len(own)} runs")
    return int(failed)


def run_report(folder: Path, figures: Figures) -> Path:
    """Write ``report.html`` and ``figures/`` of one run into its folder; deltas are against ``run_0`` beside it. Returns the report's path."""
    table = load_table([folder.resolve()])
    own = [run for run in table.runs if run.path == folder.resolve()]
    if not own:
        raise UserError(f"{folder} has no results to report")
    table = RunTable(own, table.baseline)
    return write_report(table, draw_all(table, figures, folder / "figures", None)[1], folder / REPORT)
