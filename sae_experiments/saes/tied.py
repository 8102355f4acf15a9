"""Tied weights: the encoder is the decoder's transpose (Cunningham et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch

from sae_experiments.saes.base import Units
from sae_experiments.saes.standard import Standard


class Tied(Standard):
    """``z = ReLU(W (x - b_dec) + b_enc)``, ``xhat = W^T z + b_dec`` with unit rows; loss as the standard SAE's.

    Half the parameters; the best linear encoder under interference is not the transpose, so reconstruction is worse at equal L0.
    """

    same_units = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.W_enc = self.W_dec

    @torch.no_grad()
    def rescale(self, inputs: Units, outputs: Units) -> None:
        # One matrix cannot take a factor and its inverse: the codes shrink instead (ReLU is homogeneous).
        scale = inputs.scale[0].double()
        for t in (self.b_enc, self.threshold):
            t.copy_(t.double() / scale)
        self._move_origin(inputs, outputs)
