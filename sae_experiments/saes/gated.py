"""Gated SAE: a gate selects the active latents, a magnitude sets their values.

Rajamanoharan et al. 2024, arXiv 2404.16014.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.saes import ops
from sae_experiments.saes.base import SAE, Forward, Inference, Step
from sae_experiments.saes.standard import Standard
from sae_experiments.saes.types import DenseForm


class Gated(Standard):
    """Gate `pi` and magnitude `h` from a common product:

        u = W_enc (x - b_dec)
        pi = u + b_enc,  h = ReLU(exp(r_mag) u + b_mag),  z = 1[pi > 0] h

    The loss, with sg for stop-gradient, is

        ||x - xhat||^2 + lambda sum ReLU(pi) + ||x - sg(W_dec)^T ReLU(pi) - sg(b_dec)||^2

    The second and third term train the gate, to which the code itself passes no gradient, so that
    the penalty does not shrink the magnitudes.

    A latent whose magnitude is negative wherever its gate opens is dead, and its magnitude gets no
    gradient. Of dead latents it is therefore `b_mag` that rises by `lift`.

    Args:
        **kwargs: Arguments of `Standard`.
    """

    static_steps = True
    default_lr_factor = 1.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))

    def activation(self, entries: Tensor, col: Tensor | None) -> Tensor:
        """The magnitudes of active entries."""
        parameters = (self.b_enc, self.r_mag.exp(), self.b_mag)
        gate, scale, bias = (p if col is None else p[col] for p in parameters)
        return torch.relu(scale * (entries - gate) + bias)

    def dense_form(self) -> DenseForm | None:
        """Gate and magnitude."""
        if not self.encodes_as(Gated):
            return None
        return DenseForm("gated", scale=self.r_mag.exp(), shift=self.b_enc, bias=self.b_mag)

    def threshold_score(self, pre: Tensor) -> Tensor:
        """Pre-activations of the gate where the magnitude is positive, 0 elsewhere."""
        # A latent with an open gate and no magnitude is not active.
        return torch.where(self.activation(pre, None) > 0, pre, 0)

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The L1 penalty on the gate, and its squared error against a fixed decoder."""
        fused = fwd.counted is not None
        gate = fwd.active_pre if fused else torch.relu(fwd.active_pre)
        total = fwd.counted if fused else gate.sum()
        rebuilt = ops.decode(gate, fwd.codes.pattern, self.W_dec.detach()) + self.b_dec.detach()
        return {
            "sparsity": self.coefficient(step) * total / len(fwd.batch.x),
            "gate_mse": ops.squared_error(rebuilt, fwd.batch.y),
        }

    def lifted(self) -> Tensor:
        """Biases of the magnitudes."""
        return self.b_mag

    def inference(self) -> Inference:
        """A gated SAE in SAELens' terms."""
        return as_gated(self)


def as_gated(sae: SAE) -> Inference:
    """A gated SAE, with parameters `r_mag` and `b_mag`, in SAELens' terms."""
    tensors = sae.plain_tensors()
    gate = tensors.pop("b_enc")
    r_mag = sae.get_parameter("r_mag").detach()
    scale = r_mag.exp()
    folded = gate - sae.b_enc.detach()  # due to the centre, which shifts the magnitudes as well
    tensors["b_gate"] = gate - sae.threshold  # the threshold does not act on the magnitudes
    tensors["r_mag"] = r_mag
    tensors["b_mag"] = sae.get_parameter("b_mag").detach() + scale * folded
    return Inference("gated", tensors, {"apply_b_dec_to_input": sae.pre_bias})
