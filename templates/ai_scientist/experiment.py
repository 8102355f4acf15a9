"""Fit the sparse autoencoder (SAE) below to small language models, and measure it.

`python experiment.py --out_dir=run_1` fits `Mine` to the residual stream of the language models
below at a mean of 32 active latents, and writes the means over seeds to run_1/final_info.json.
Unless OVERRIDES names another model, they are a character GPT-2 on each of three corpora, trained
by the first run. As it stands `Mine` is BatchTopK: run_0 is the baseline, and what you change here
is the only difference between it and the next run.

`python experiment.py --check=mine` tells in seconds which laws of an SAE a change breaks.
"""

import sys
from typing import Any

from torch import Tensor

from sae_experiments.saes.batch_topk import BatchTopK
from sae_experiments.saes.types import Forward, Step


class Mine(BatchTopK):
    """The SAE under study. Shapes: B rows, D width of the model, F latents, n active entries.

    Further methods that may be overridden are those of `SAE` in sae_experiments/saes/base.py:
    encoder_input, support, threshold_score, linear_path, begin, after_step, finish. Arguments of
    the constructor are settings: OVERRIDES = ["sae.model.penalty=0.1", ...].
    """

    def __init__(self, *, penalty: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.penalty = penalty

    def budget(self) -> float:
        """Active latents per row in training; the final threshold always gives sae.target_l0."""
        return self.k

    def activation(self, entries: Tensor, col: Tensor | None) -> Tensor:
        """Values of the active latents, from their pre-activations (n,)."""
        return entries

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """Terms of the loss beside the squared error; `step.progress` runs from 0 to 1."""
        if not self.penalty:
            return {}
        return {"l1": self.penalty * fwd.codes.values.abs().sum() / len(fwd.recon)}


SAES = {"mine": Mine}
#: Metrics of your own: {"name": function of the evaluation context that returns a number}.
METRICS: dict[str, Any] = {}
PLAN = "plain"
#: Settings of every run, as if typed; `python -m sae_experiments --help` lists them.
OVERRIDES = [
    "sae=mine",
    "sae.target_l0=32",
    "preset=laptop",
    "runs_root=.",
    "time_limit_s=6600",  # below the two hours after which a run is killed
]

if __name__ == "__main__":
    from sae_experiments.cli.main import main

    sys.exit(main(sys.argv[1:], plan=PLAN, extra=OVERRIDES, script=__file__))
