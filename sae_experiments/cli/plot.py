"""The command line of `plot.py`: figures, tables and a report of the runs in a folder."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from sae_experiments.errors import UserError
from sae_experiments.files import conf_folder
from sae_experiments.report import figures
from sae_experiments.results.table import load_table


def load_figure(path: Path) -> Callable[..., Any]:
    """Read a figure's YAML file and return its `draw(table)`."""
    return instantiate(OmegaConf.load(path))


def main(
    argv: Sequence[str],
    *,
    labels: Mapping[str, str],
    home: Path | None = None,
    about: str | None = None,
) -> int:
    """Draw and write everything.

    Args:
        argv: Arguments after the name of the program.
        labels: Names in figures and tables by run folder. Unless runs are named in `argv`, only
            those in it are compared; empty: all.
        home: Folder with `conf` that is searched for runs if the current one has none.
        about: First part of the help.

    Returns:
        Exit status: 2 for a mistake or if no run has results, 1 if all runs failed, else 0.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("sae_experiments").setLevel(logging.INFO)
    conf = home / "conf" if home else conf_folder()
    try:
        options = figures.parse_options(argv, about)
        files = {path.stem: path for path in sorted((conf / "plot").glob("*.yaml"))}
        names = figures.choose_figures(options.figures, list(files))
        chosen = {name: partial(load_figure, files[name]) for name in names}
        runs = figures.runs_to_compare(options.runs, Path.cwd(), home or Path.cwd())
        if labels and not options.runs:
            runs = [run for run in runs if run.name in labels] or runs
        table = load_table(runs, baseline=options.baseline, labels=labels)
        out = options.out or figures.default_out(runs)
        status = figures.report(table, chosen, out, options.png_dir, runs)
        if options.paper:
            pdfs = figures.draw_for_paper(table, chosen, out / "paper")
            print(f"{len(pdfs)} PDF files and their captions in {out / 'paper'}")
        return status
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
