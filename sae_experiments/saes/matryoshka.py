"""Matryoshka BatchTopK: every prefix of the latents reconstructs on its own (Bussmann et al. 2025, arXiv 2503.17547)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import ops
from sae_experiments.saes.base import Codes, Forward, Step
from sae_experiments.saes.batch_topk import BatchTopK
from sae_experiments.saes.selection import Pattern


class Matryoshka(BatchTopK):
    """One BatchTopK code; with prefix widths m_1 < ... < m_G = F, ``xhat_g = b_dec + sum_{j <= m_g} z_j d_j``.

    Loss ``mean_g ||x - xhat_g||^2`` plus AuxK of every level on that level's residual (dead latents come back in their own group).

    Args:
        fractions: share of the latents in each group, in order; they sum to 1.
        k_start: the number of active latents falls linearly from ``k_start * k`` to k over the first ``k_decay`` of the run.
        detach_inner: every inner loss trains only its own group (the outermost trains all).
        sort_by_frequency: groups follow the running firing frequency instead of the index; latents are put in that order at the end.
    """

    def __init__(
        self,
        *,
        fractions: Sequence[float],
        k_start: float,
        k_decay: float,
        detach_inner: bool,
        sort_by_frequency: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise UserError(f"sae.model.fractions={list(fractions)} must be positive and sum to 1")
        ends = [round(sum(fractions[: i + 1]) * self.d_sae) for i in range(len(fractions))]
        if ends[0] < 1 or any(b <= a for a, b in pairwise(ends)):
            raise UserError(
                f"sae.model.fractions={list(fractions)} leave a group without latents at d_sae={self.d_sae}"
            )
        if k_start < 1 or not 0 <= k_decay <= 1:
            raise UserError(
                f"sae.model: k_start={k_start} must be at least 1 and k_decay={k_decay} lie in 0..1"
            )
        if k_start * self.k > self.d_sae:
            raise UserError(
                f"sae.model.k_start={k_start} asks for {k_start * self.k:g} active latents, more than d_sae={self.d_sae}"
            )
        self.ends, self.k_start, self.k_decay = ends, k_start, k_decay
        self.detach_inner, self.sort_by_frequency = detach_inner, sort_by_frequency
        groups = torch.zeros(self.d_sae, dtype=torch.int64)
        for end in ends[:-1]:
            groups[end:] += 1
        self.register_buffer("group", groups)  # of every latent
        self.register_buffer("frequency", torch.zeros(self.d_sae))
        self.register_buffer("k_now", torch.tensor(float(k_start * self.k), dtype=torch.float64))

    def budget(self) -> float:
        return self.k_now.item()

    def nested(self, codes: Codes) -> Tensor:
        """Reconstructions of all prefixes (B, G, O), each group decoded once: row b of the code becomes G rows, one a group."""
        values, pattern = codes
        n = len(self.ends)
        row, col = pattern.row * n + self.group[pattern.col], pattern.col
        if self.sort_by_frequency:  # the columns of a group no longer stand side by side
            order = torch.argsort(row, stable=True)
            values, row, col = values[order], row[order], col[order]
        crow = torch.zeros(pattern.n_rows * n + 1, dtype=torch.int32, device=col.device)
        crow[1:] = torch.bincount(row, minlength=pattern.n_rows * n).cumsum(0)
        parts = ops.decode(values, Pattern(crow, col, pattern.n_cols), self.W_dec).view(
            pattern.n_rows, n, -1
        )
        sums = ops.prefix_sums(parts)
        if self.detach_inner:
            inner = (sums - parts).detach()[:, :-1] + parts[:, :-1]
            sums = torch.cat([inner, sums[:, -1:]], 1)
        return sums + self.b_dec

    def reconstruction(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        n = len(self.ends)
        errors = ops.level_errors(fwd.levels, fwd.batch.y) / n
        return {f"mse_{g}" if g < n - 1 else "mse": e for g, e in enumerate(errors)}

    def revive(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        if not self.aux_coeff or not bool(step.dead.any()):
            return {}
        terms = []
        for g in range(len(self.ends)):
            dead = (step.dead & (self.group == g)).nonzero().squeeze(1)
            if dead.numel():
                terms.append(self.explain(fwd.batch.x, fwd.batch.y - fwd.levels[:, g], dead))
        return {"aux_k": self.aux_coeff * sum(terms)} if terms else {}

    def after_step(self, fwd: Forward, step: Step) -> None:
        super().after_step(fwd, step)
        if self.k_start > 1:
            left = 1 - min(step.progress / self.k_decay, 1.0) if self.k_decay else 0.0
            self.k_now.fill_(self.k * (1 + (self.k_start - 1) * left))
        if self.sort_by_frequency:
            self.frequency.lerp_(fwd.codes.fires / len(fwd.batch.x), 0.01)
            rank = torch.empty_like(self.group)
            rank[self.frequency.argsort(descending=True, stable=True)] = torch.arange(
                self.d_sae, device=rank.device
            )
            self.group.copy_(
                (rank[:, None] >= torch.tensor(self.ends[:-1], device=rank.device)).sum(1)
            )

    def finish(self, phase: str, x: Tensor) -> None:
        if self.sort_by_frequency:
            order = torch.argsort(self.group, stable=True)
            for t in (self.W_enc, self.b_enc, self.W_dec):
                t.data.copy_(t.data[order])
            self.frequency.copy_(self.frequency[order])
            self.group.copy_(self.group[order])
        super().finish(phase, x)
