"""Controller that steers a sparsity coefficient to a requested L0."""

from __future__ import annotations

import math
from typing import Any

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

    @property
    def coeff_on_device(self) -> Tensor:
        """The current coefficient as a scalar tensor, which nobody waits for."""
        return self.log_coeff.exp()

    def update_on_device(self, l0: Tensor, warm: Tensor | bool) -> None:
        """`update` without a look at any number.

        Args:
            l0: L0 of the last training step, a scalar in float64.
            warm: A boolean, or a scalar tensor; nothing changes if it is false.
        """

        def set_(buffer: Tensor, value: Tensor) -> None:
            buffer.copy_(torch.where(warm, value, buffer) if isinstance(warm, Tensor) else value)

        if warm is False:
            return
        average = torch.where(self.average.isnan(), l0, 0.9 * self.average + 0.1 * l0)
        error = (average.clamp_min(1e-3) / (self.aim * self.target)).log()
        before = torch.where(self.error.isnan(), error, self.error)
        set_(self.average, average)
        set_(self.error, error)
        if not self.fixed:
            change = self.gain / self.horizon * error + self.damping * (error - before)
            moved = self.log_coeff + change.clamp(-0.1, 0.1)
            set_(self.log_coeff, moved.clamp(math.log(1e-8), math.log(1e6)))

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


def ramp(progress: Any, until: float) -> Any:
    """Linear warm-up factor: 0 at the start of a phase, 1 once its share `until` is done.

    It is a number or a scalar tensor, as `progress` is.
    """
    if until <= 0:
        return 1.0
    share = progress / until
    return share.clamp(max=1.0) if isinstance(share, Tensor) else min(share, 1.0)
