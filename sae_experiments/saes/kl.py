"""KL sparsity: every latent's mean activation is drawn to a target rate (Ng, CS294A lecture notes)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes.base import Forward, Inference, NotExportable, Step
from sae_experiments.saes.standard import Standard


class KL(Standard):
    """``||x - xhat||^2 + lambda sum_j KL(rho || rho_hat_j)``, ``KL = rho ln(rho/rho_hat) + (1 - rho) ln((1 - rho)/(1 - rho_hat))``.

    ``form`` is the unit. ``sigmoid`` and ``gelu``: rho_hat_j is the batch mean of the activation itself, as in the original; every latent is
    active everywhere until the final threshold. ``relu``: rho_hat_j is the mean of ``1 - exp(-z_j / tau)``, a soft count of how often j fires,
    with tau the mean active value; codes have exact zeros and lambda is steered to ``target_l0``. rho is ``target_l0 / (4 d_sae)`` if not given:
    a latent at the target rate must still be pulled down, or no lambda reaches the target. ``start_l0`` acts on relu units only.
    The term equalises how often latents are active: it works against dead and dense latents.

    ``per_entry``: the squared error is a mean over the entries of a row instead of their sum, as in the original. ``unit_decoder`` false leaves
    the lengths of the decoder's rows free.
    """

    def __init__(
        self, *, form: str, rho: float | None, per_entry: bool, unit_decoder: bool, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.per_entry, self.unit_decoder = per_entry, unit_decoder
        if form not in ("sigmoid", "gelu", "relu"):
            raise UserError(f"sae.model.form={form!r} is not one of sigmoid, gelu, relu")
        self.form, self.rho = (
            form,
            rho if rho is not None else self.controller.target / (4 * self.d_sae),
        )
        if not 0 < self.rho < 1:
            raise UserError(f"sae.model.rho={self.rho} must lie between 0 and 1")
        if form != "relu":
            self.start_l0 = None
        if form != "relu" and not self.controller.fixed:
            raise UserError(
                f"sae.model.form={form} has no exact zeros to steer by: give sae.model.coeff a number"
            )

    def support(self, pre: Tensor) -> Tensor:
        if self.form == "relu" or not self.training:
            return super().support(pre)
        return torch.ones_like(pre, dtype=torch.bool)

    def strength(self, pre: Tensor) -> Tensor:
        return self.shape(pre, None)

    def shape(self, entries: Tensor, col: Tensor | None) -> Tensor:
        return {"sigmoid": torch.sigmoid, "gelu": F.gelu, "relu": torch.relu}[self.form](entries)

    def rates(self, fwd: Forward) -> Tensor:
        """rho_hat (F,), clamped away from 0 and 1."""
        values, pattern = fwd.codes
        if self.form == "relu":
            tau = values.detach().sum() / (values > 0).sum().clamp_min(1)
            values = -torch.expm1(-values / tau.clamp_min(1e-12))
        if pattern is None:
            mean = values.mean(0)
        else:
            mean = values.new_zeros(self.d_sae).index_add(0, pattern.col, values) / pattern.n_rows
        return mean.clamp(1e-6, 1 - 1e-6)

    def reconstruction(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        parts = super().reconstruction(fwd, step)
        return {k: v / self.d_out for k, v in parts.items()} if self.per_entry else parts

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        rate, rho = self.rates(fwd), self.rho
        kl = rho * torch.log(rho / rate) + (1 - rho) * torch.log((1 - rho) / (1 - rate))
        return {"sparsity": self.coefficient(step) * kl.sum()}

    def finish(self, phase: str, x: Tensor) -> None:
        if self.controller.target >= self.d_sae:
            self.threshold.fill_(
                0.0 if self.form == "relu" else -torch.inf
            )  # everything that was active in training stays active
        else:
            self.calibrate_threshold(x, self.controller.target)

    def inference(self) -> Inference:
        if self.form == "relu":
            return super().inference()
        raise NotExportable(
            f"a KL SAE with {self.form} units has no counterpart in SAELens' format"
        )
