"""Gated SAE: one half decides whether a latent is active, the other how much (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.saes import ops
from sae_experiments.saes.base import SAE, Forward, Inference, Step
from sae_experiments.saes.standard import Standard


class Gated(Standard):
    """``u = W_enc (x - b_dec)``; gate ``pi = u + b_enc``; magnitude ``h = ReLU(exp(r_mag) u + b_mag)``; ``z = 1[pi > 0] h``.

    Loss ``||x - xhat||^2 + lambda sum ReLU(pi) + ||x - sg(W_dec)^T ReLU(pi) - sg(b_dec)||^2``: the penalty and the third term train the gate,
    which the code itself passes no gradient to, so magnitudes do not shrink.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))

    def shape(self, entries: Tensor, col: Tensor | None) -> Tensor:
        gate, scale, bias = (
            p if col is None else p[col] for p in (self.b_enc, self.r_mag.exp(), self.b_mag)
        )
        return torch.relu(scale * (entries - gate) + bias)

    def strength(self, pre: Tensor) -> Tensor:
        # An open gate with no magnitude behind it is not an active latent.
        return torch.where(self.shape(pre, None) > 0, pre, 0)

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        gate = torch.relu(fwd.at)
        rebuilt = ops.decode(gate, fwd.codes.pattern, self.W_dec.detach()) + self.b_dec.detach()
        return {
            "sparsity": self.coefficient(step) * gate.sum() / len(fwd.batch.x),
            "gate_mse": ops.squared_error(rebuilt, fwd.batch.y),
        }

    def inference(self) -> Inference:
        return as_gated(self)


def as_gated(sae: SAE) -> Inference:
    """A gated SAE (with ``r_mag`` and ``b_mag``) in SAELens' terms."""
    tensors = sae.plain_tensors()
    gate, scale = tensors.pop("b_enc"), sae.r_mag.detach().exp()
    folded = gate - sae.b_enc.detach()  # the centre, which the magnitudes read as well
    tensors["b_gate"] = gate - sae.threshold  # magnitudes do not see the threshold
    tensors |= {"r_mag": sae.r_mag.detach(), "b_mag": sae.b_mag.detach() + scale * folded}
    return Inference("gated", tensors, {"apply_b_dec_to_input": sae.pre_bias})
