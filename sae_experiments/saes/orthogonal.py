"""OrtSAE: BatchTopK whose decoder rows are pushed apart.

Korznikov et al. 2025, arXiv 2509.22033.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import ops
from sae_experiments.saes.base import Forward, Step
from sae_experiments.saes.batch_topk import BatchTopK


class Orthogonal(BatchTopK):
    """BatchTopK plus the penalty `gamma (1/F) sum_j max_{i != j} ReLU(cos(d_i, d_j))^2`.

    The maximum is taken within random chunks of latents, drawn anew at each step, so that the cost
    is linear in `d_sae`. Negative cosines are not penalised: antipodal pairs are legitimate.

    Args:
        gamma: Weight of the penalty.
        chunk: Latents of a chunk.
        **kwargs: Further arguments of `BatchTopK`.
    """

    static_steps = True

    def __init__(self, *, gamma: float, chunk: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if gamma < 0 or chunk < 2:
            raise UserError(
                f"sae.model: gamma={gamma} must not be negative and chunk={chunk} be at least 2"
            )
        self.gamma = gamma
        self.chunk = chunk

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The orthogonality penalty."""
        order = torch.randperm(self.d_sae, generator=step.generator, device=self.W_dec.device)
        rows = ops.unit_rows(self.W_dec)
        chunks = order.split(self.chunk)
        total = ops.total(closest(rows[chunk]).square().sum() for chunk in chunks)
        return {"orthogonality": self.gamma * total / self.d_sae}


def closest(rows: Tensor) -> Tensor:
    """Largest cosine (n,) of each unit row (n, d) with another one, at least 0."""
    cosines = rows @ rows.t()
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return cosines.masked_fill(itself, -1).amax(1).clamp_min(0)
