"""p-annealing: the penalty moves from L1 towards L0 during training (Karvonen et al. 2024, arXiv 2408.00113)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes.base import Forward, Step
from sae_experiments.saes.standard import Standard

SHIFT = 1e-6  # z^p has an infinite slope at 0


class PAnneal(Standard):
    """Standard SAE with the penalty ``lambda mean_B sum_j z_j^p``; p falls from 1 to ``p_end`` in ``n_steps`` equal steps from ``start`` on.

    At each change lambda is multiplied by ``sum z^p_old / sum z^p_new``, so that the penalty's value does not jump.
    """

    def __init__(self, *, p_end: float, n_steps: int, start: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < p_end <= 1 or n_steps < 1 or not 0 <= start < 1:
            raise UserError(
                f"sae.model: p_end={p_end} must lie in (0, 1], n_steps={n_steps} be at least 1, start={start} lie in [0, 1)"
            )
        if p_end < 1:
            self.controller.aim = 1.08  # every step of p takes some latents away, and the last ones leave no time to come back
        self.p_end, self.n_steps, self.start = p_end, n_steps, start
        self.register_buffer("p", torch.ones((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        total = power_sum(fwd.codes.values, self.p.item())
        return {"sparsity": self.coefficient(step) * self.scale.item() * total / len(fwd.batch.x)}

    def after_step(self, fwd: Forward, step: Step) -> None:
        super().after_step(fwd, step)
        stage = int(max(step.progress - self.start, 0) / (1 - self.start) * self.n_steps + 1e-9)
        p = 1 + (self.p_end - 1) * min(stage, self.n_steps) / self.n_steps
        if p != self.p.item():
            ratio = power_sum(fwd.codes.values, self.p.item()) / power_sum(
                fwd.codes.values, p
            ).clamp_min(1e-12)
            self.scale.mul_(ratio)
            self.p.fill_(p)


def power_sum(values: Tensor, p: float) -> Tensor:
    """``sum (z + s)^p - s^p`` with s = 1e-6, over the non-negative entries of a code; exactly ``sum z`` for p = 1."""
    return values.sum() if p == 1 else ((values + SHIFT) ** p - SHIFT**p).sum()
