# One file for agents that execute their code as a string: it stands at top level, reads `seed` if
# it exists, and leaves working/experiment_data.npy and a picture for each data set. The data sets
# are three made worlds of known features; nothing is downloaded.
import os
import time

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sae_experiments.saes.batch_topk import BatchTopK
from sae_experiments.trial import WORLDS, trial

SEED = int(globals().get("seed", 0))
STEPS = int(os.environ.get("TRIAL_STEPS", "3000"))
BUDGET_S = 2700.0  # three quarters of the hour after which a run is killed
BEGAN = time.monotonic()


class Mine(BatchTopK):
    """The SAE under study: BatchTopK until it is changed; `k` active latents per row."""

    def budget(self):
        return self.k

    def penalties(self, fwd, step):
        return {}


os.makedirs("working", exist_ok=True)
DATA = os.path.join("working", "experiment_data.npy")
if os.path.exists(DATA):
    os.remove(DATA)
experiment_data = {}
summary = []
for number, world in enumerate(WORLDS):
    left = BUDGET_S - (time.monotonic() - BEGAN)
    result = trial(Mine, world, seed=SEED, steps=STEPS, seconds=left / (len(WORLDS) - number))
    losses = [(step, value) for step, name, value in result.history if name.endswith("loss")]
    for step, value in losses[::5]:
        print(f"{world} step {step}: validation loss = {value:.6f} (rows are never repeated)")
    scores = {name: value for name, value in result.metrics.items() if value is not None}
    experiment_data[world] = {
        "metrics": {"train": [], "val": [scores["truth_f1"]]},
        "losses": {"train": [v for _, v in losses], "val": [v for _, v in losses]},
        "predictions": [],
        "ground_truth": [],
        "scores": scores,
        "seconds": result.seconds,
        "cut": result.cut,
    }
    np.save(DATA, experiment_data)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    axes[0].plot(*zip(*losses, strict=True))
    axes[0].set(xlabel="step", ylabel="loss", title=f"{world}: training")
    shown = ["truth_f1", "truth_mcc", "sae_fvu", "sae_dead_frac"]
    axes[1].bar(shown, [scores.get(name, 0.0) for name in shown])
    axes[1].set(ylim=(0, 1), title=f"{world}: scores at L0 {scores['sae_l0']:.2f}")
    axes[1].tick_params(axis="x", rotation=20)
    figure.tight_layout()
    figure.savefig(os.path.join("working", f"{world}_scores.png"), dpi=110)
    plt.close(figure)
    summary.append((world, scores))

print("---")
for world, scores in summary:
    for name in ("truth_f1", "truth_mcc", "sae_fvu", "sae_l0", "sae_dead_frac"):
        print(f"{world} {name}: {scores.get(name, 0.0):.6f}")
print(f"mean truth_f1: {np.mean([scores['truth_f1'] for _, scores in summary]):.6f}")
