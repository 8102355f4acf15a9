"""Train a small language model, fit sparse autoencoders to it and evaluate them.

`python experiment.py --out_dir=run_1` runs, `python experiment.py --help` explains. Two lines below
are meant to be edited: PLAN names the file in conf/plan/ that says what run_0, run_1, ... are;
OVERRIDES are added to every run as if they had been typed, e.g. ["sae=topk", "sae.target_l0=64"].
"""

# Shell completion (docs/using.md) looks for the word @hydra.main in this file.
import sys
from pathlib import Path

PLAN = "variants"
OVERRIDES: list[str] = []

if __name__ == "__main__":
    from sae_experiments.cli.main import main

    sys.exit(
        main(
            sys.argv[1:], plan=PLAN, extra=OVERRIDES, conf=Path(__file__).resolve().parent / "conf"
        )
    )
