"""Evaluate an SAE that lies in a SAELens directory (cfg.json and sae_weights.safetensors).

python examples/evaluate_saelens.py DIRECTORY ACTIVATIONS.npy
"""

import sys
from pathlib import Path

import numpy as np
import torch

from sae_experiments import evaluate, load_sae


def main(directory: str, activations: str) -> None:
    """Print reconstruction and sparsity of the SAE on rows (N, d_in) of a .npy file."""
    sae = load_sae(Path(directory))
    rows = torch.from_numpy(np.load(activations, allow_pickle=False))
    for name, value in evaluate(sae, rows).items():
        print(f"{name:<24} {'null' if value is None else f'{value:.4f}'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
