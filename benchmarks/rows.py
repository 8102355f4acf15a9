"""Rows like a language model's activations, the same in every Python."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rows(d: int, n: int, seed: int) -> Tensor:
    """Rows (n, d) that look like activations.

    A mean, about 16 of 4 d directions with uneven frequencies each, and a little noise.
    """
    g = torch.Generator().manual_seed(seed)
    directions = F.normalize(
        torch.randn(4 * d, d, generator=torch.Generator().manual_seed(0)), dim=1
    )
    rate = 1 / torch.arange(8, 4 * d + 8)
    rate = (16 * rate / rate.sum()).clamp_max(0.5)
    parts = []
    for size in [1024] * (n // 1024) + [n % 1024] * bool(n % 1024):
        on = torch.rand(size, 4 * d, generator=g) < rate
        parts.append(
            (on * torch.rand(size, 4 * d, generator=g).add_(0.5)) @ directions
            + 0.02 * torch.randn(size, d, generator=g)
        )
    return torch.cat(parts) + 3 * directions[0]


def pool_of(d: int, batch: int) -> list[Tensor]:
    """Eight batches that are shown in turn."""
    return [rows(d, batch, 1 + i) for i in range(8)]
