"""Levels of an SAE, and the reconstruction of each level alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae_experiments.saes.base import SAE
from sae_experiments.saes.hierarchical.sae import Hierarchical

#: Reason why a metric that compares levels is null.
ONE_LEVEL = "the SAE has one level"


def levels_of(sae: SAE) -> dict[str, np.ndarray]:
    """Latents of each level.

    Returns:
        Latent indices by level name: `bottom` and `top` of a hierarchical SAE (`bottom` alone if it
        has no top), or of a nested SAE with two groups, whose inner group is the top. Any other SAE
        has one level, `all`.
    """
    if sae.level_of_latent is None:
        return {"all": np.arange(sae.d_sae)}
    level = sae.level_of_latent.cpu().numpy()
    if isinstance(sae, Hierarchical):
        names = ("bottom", "top")[: len(sae.widths)]
        return {name: np.flatnonzero(level == i) for i, name in enumerate(names)}
    if level.max() == 1:
        return {"bottom": np.flatnonzero(level == 1), "top": np.flatnonzero(level != 1)}
    return {"all": np.arange(sae.d_sae)}


def only(sae: SAE, acts: Tensor, level: str) -> Tensor:
    """Reconstruct dense codes by one level alone.

    Args:
        sae: The SAE.
        acts: Dense codes, (B, F).
        level: Name of the level, as in `levels_of`.

    Returns:
        Reconstruction (B, O): the level's own path through a hierarchical SAE, otherwise the
        decoder with the latents of other levels at zero.
    """
    if isinstance(sae, Hierarchical):
        return sae.decode(acts, 1.0 if level == "bottom" else 0.0)
    kept = torch.from_numpy(levels_of(sae)[level]).to(acts.device)
    part = torch.zeros_like(acts)
    part[:, kept] = acts[:, kept]
    return sae.decode(part)
