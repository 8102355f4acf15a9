"""Layer norm and RMSNorm with a separate denominator: if it is held, both are linear.

Shape letters: C width of the residual stream.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Types of weights and activations that are computed with in float32.
HALF = (torch.float16, torch.bfloat16)


class Norm(NamedTuple):
    """`(h - mean) * rstd(h) * gain + bias`; RMSNorm does not subtract the mean."""

    gain: Tensor
    """Factor of each dimension, (C,)."""
    bias: Tensor
    """(C,)."""
    centred: bool
    """True if it subtracts the mean over the width (LayerNorm), false for RMSNorm."""
    eps: float
    """Added to the variance, or to the mean square."""

    @staticmethod
    def of(module: nn.Module, added: float = 0.0) -> Norm:
        """Read a norm of transformers.

        Args:
            module: The norm.
            added: Number that it adds to its weight before it multiplies with it.
        """
        norm: Any = module
        gain = full(norm.weight)
        bias = getattr(norm, "bias", None)
        return Norm(
            gain=gain + added if added else gain,
            bias=torch.zeros_like(gain) if bias is None else full(bias),
            centred=isinstance(norm, nn.LayerNorm),
            eps=norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps,
        )

    def rstd(self, h: Tensor) -> Tensor:
        """Inverse deviation (..., 1) by which rows (..., C) are scaled."""
        return (self._shifted(h).square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def __call__(self, h: Tensor, rstd: Tensor | None = None) -> Tensor:
        """Normed rows (..., C); with a given inverse deviation (..., 1) linear in the rows."""
        rstd = self.rstd(h) if rstd is None else rstd
        return self._shifted(h) * rstd * self.gain + self.bias

    def linear(self, change: Tensor, rstd: Tensor) -> Tensor:
        """Change of normed rows by one of the rows (..., C), the inverse deviation held."""
        return self._shifted(change) * rstd * self.gain

    def pull_back(self, rstd: Tensor, g: Tensor) -> Tensor:
        """Gradient (..., C) at the input, the inverse deviation held, from that at the output."""
        return self._shifted(g * self.gain) * rstd

    def _shifted(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(-1, keepdim=True) if self.centred else rows


def full(weight: Tensor) -> Tensor:
    """A weight without its graph, half precision as float32."""
    weight = weight.detach()
    return weight.float() if weight.dtype in HALF else weight
