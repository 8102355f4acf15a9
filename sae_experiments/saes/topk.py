"""TopK: exactly k latents per row (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import selection
from sae_experiments.saes.base import SAE, Inference
from sae_experiments.saes.pattern import Pattern


class TopK(SAE):
    """`z = ReLU(TopK_k(W_enc (x - b_dec) + b_enc))`; loss `||x - xhat||^2 + aux_coeff AuxK`.

    Fewer than k latents are active where fewer than k pre-activations are positive.

    Args:
        k: Active latents per row.
        **kwargs: Further arguments of `SAE`.
    """

    always_sparse = True
    static_steps = True

    def __init__(self, *, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 1 <= k <= self.d_sae or k != int(k):
            raise UserError(f"sae.model.k={k} must be a whole number from 1 to d_sae={self.d_sae}")
        self.k = int(k)

    @property
    def fixed_l0(self) -> float | None:
        """The argument `k`."""
        return float(self.k)

    def support(self, pre: Tensor) -> Pattern:
        """The k largest pre-activations of every row."""
        return selection.top_k(pre.detach(), self.k)

    def activation(self, entries: Tensor, col: Tensor | None) -> Tensor:
        """ReLU."""
        return torch.relu(entries)

    def inference(self) -> Inference:
        """A TopK SAE in SAELens' terms."""
        config = {
            "k": self.k,
            "apply_b_dec_to_input": self.pre_bias,
            "rescale_acts_by_decoder_norm": False,
        }
        return Inference("topk", self.plain_tensors(), config)
