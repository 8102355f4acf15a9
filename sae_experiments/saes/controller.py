"""Controller that steers a sparsity coefficient to a requested L0."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError


class L0Controller(nn.Module):
    """A coefficient `lambda` that brings the mean number of active latents to `target`.

    PI control in log space:

        e = ln(EMA(L0) / (aim * target))
        ln lambda += clip(Ki e + Kp (e - e_prev), -0.1, 0.1)

    with `Ki = gain / horizon`, so that the speed follows the length of the run, and `Kp = damping`.
    A penalty scaled by `1 - L0/target` instead vanishes at the target and never reaches it; the
    integral part has no such steady-state error.

    Args:
        target: Requested active latents per row.
        coeff: Fixed coefficient, which switches steering off. None: steer.
        start: Coefficient at which steering starts.
        horizon: Number of training steps.
        aim: L0 steered at, as a multiple of `target`. Above 1, the final calibration of the
            threshold has latents to trim, so that the L0 of inference is exact.
        gain: Integral gain over the whole run.
        damping: Gain of the change of the error.
    """

    log_coeff: Tensor
    average: Tensor
    error: Tensor

    def __init__(
        self,
        *,
        target: float,
        coeff: float | None,
        start: float,
        horizon: int = 1000,
        aim: float = 1.02,
        gain: float = 30.0,
        damping: float = 2.0,
    ) -> None:
        super().__init__()
        if coeff is not None and coeff < 0:
            raise UserError(f"sae: coeff={coeff} must not be negative")
        if not target > 0:
            raise UserError(f"sae: target_l0={target} must be positive")
        self.target = target
        self.fixed = coeff is not None
        self.horizon = horizon
        self.aim = aim
        self.gain = gain
        self.damping = damping
        log_coeff = math.log(start if coeff is None else max(coeff, 1e-30))
        self.register_buffer("log_coeff", torch.tensor(log_coeff, dtype=torch.float64))
        self.register_buffer("average", torch.tensor(math.nan, dtype=torch.float64))
        self.register_buffer("error", torch.tensor(math.nan, dtype=torch.float64))

    @property
    def coeff(self) -> float:
        """The current coefficient."""
        return math.exp(self.log_coeff.item())

    def update(self, l0: float) -> None:
        """Adapt the coefficient to the L0 of the last training step."""
        average = l0 if math.isnan(self.average.item()) else 0.9 * self.average.item() + 0.1 * l0
        self.average.fill_(average)
        error = math.log(max(average, 1e-3) / (self.aim * self.target))
        before = error if math.isnan(self.error.item()) else self.error.item()
        self.error.fill_(error)
        if not self.fixed:
            change = self.gain / self.horizon * error + self.damping * (error - before)
            self.log_coeff.add_(min(max(change, -0.1), 0.1)).clamp_(math.log(1e-8), math.log(1e6))


def ramp(progress: float, until: float) -> float:
    """Linear warm-up factor: 0 at the start of a phase, 1 once its share `until` is done."""
    return 1.0 if until <= 0 else min(progress / until, 1.0)
