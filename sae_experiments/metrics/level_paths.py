"""The levels of any SAE that has some, and what each of them rebuilds on its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae_experiments.saes.base import SAE
from sae_experiments.saes.hierarchical import Hierarchical


def levels_of(sae: SAE) -> dict[str, np.ndarray]:
    """Latents of each level by name: ``bottom`` and ``top`` of a hierarchical SAE; of a nested one with two groups the inner one is the top.

    Any other SAE is one level, ``all``.
    """
    if isinstance(sae, Hierarchical):
        return {name: np.flatnonzero(sae.group.cpu().numpy() == i) for i, name in enumerate(("bottom", "top")[: len(sae.widths)])}
    group = getattr(sae, "group", None)
    if isinstance(group, Tensor) and group.shape == (sae.d_sae,) and int(group.max()) == 1:
        return {"bottom": np.flatnonzero(group.cpu().numpy() == 1), "top": np.flatnonzero(group.cpu().numpy() == 0)}
    return {"all": np.arange(sae.d_sae)}


def only(sae: SAE, acts: Tensor, level: str) -> Tensor:
    """The reconstruction (B, O) of dense codes by one level alone: its own path, or the plain decoder with the other latents at zero."""
    if isinstance(sae, Hierarchical):
        return sae.decode(acts, 1.0 if level == "bottom" else 0.0)
    kept = torch.from_numpy(levels_of(sae)[level]).to(acts.device)
    part = torch.zeros_like(acts)
    part[:, kept] = acts[:, kept]
    return sae.decode(part)
