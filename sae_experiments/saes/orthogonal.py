"""OrtSAE: BatchTopK whose decoder rows are pushed apart (Korznikov et al. 2025, arXiv 2509.22033)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import ops
from sae_experiments.saes.base import Forward, Step
from sae_experiments.saes.batch_topk import BatchTopK


class Orthogonal(BatchTopK):
    """BatchTopK plus ``gamma (1/F) sum_j max_{i != j} ReLU(cos(d_i, d_j))^2``.

    The maximum is taken inside random chunks of ``chunk`` latents, drawn anew each step, so the cost is linear in d_sae. Negative cosines
    are left alone: antipodal pairs are legitimate.
    """

    def __init__(self, *, gamma: float, chunk: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if gamma < 0 or chunk < 2:
            raise UserError(
                f"sae.model: gamma={gamma} must not be negative and chunk={chunk} be at least 2"
            )
        self.gamma, self.chunk = gamma, chunk

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        order = torch.randperm(self.d_sae, generator=step.generator, device=self.W_dec.device)
        rows = ops.unit_rows(self.W_dec)
        total = sum(closest(rows[part]).square().sum() for part in order.split(self.chunk))
        return {"orthogonality": self.gamma * total / self.d_sae}


def closest(rows: Tensor) -> Tensor:
    """For each unit row the largest cosine with another one, at least 0; (n,)."""
    cosines = rows @ rows.t()
    return (
        cosines.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=rows.device), -1)
        .amax(1)
        .clamp_min(0)
    )
