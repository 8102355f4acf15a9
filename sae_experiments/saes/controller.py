"""Ask for an L0, get that L0: the controller that steers a sparsity coefficient."""

from __future__ import annotations

import math

import torch
from torch import nn

from sae_experiments.errors import UserError


class L0Controller(nn.Module):
    """A coefficient ``lambda`` that makes the mean number of active latents meet ``target``: PI control in log space.

    ``e = ln(EMA(L0) / (aim * target))``; ``ln lambda += clip(Ki e + Kp (e - e_prev), +-0.1)``, with ``Ki = gain / horizon`` so that the
    speed follows the length of the run. A penalty that is scaled by ``1 - L0/target`` instead vanishes at the target and never gets
    there; the integral part has no such steady-state error. ``aim`` above 1 leaves the final threshold calibration something to trim, so
    that the L0 of inference is exact.

    With ``coeff`` given, the coefficient stays there and ``target`` is not steered at.
    """

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
        self.target, self.fixed, self.horizon, self.aim, self.gain, self.damping = (
            target,
            coeff is not None,
            horizon,
            aim,
            gain,
            damping,
        )
        self.register_buffer(
            "log_coeff",
            torch.tensor(
                math.log(start if coeff is None else max(coeff, 1e-30)), dtype=torch.float64
            ),
        )
        self.register_buffer("average", torch.tensor(math.nan, dtype=torch.float64))
        self.register_buffer("error", torch.tensor(math.nan, dtype=torch.float64))

    @property
    def coeff(self) -> float:
        """The coefficient now."""
        return math.exp(self.log_coeff.item())

    def update(self, l0: float) -> None:
        """Tell the controller the L0 of the step that was just made."""
        average = l0 if math.isnan(self.average.item()) else 0.9 * self.average.item() + 0.1 * l0
        self.average.fill_(average)
        error = math.log(max(average, 1e-3) / (self.aim * self.target))
        before = error if math.isnan(self.error.item()) else self.error.item()
        self.error.fill_(error)
        if not self.fixed:
            change = self.gain / self.horizon * error + self.damping * (error - before)
            self.log_coeff.add_(min(max(change, -0.1), 0.1)).clamp_(math.log(1e-8), math.log(1e6))


def ramp(progress: float, until: float) -> float:
    """Linear warm-up of a penalty: 0 at the start, 1 once ``until`` of the phase is done."""
    return 1.0 if until <= 0 else min(progress / until, 1.0)
