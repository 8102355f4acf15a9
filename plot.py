"""Compare runs: figures (PNG and SVG), comparison.csv, comparison.md, and the table on the terminal.

python plot.py                            every run in runs/, against run_0
python plot.py runs/run_1 runs/run_4      these runs; a folder of runs (a sweep) may be named as well
"""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

from hydra.utils import instantiate
from omegaconf import OmegaConf

from sae_experiments.errors import UserError
from sae_experiments.report.figures import choose, default_out, found_runs, report
from sae_experiments.results.table import load_table

LABELS: dict[str, str] = {}  # folder -> name in figures and tables, such as {"run_0": "baseline"}; else the label in the manifest
HOME = Path(__file__).resolve().parent


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, not the whole usage
        raise UserError(f"plot.py: {message}; 'python plot.py --help' lists the options")


def options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders, or folders of runs (default: runs/)")
    parser.add_argument("--out", type=Path, help="where figures and tables go (default: comparison/ beside the runs)")
    png_dir = Path() if Path("experiment.py").is_file() else None
    parser.add_argument("--png_dir", type=Path, default=png_dir, help="PNGs go here too (default: the current folder if it holds experiment.py)")
    parser.add_argument("--baseline", help="name or path of the run to compare with (default: run_0; at full scale the published figures)")
    parser.add_argument("--figures", help="names from conf/plot, with commas (default: all)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Draw and write everything. Exit status 2 for a mistake or where no run has results, 1 where all runs failed."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("sae_experiments").setLevel(logging.INFO)
    try:
        chosen = options(argv)
        files = {path.stem: path for path in sorted((HOME / "conf" / "plot").glob("*.yaml"))}
        figures = {name: partial(lambda path: instantiate(OmegaConf.load(path)), files[name]) for name in choose(chosen.figures, list(files))}
        runs = found_runs(chosen.runs, Path.cwd(), HOME)
        table = load_table(runs, baseline=chosen.baseline, labels=LABELS)
        return report(table, figures, chosen.out or default_out(runs), chosen.png_dir, runs)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
