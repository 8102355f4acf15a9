"""Compare runs: figures (PNG and SVG), comparison.csv, comparison.md, and a table on the terminal.

python plot.py                            every run in runs/, against run_0
python plot.py runs/run_1 runs/run_4      these runs; a folder of runs (a sweep) may be named too
"""

from __future__ import annotations

import sys
from pathlib import Path

from sae_experiments.cli import plot

#: Names in figures and tables by run folder, such as {"run_0": "baseline"}: only these runs are
#: compared. Empty: all runs, called by the label in their manifest.
labels: dict[str, str] = {}


def main(argv: list[str]) -> int:
    """Draw and write everything; returns the exit status."""
    home = Path(__file__).resolve().parent
    return plot.main(argv, labels=labels, home=home, about=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
