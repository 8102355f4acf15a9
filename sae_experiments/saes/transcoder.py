"""Transcoders: reconstruct the output of a layer from its input.

Dunefsky et al. 2024; with a skip path: Paulo et al. 2025.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.saes.base import Inference, NotExportable, Units, by_rows
from sae_experiments.saes.batch_topk import BatchTopK


class Transcoder(BatchTopK):
    """`z = BatchTopK(W_enc x + b_enc)`, `yhat = W_dec^T z + b_dec (+ W_skip x)`.

    The loss is `||y - yhat||^2` plus AuxK. `b_dec` starts at the median of the outputs, `W_skip` at
    0, and the pre-activations start centred.

    Args:
        skip: Add a linear path past the code.
        **kwargs: Further arguments of `BatchTopK`.
    """

    static_steps = True

    def __init__(self, *, skip: bool, **kwargs: Any) -> None:
        super().__init__(pre_bias=False, **kwargs)
        self.W_skip = nn.Parameter(torch.zeros(self.d_out, self.d_in)) if skip else None

    @by_rows("d_in")
    def linear_path(self, x: Tensor) -> Tensor | None:
        """The skip path of rows (..., D)."""
        return None if self.W_skip is None else (x - self.centre) @ self.W_skip.t()

    @torch.no_grad()
    def rescale(self, inputs: Units, outputs: Units) -> None:
        """Turn an SAE of scaled rows into one of the data's own rows, skip path included."""
        super().rescale(inputs, outputs)
        if self.W_skip is not None:
            weight = self.W_skip.double() * inputs.scale.double()
            self.W_skip.copy_(weight / outputs.scale.double()[:, None])

    def inference(self) -> Inference:
        """Not exportable: SAELens' transcoders have no calibrated threshold."""
        raise NotExportable("SAELens' transcoder formats have no threshold of the calibrated kind")
