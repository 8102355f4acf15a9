"""Transcoders: rebuild what a layer writes from what it reads (Dunefsky et al. 2024; with a skip path: Paulo et al. 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.saes.base import Inference, NotExportable, Units, by_rows
from sae_experiments.saes.batch_topk import BatchTopK


class Transcoder(BatchTopK):
    """``z = BatchTopK(W_enc x + b_enc)``, ``yhat = W_dec^T z + b_dec (+ W_skip x)``; loss ``||y - yhat||^2`` plus AuxK.

    b_dec starts at the outputs' median and pre-activations start centred. W_skip starts at 0.
    """

    def __init__(self, *, skip: bool, **kwargs: Any) -> None:
        super().__init__(pre_bias=False, **kwargs)
        self.W_skip = nn.Parameter(torch.zeros(self.d_out, self.d_in)) if skip else None

    @by_rows("d_in")
    def linear_path(self, x: Tensor) -> Tensor | None:
        return None if self.W_skip is None else (x - self.centre) @ self.W_skip.t()

    @torch.no_grad()
    def rescale(self, inputs: Units, outputs: Units) -> None:
        super().rescale(inputs, outputs)
        if self.W_skip is not None:
            weight = self.W_skip.double() * inputs.scale.double()
            self.W_skip.copy_(weight / outputs.scale.double()[:, None])

    def inference(self) -> Inference:
        raise NotExportable("SAELens' transcoder formats have no threshold of the calibrated kind")
