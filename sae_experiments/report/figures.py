"""Figures, tables and report of some run folders, as `plot.py` and the end of a run make them."""

from __future__ import annotations

import argparse
import difflib
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from sae_experiments.cache import clearing
from sae_experiments.errors import UserError
from sae_experiments.files import write_bytes
from sae_experiments.plots.base import (
    NothingToDrawError,
    bare,
    save,
    save_for_paper,
)
from sae_experiments.report.page import Picture, write_report
from sae_experiments.results.compare import compare
from sae_experiments.results.markdown import markdown
from sae_experiments.results.notes import short_list
from sae_experiments.results.table import RunTable, find_runs, runs_in, table_of_run
from sae_experiments.results.terminal import terminal

log = logging.getLogger(__name__)
#: Makes the `draw(table)` of each figure, by its name in `conf/plot`. A figure is made when it is
#: drawn, so that a mistake in its YAML file leaves the others alone.
Figures = Mapping[str, Callable[[], Callable[..., Any]]]
REPORT = "report.html"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise a one-line error instead of printing the usage."""
        raise UserError(f"plot.py: {message}; 'python plot.py --help' lists the options")


def parse_options(argv: Sequence[str], description: str | None) -> argparse.Namespace:
    """Parse the command line of `plot.py`.

    Args:
        argv: Arguments after the name of the program.
        description: First part of the help.

    Returns:
        `runs`, `out`, `png_dir`, `baseline`, `figures` and `paper`.

    Raises:
        UserError: An option is unknown or lacks its value.
    """
    parser = _Parser(
        prog="plot.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        help="run folders, or folders of runs (default: runs/)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where figures and tables go (default: comparison/ beside the runs)",
    )
    parser.add_argument(
        "--png_dir",
        type=Path,
        default=Path() if Path("experiment.py").is_file() else None,
        help="PNGs go here too (default: the current folder if it holds experiment.py)",
    )
    parser.add_argument(
        "--baseline",
        help="name or path of the run to compare with "
        "(default: run_0; at full scale the published figures)",
    )
    parser.add_argument("--figures", help="names from conf/plot, with commas (default: all)")
    parser.add_argument(
        "--paper",
        action="store_true",
        help="also write PDFs for print, one and two columns wide, and their captions, to paper/",
    )
    return parser.parse_args(argv)


def draw_for_paper(table: RunTable, figures: Figures, folder: Path) -> list[Path]:
    """Write every figure as PDF in each width of print, and its caption as text.

    Two columns hold all datasets, one column one dataset. A figure that no run has data for is left
    out.
    """
    several = len(table.datasets) > 1
    written = []
    for name, make_draw in figures.items():
        written += _print(table, make_draw, name, "2col", folder)
        for dataset in table.datasets:
            named = f"{name}_{dataset}" if several else name
            written += _print(table.only(dataset), make_draw, named, "1col", folder)
    return written


def _print(
    table: RunTable,
    make_draw: Callable[[], Callable[..., Any]],
    name: str,
    width: str,
    folder: Path,
) -> list[Path]:
    """Write one figure and its caption; nothing if no run has its data."""
    try:
        fig = make_draw()(table)
    except NothingToDrawError:
        return []
    caption = f"{fig.get_suptitle()}. {' '.join(fig.get_supxlabel().split())}\n"
    write_bytes(folder / f"{name}.txt", caption.encode())
    return [save_for_paper(fig, name, width, folder)]


def runs_to_compare(named: Sequence[Path], here: Path, home: Path) -> list[Path]:
    """Find the run folders to compare.

    Args:
        named: Run folders, or folders of runs, that the user named.
        here: Folder to search if none is named, for `runs/*` and `run_*`.
        home: Folder to search if `here` holds no runs.

    Raises:
        UserError: There are no runs.
    """
    if named:
        runs = find_runs(named)
    else:
        runs = _runs_below(here) or _runs_below(home)
    if not runs:
        searched = ", ".join(map(str, named)) or here / "runs"
        raise UserError(
            f"no runs in {searched}: make one with 'python experiment.py --out_dir=run_0', "
            "or name run folders: 'python plot.py runs/run_1'"
        )
    return runs


def _runs_below(root: Path) -> list[Path]:
    folders = [root / "runs", *sorted(root.glob("run_*"))]
    return [run.resolve() for folder in folders for run in runs_in(folder)]


def default_out(runs: Sequence[Path]) -> Path:
    """`comparison` in the folder that holds the runs."""
    return Path(os.path.commonpath([run.parent for run in runs])) / "comparison"


def choose_figures(names: str | None, known: Sequence[str]) -> list[str]:
    """Split a comma-separated list of figures; None or an empty list selects all.

    Raises:
        UserError: A name is not in `known`.
    """
    if not names:
        return list(known)
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"--figures={name} is not in conf/plot; {hint}")
    return chosen


def write_tables(table: RunTable, out: Path) -> str:
    """Write `comparison.csv` (everything) and `comparison.md`; returns text for the terminal."""
    rows = compare(table)
    write_bytes(out / "comparison.csv", rows.to_csv(index=False).encode())
    write_bytes(out / "comparison.md", markdown(table, rows).encode())
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return terminal(table, rows, colour=colour)


def draw_all(
    table: RunTable, figures: Figures, out: Path | None, png_dir: Path | None
) -> tuple[list[Path], list[Picture]]:
    """Draw every figure; one that fails logs a warning and does not stop the others.

    Args:
        table: Runs.
        figures: Figures to draw.
        out: Folder for PNG and SVG files; None writes none.
        png_dir: Second folder for the PNG files; None writes none.

    Returns:
        The files written to `out`, and the figures as a report shows them.
    """
    written: list[Path] = []
    pictures: list[Picture] = []
    without_data: list[str] = []
    for name, make_draw in figures.items():
        try:
            fig = make_draw()(table)
            if out:
                written += _save(fig, name, out, png_dir)
            pictures.append(Picture(name, *bare(fig)))
        except NothingToDrawError as reason:
            without_data.append(name if len(figures) > 1 else f"{name} ({reason})")
        except Exception as error:  # a user's figure may raise anything; the others must be drawn
            message = " ".join(str(error).split())[:300]
            log.warning("%s: not drawn, %s: %s", name, type(error).__name__, message)
    if without_data:
        names = short_list(without_data, 3)
        log.info("not drawn, since no run has their data: %s", names)
    return written, pictures


def _save(fig: Any, name: str, out: Path, png_dir: Path | None) -> list[Path]:
    png, svg = save(fig, name, out)
    if png_dir:
        write_bytes(png_dir / f"{name}.png", png.read_bytes())
    return [png, svg]


def report(
    table: RunTable, figures: Figures, out: Path, png_dir: Path | None, asked: Sequence[Path]
) -> int:
    """Write tables, figures and `report.html`, and print the comparison.

    Args:
        table: Runs; the baseline may be one that was not asked for.
        figures: Figures to draw.
        out: Folder for everything.
        png_dir: Second folder for the PNG files; None writes none.
        asked: Run folders that were asked for.

    Returns:
        Exit status: 1 if all runs that were asked for have failed, else 0.

    Raises:
        UserError: No run that was asked for has results.
    """
    folders = {path.resolve() for path in asked}
    own = [run for run in table.runs if run.path in folders]
    if not own:
        raise UserError(
            "no run has results yet; wait for a first cell to finish, or look at the warnings above"
        )
    _replace_unprintable(sys.stdout)
    with clearing(out):
        print(write_tables(table, out), flush=True)
        written, pictures = draw_all(table, figures, out, png_dir)
        page = write_report(table, pictures, out / REPORT)
    print(f"\n{len(written)} figure files, comparison.csv and comparison.md in {out}")
    print(f"open {page} in a browser: tables, figures, features")
    failed = all(run.status == "failed" for run in own)
    if failed:
        which = "the only run" if len(own) == 1 else f"all {len(own)} runs"
        log.warning("%s failed: these are no finished results", which)
    return int(failed)


def _replace_unprintable(stream: TextIO) -> None:
    """Let a stream that cannot encode characters such as ± write `?` instead of failing."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def run_report(folder: Path, figures: Figures) -> Path:
    """Write `report.html` of one run into its folder; deltas are against `run_0` beside it.

    Args:
        folder: Run folder.
        figures: Figures to draw, which are written to `figures/` in the folder.

    Returns:
        Path of the report.

    Raises:
        UserError: The run has no results.
    """
    table = table_of_run(folder)
    _, pictures = draw_all(table, figures, folder / "figures", None)
    return write_report(table, pictures, folder / REPORT)
