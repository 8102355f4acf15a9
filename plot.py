"""Compare runs: figures (PNG and SVG), comparison.csv, comparison.md, and a table on the terminal.

python plot.py                            every run in runs/, against run_0
python plot.py runs/run_1 runs/run_4      these runs; a folder of runs (a sweep) may be named too
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from sae_experiments.errors import UserError
from sae_experiments.report import figures
from sae_experiments.results.table import load_table

#: Names in figures and tables by run folder, such as {"run_0": "baseline"}; a run without one is
#: called by the label in its manifest.
LABELS: dict[str, str] = {}
HOME = Path(__file__).resolve().parent


def load_figure(path: Path) -> Callable[..., Any]:
    """Read a figure's YAML file and return its `draw(table)`."""
    return instantiate(OmegaConf.load(path))


def main(argv: list[str]) -> int:
    """Draw and write everything.

    Returns:
        Exit status: 2 for a mistake or if no run has results, 1 if all runs failed, else 0.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("sae_experiments").setLevel(logging.INFO)
    try:
        options = figures.parse_options(argv, __doc__)
        files = {path.stem: path for path in sorted((HOME / "conf" / "plot").glob("*.yaml"))}
        names = figures.choose_figures(options.figures, list(files))
        chosen = {name: partial(load_figure, files[name]) for name in names}
        runs = figures.runs_to_compare(options.runs, Path.cwd(), HOME)
        table = load_table(runs, baseline=options.baseline, labels=LABELS)
        out = options.out or figures.default_out(runs)
        status = figures.report(table, chosen, out, options.png_dir, runs)
        if options.paper:
            pdfs = figures.draw_for_paper(table, chosen, out / "paper")
            print(f"{len(pdfs)} PDF files and their captions in {out / 'paper'}")
        return status
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
