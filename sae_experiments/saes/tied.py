"""Tied weights: the encoder is the decoder's transpose (Cunningham et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_experiments.saes.standard import Standard


class Tied(Standard):
    """``z = ReLU(W (x - b_dec) + b_enc)``, ``xhat = W^T z + b_dec`` with unit rows; loss as the standard SAE's.

    Half the parameters; the best linear encoder under interference is not the transpose, so reconstruction is worse at equal L0.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.W_enc = self.W_dec

    def rescale(self, s_in: Tensor, s_out: Tensor) -> None:
        # One matrix cannot take a factor and its inverse: the codes shrink instead (ReLU is homogeneous).
        scale = s_in[0]
        with torch.no_grad():
            for t in (self.b_enc, self.b_dec, self.threshold):
                t.div_(scale)
