"""End-to-end SAE: trained on what its reconstruction does to the model's output (Braun et al. 2024, arXiv 2405.12241)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import ops
from sae_experiments.saes.base import Forward, Step
from sae_experiments.saes.batch_topk import BatchTopK


class EndToEnd(BatchTopK):
    """``kl_coeff KL(p(x) || p(xhat)) + local_coeff ||x - xhat||^2 + later_coeff mean_l FVU_l`` on a BatchTopK code.

    KL is taken after the rest of the model ran on the reconstruction; FVU_l is the error it causes in the residual stream after each later
    block, relative to that stream's variance. Only KL (local_coeff 0): features that explain the output, and drift off the activations.
    Batches are whole windows, not shuffled rows.
    """

    needs_model = True

    def __init__(
        self, *, kl_coeff: float, local_coeff: float, later_coeff: float, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (
            ("kl_coeff", kl_coeff),
            ("local_coeff", local_coeff),
            ("later_coeff", later_coeff),
        ):
            if value < 0:
                raise UserError(f"sae.model.{name}={value} must not be negative")
        self.kl_coeff, self.local_coeff, self.later_coeff = kl_coeff, local_coeff, later_coeff

    def reconstruction(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        parts = {"mse": self.local_coeff * ops.squared_error(fwd.recon, fwd.batch.y)}
        if fwd.batch.downstream is None:
            raise UserError("an end_to_end SAE needs the language model: use it in study=language")
        effect = fwd.batch.downstream(fwd.recon)
        return parts | {
            "kl": self.kl_coeff * effect["kl"],
            "later": self.later_coeff * effect["later"],
        }
