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
# SAEs and metrics of your own. With `from sae_experiments.saes.batch_topk import BatchTopK` above:
#   class Mine(BatchTopK):
#       def budget(self): return 0.9 * self.k    # override any method of saes/base.py
#   SAES = {"mine": Mine}                        # then --check=mine, and sae=mine in any run
SAES: dict[str, type] = {}
METRICS: dict[str, object] = {}

if __name__ == "__main__":
    from sae_experiments.cli.main import main

    sys.exit(
        main(
            sys.argv[1:],
            plan=PLAN,
            extra=OVERRIDES,
            conf=Path(__file__).resolve().parent / "conf",
            script=__file__,
        )
    )
