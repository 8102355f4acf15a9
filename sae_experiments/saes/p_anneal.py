"""p-annealing: the penalty moves from L1 towards L0 during training.

Karvonen et al. 2024, arXiv 2408.00113.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import static
from sae_experiments.saes.base import Forward, Step
from sae_experiments.saes.standard import Standard

#: Shift of the values, because `z^p` has an infinite slope at 0.
SHIFT = 1e-6


class PAnneal(Standard):
    """Standard SAE with the penalty `lambda mean_B sum_j z_j^p`, where p falls from 1 to `p_end`.

    At each change of p, lambda is multiplied by `sum z^p_old / sum z^p_new`, so that the value of
    the penalty does not jump.

    Args:
        p_end: Last value of p, in (0, 1].
        n_steps: Number of equal steps in which p falls.
        start_frac: Share of the run before p falls.
        **kwargs: Further arguments of `Standard`.
    """

    static_steps = True

    p: Tensor
    scale: Tensor

    def __init__(self, *, p_end: float, n_steps: int, start_frac: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < p_end <= 1 or n_steps < 1 or not 0 <= start_frac < 1:
            raise UserError(
                f"sae.model: p_end={p_end} must lie in (0, 1], n_steps={n_steps} be at least 1, "
                f"start_frac={start_frac} lie in [0, 1)"
            )
        if p_end < 1:
            # Every step of p deactivates some latents, and the last steps leave too little time
            # for them to come back.
            self.controller.aim = 1.08
        self.p_end = p_end
        self.n_steps = n_steps
        self.start_frac = start_frac
        self.register_buffer("p", torch.ones((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The sum of `z^p`, weighted."""
        n_rows = len(fwd.batch.x)
        if static.on():
            p, scale = (t.to(self.b_enc.dtype) for t in (self.p, self.scale))
            total = power_sum(fwd.codes.values, p)
            return {"sparsity": self.coefficient(step) * scale * total / n_rows}
        total = power_sum(fwd.codes.values, self.p.item())
        return {"sparsity": self.coefficient(step) * self.scale.item() * total / n_rows}

    def after_step(self, fwd: Forward, step: Step) -> None:
        """Steer lambda, and lower p when its next step is due."""
        super().after_step(fwd, step)
        if static.on():
            self._lower_on_device(fwd.codes.values, step.progress)
            return
        stage = int(
            max(step.progress - self.start_frac, 0) / (1 - self.start_frac) * self.n_steps + 1e-9
        )
        p = 1 + (self.p_end - 1) * min(stage, self.n_steps) / self.n_steps
        if p != self.p.item():
            before = power_sum(fwd.codes.values, self.p.item())
            after = power_sum(fwd.codes.values, p)
            self.scale.mul_(before / after.clamp_min(1e-12))
            self.p.fill_(p)

    def _lower_on_device(self, values: Tensor, progress: Tensor) -> None:
        """Lower p if its next step is due, without a look at any number."""
        done = (progress - self.start_frac).clamp_min(0) / (1 - self.start_frac)
        stage = (done * self.n_steps + 1e-9).floor().clamp_max(self.n_steps)
        p = 1 + (self.p_end - 1) * stage / self.n_steps
        before, after = (power_sum(values, q.to(values.dtype)) for q in (self.p, p))
        factor = torch.where(p == self.p, 1.0, before / after.clamp_min(1e-12))
        self.scale.mul_(factor)
        self.p.copy_(p)


def power_sum(values: Tensor, p: float | Tensor) -> Tensor:
    """`sum (z + s)^p - s^p` over the non-negative entries of a code, with s = 1e-6.

    Exactly `sum z` for p = 1.
    """
    if not isinstance(p, Tensor) and p == 1:
        return values.sum()
    return ((values + SHIFT) ** p - SHIFT**p).sum()
