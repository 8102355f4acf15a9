"""KL sparsity: the mean activation of every latent is drawn to a target rate (Ng, CS294A notes)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes.base import Forward, Inference, NotExportable, Step
from sae_experiments.saes.pattern import Pattern
from sae_experiments.saes.standard import Standard


class KL(Standard):
    """SAE with a penalty on the mean activation `rho_hat_j` of every latent:

        ||x - xhat||^2 + lambda sum_j KL(rho || rho_hat_j)
        KL(rho || r) = rho ln(rho/r) + (1 - rho) ln((1 - rho)/(1 - r))

    With `sigmoid` and `gelu` units, `rho_hat_j` is the batch mean of the activation itself, as in
    the original; every latent is active on every row until the final threshold. With `relu` units
    it is the mean of `1 - exp(-z_j / tau)`, where tau is the mean active value: a soft count of
    how often latent j is active. Codes then have exact zeros, and lambda is steered to `target_l0`.

    The penalty equalises how often latents are active, against dead and dense latents alike.

    Args:
        form: Units, `relu`, `sigmoid` or `gelu`. Other units than `relu` need a fixed `coeff`, and
            ignore `start_l0`.
        rho: Target rate. None: `target_l0 / (4 d_sae)`. It is that low because a latent at the
            target rate must still be pulled down, or no lambda reaches the target.
        per_entry: Take the squared error as a mean over the entries of a row instead of their sum,
            as in the original.
        unit_decoder: Keep decoder rows at length 1; false leaves their lengths free.
        **kwargs: Further arguments of `Standard`.
    """

    static_steps = True
    default_lr_factor = 1.0

    def __init__(
        self, *, form: str, rho: float | None, per_entry: bool, unit_decoder: bool, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.per_entry = per_entry
        self.unit_decoder = unit_decoder
        if form not in ("sigmoid", "gelu", "relu"):
            raise UserError(f"sae.model.form={form!r} is not one of sigmoid, gelu, relu")
        self.form = form
        self.rho = self.controller.target / (4 * self.d_sae) if rho is None else rho
        if not 0 < self.rho < 1:
            raise UserError(f"sae.model.rho={self.rho} must lie between 0 and 1")
        if form != "relu":
            self.start_l0 = None
        if form != "relu" and not self.controller.fixed:
            raise UserError(
                f"sae.model.form={form} has no exact zeros to steer by: "
                "give sae.model.coeff a number"
            )

    def support(self, pre: Tensor) -> Pattern | Tensor:
        """Positive entries for `relu` units; for others every entry, until the final threshold."""
        if self.form == "relu" or not self.training:
            return super().support(pre)
        return torch.ones_like(pre, dtype=torch.bool)

    def threshold_score(self, pre: Tensor) -> Tensor:
        """The activations."""
        return self.activation(pre, None)

    def activation(self, entries: Tensor, col: Tensor | None) -> Tensor:
        """Sigmoid, GELU or ReLU."""
        functions = {"sigmoid": torch.sigmoid, "gelu": F.gelu, "relu": torch.relu}
        return functions[self.form](entries)

    def rates(self, fwd: Forward) -> Tensor:
        """Mean activations `rho_hat` (F,), clamped away from 0 and 1."""
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
        """The squared error, per row or per entry."""
        parts = super().reconstruction(fwd, step)
        if not self.per_entry:
            return parts
        return {name: value / self.d_out for name, value in parts.items()}

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The KL divergence, summed over latents."""
        rate = self.rates(fwd)
        rho = self.rho
        kl = rho * torch.log(rho / rate) + (1 - rho) * torch.log((1 - rho) / (1 - rate))
        return {"sparsity": self.coefficient(step) * kl.sum()}

    def finish(self, phase: str, x: Tensor) -> None:
        """Calibrate the threshold; if the target is all latents, keep the support of training."""
        if self.controller.target >= self.d_sae:
            self.threshold.fill_(0.0 if self.form == "relu" else -torch.inf)
        else:
            self.calibrate_threshold(x, self.controller.target)

    def inference(self) -> Inference:
        """As of `Standard` for `relu` units; others are not exportable."""
        if self.form == "relu":
            return super().inference()
        raise NotExportable(
            f"a KL SAE with {self.form} units has no counterpart in SAELens' format"
        )
