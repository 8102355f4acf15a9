"""Stores of activations of a made text."""

from __future__ import annotations

from pathlib import Path

import torch

from sae_experiments.console import Console
from sae_experiments.studies.base import Context


def context(folder: Path) -> Context:
    return Context(
        folder=folder,
        cache=folder / "cache",
        device=torch.device("cpu"),
        console=Console(verbosity="quiet"),
    )
