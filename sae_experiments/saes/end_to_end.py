"""End-to-end SAE: trained on the effect of its reconstruction on the model's output.

Braun et al. 2024, arXiv 2405.12241.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import ops
from sae_experiments.saes.base import Forward, Step
from sae_experiments.saes.batch_topk import BatchTopK


class EndToEnd(BatchTopK):
    """BatchTopK code with the loss

        kl_coeff KL(p(x) || p(xhat)) + local_coeff ||x - xhat||^2 + later_coeff mean_l FVU_l

    KL is taken after the rest of the model has run on the reconstruction. `FVU_l` is the error that
    the reconstruction causes in the residual stream after each later block, relative to the
    variance of that stream. With KL alone (`local_coeff` 0), features explain the output and drift
    away from the activations. Batches are whole windows, not shuffled rows.

    Args:
        kl_coeff: Weight of KL.
        local_coeff: Weight of the squared error.
        later_coeff: Weight of the errors after later blocks.
        **kwargs: Further arguments of `BatchTopK`.
    """

    static_steps = True
    needs_model = True
    judged_by_fvu = False

    def __init__(
        self, *, kl_coeff: float, local_coeff: float, later_coeff: float, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        coeffs = {"kl_coeff": kl_coeff, "local_coeff": local_coeff, "later_coeff": later_coeff}
        for name, value in coeffs.items():
            if value < 0:
                raise UserError(f"sae.model.{name}={value} must not be negative")
        self.kl_coeff = kl_coeff
        self.local_coeff = local_coeff
        self.later_coeff = later_coeff

    def reconstruction(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """Squared error, KL and errors after later blocks, each with its weight."""
        if fwd.batch.downstream is None:
            raise UserError("an end_to_end SAE needs the language model: use it in study=language")
        mse = ops.squared_error(fwd.recon, fwd.batch.y)
        effect = fwd.batch.downstream.of(fwd.recon)
        return {
            "mse": self.local_coeff * mse,
            "kl": self.kl_coeff * effect["kl"],
            "later": self.later_coeff * effect["later"],
        }
