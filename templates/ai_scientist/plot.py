"""Draw the runs of this folder: PNG files here, tables and report.html in comparison/."""

import sys

# Folder of a run -> its name in figures and tables, such as {"run_0": "baseline"}. Only runs that
# are listed are drawn; empty: all.
labels: dict[str, str] = {}

if __name__ == "__main__":
    from sae_experiments.cli.plot import main

    sys.exit(main(sys.argv[1:], labels=labels, about=__doc__))
