"""Transcoders of every layer with a learned threshold for each latent.

Ameisen et al. 2025, "Circuit Tracing", train theirs this way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_experiments.saes.cross_layer import EveryLayer
from sae_experiments.saes.jumprelu import JumpReLU
from sae_experiments.sampling import spread_rows

#: Latents whose starting bias is found at once.
CHUNK = 256


class CrossLayerJumpReLU(EveryLayer, JumpReLU):
    """Transcoders of every layer whose code is `a H(a - theta)`, see `EveryLayer` and `JumpReLU`.

    One penalty weight for all layers is steered to `target_l0` in all of them together, and one
    number is added to all thresholds at the end, so that this L0 is exact.
    """

    static_steps = True

    @torch.no_grad()
    def begin(self, phase: str, x: Tensor, y: Tensor) -> None:
        """Initialise as `EveryLayer`, with biases so that `start_l0 * target_l0` latents fire."""
        EveryLayer.begin(self, phase, x, y)
        if self.start_l0 is None:
            return
        rows = spread_rows(x, 8192)
        share = min(self.start_l0 * self.controller.target / self.d_sae, 1.0)
        n_active = max(round(share * len(rows)), 1)  # rows on which each latent is active
        levels = []
        for latents in torch.arange(self.d_sae, device=x.device).split(CHUNK):
            pre = self.some_pre_acts(rows, latents).t()
            levels.append(pre.topk(n_active, dim=1).values[:, -1])
        self.b_enc.data.sub_(torch.cat(levels))

    def cutoffs(self) -> Tensor:
        """Pre-activations (F,) above which latents are active at inference."""
        return self.theta.detach() + self.threshold
