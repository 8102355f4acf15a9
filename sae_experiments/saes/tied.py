"""Tied weights: the encoder is the decoder's transpose (Cunningham et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch

from sae_experiments.saes.base import Units
from sae_experiments.saes.standard import Standard


class Tied(Standard):
    """`z = ReLU(W (x - b_dec) + b_enc)`, `xhat = W^T z + b_dec` with unit rows; loss of `Standard`.

    It has half the parameters. Under interference the best linear encoder is not the transpose of
    the decoder, so the reconstruction is worse at equal L0.

    Args:
        **kwargs: Arguments of `Standard`.
    """

    same_units = True
    static_steps = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.W_enc = self.W_dec

    @torch.no_grad()
    def rescale(self, inputs: Units, outputs: Units) -> None:
        """Turn an SAE of scaled rows into one of the data's own rows, by scaling its codes."""
        # One matrix cannot take up a factor and its inverse. As ReLU is homogeneous, the codes can.
        scale = inputs.scale[0].double()
        for t in (self.b_enc, self.threshold):
            t.copy_(t.double() / scale)
        self._move_origin(inputs, outputs)
