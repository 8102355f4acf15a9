"""Matryoshka BatchTopK: every prefix of the latents reconstructs on its own.

Bussmann et al. 2025, arXiv 2503.17547.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import ops, static
from sae_experiments.saes.base import Codes, Forward, Step
from sae_experiments.saes.batch_topk import BatchTopK
from sae_experiments.saes.controller import ramp


class Matryoshka(BatchTopK):
    """BatchTopK code with prefixes of m_1 < ... < m_G = F latents that each reconstruct:

        xhat_g = b_dec + sum_{j <= m_g} z_j d_j

    The loss is `mean_g ||x - xhat_g||^2` plus AuxK of every level on the residual of that level, so
    that dead latents come back in their own group.

    Args:
        group_fracs: Share of the latents in each group, in order; they sum to 1.
        k_start: Active latents at the start, as a multiple of k.
        k_decay: Share of the run over which their number falls linearly to k.
        detach_inner: Every inner loss trains its own group alone; the outermost trains all.
        sort_by_frequency: Groups follow a moving average of the firing frequency, not the index.
            Latents are put in that order at the end.
        **kwargs: Further arguments of `BatchTopK`.
    """

    static_steps = True

    group: Tensor
    frequency: Tensor
    k_now: Tensor

    def __init__(
        self,
        *,
        group_fracs: Sequence[float],
        k_start: float,
        k_decay: float,
        detach_inner: bool,
        sort_by_frequency: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not group_fracs or min(group_fracs) <= 0 or abs(sum(group_fracs) - 1) > 1e-6:
            raise UserError(
                f"sae.model.group_fracs={list(group_fracs)} must be positive and sum to 1"
            )
        ends = [round(sum(group_fracs[: i + 1]) * self.d_sae) for i in range(len(group_fracs))]
        if ends[0] < 1 or any(b <= a for a, b in pairwise(ends)):
            raise UserError(
                f"sae.model.group_fracs={list(group_fracs)} leave a group without latents "
                f"at d_sae={self.d_sae}"
            )
        if k_start < 1 or not 0 <= k_decay <= 1:
            raise UserError(
                f"sae.model: k_start={k_start} must be at least 1 and k_decay={k_decay} lie in 0..1"
            )
        if k_start * self.k > self.d_sae:
            raise UserError(
                f"sae.model.k_start={k_start} asks for {k_start * self.k:g} active latents, "
                f"more than d_sae={self.d_sae}"
            )
        self.ends = ends
        self.k_start = k_start
        self.k_decay = k_decay
        self.detach_inner = detach_inner
        self.sort_by_frequency = sort_by_frequency
        groups = torch.zeros(self.d_sae, dtype=torch.int64)
        for end in ends[:-1]:
            groups[end:] += 1
        self.register_buffer("group", groups)  # of every latent
        self.register_buffer("frequency", torch.zeros(self.d_sae))
        self.register_buffer("k_now", torch.tensor(float(k_start * self.k), dtype=torch.float64))

    def budget(self) -> float:
        """Active latents per row at the current point of training."""
        return self.k_now.item()

    def most(self) -> float:
        """The largest `budget()`, at the start of training."""
        return self.k_start * self.k

    def budget_on_device(self, n_rows: int) -> Tensor | None:
        return None if self.k_start == 1 else (self.k_now * n_rows).round()

    def nested_recons(self, codes: Codes) -> Tensor:
        """Reconstructions (B, G, O) of all prefixes, with each group decoded once.

        Every row of the code is split into G rows, one for each group.
        """
        values, pattern = codes
        n_groups = len(self.ends)
        n_rows = pattern.n_rows * n_groups
        col = pattern.col
        row = pattern.row * n_groups + self.group[col]
        if self.sort_by_frequency:  # the columns of a group no longer lie side by side
            order = torch.argsort(row, stable=True)
            values, row, col = values[order], row[order], col[order]
        crow = torch.searchsorted(row, torch.arange(n_rows + 1, device=row.device), out_int32=True)
        parts = ops.decode(values, pattern.like(crow, col), self.W_dec)
        parts = parts.view(pattern.n_rows, n_groups, -1)
        sums = ops.prefix_sums(parts)
        if self.detach_inner:
            inner = (sums - parts).detach()[:, :-1] + parts[:, :-1]
            sums = torch.cat([inner, sums[:, -1:]], 1)
        return sums + self.b_dec

    def reconstruction(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The squared error of every prefix; that of the whole code is named `mse`."""
        n_groups = len(self.ends)
        *inner, outer = ops.level_errors(fwd.nested, fwd.batch.y) / n_groups
        return {f"mse_{g}": error for g, error in enumerate(inner)} | {"mse": outer}

    def aux_loss(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """AuxK of the dead latents of every group on the residual of its prefix."""
        if not self.aux_coeff or not step.any_dead:
            return {}
        terms = []
        for g in range(len(self.ends)):
            dead = step.dead & (self.group == g)
            if static.on() or bool(dead.any()):
                terms.append(self.aux_k_loss(fwd.batch.x, fwd.batch.y - fwd.nested[:, g], dead))
        return {"aux_k": self.aux_coeff * ops.total(terms)} if terms else {}

    def after_step(self, fwd: Forward, step: Step) -> None:
        """Lower the number of active latents to k, and regroup the latents."""
        super().after_step(fwd, step)
        if self.k_start > 1:
            left = 1 - ramp(step.progress, self.k_decay)
            self.k_now.fill_(self.k * (1 + (self.k_start - 1) * left))
        if self.sort_by_frequency:
            self.frequency.lerp_(fwd.codes.fires / len(fwd.batch.x), 0.01)
            self._regroup()

    def _regroup(self) -> None:
        """Assign latents to groups in the order of their firing frequency."""
        device = self.group.device
        order = self.frequency.argsort(descending=True, stable=True)
        rank = torch.empty_like(self.group)
        rank[order] = torch.arange(self.d_sae, device=device)
        passed = [(rank >= end).long() for end in self.ends[:-1]]
        self.group.copy_(ops.total(passed) if passed else torch.zeros_like(rank))

    def finish(self, phase: str, x: Tensor) -> None:
        """Put latents in the order of their groups, and calibrate the threshold."""
        if self.sort_by_frequency:
            order = torch.argsort(self.group, stable=True)
            for t in (self.W_enc, self.b_enc, self.W_dec):
                t.data.copy_(t.data[order])
            self.frequency.copy_(self.frequency[order])
            self.group.copy_(self.group[order])
        super().finish(phase, x)
