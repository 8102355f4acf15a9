"""How much two levels repeat each other: mutual information of their latents' firing, and coherence of their atoms.

The information of the *joint* codes cannot be minimised: the upper code is a function of the lower one, so it is the upper code's whole
entropy. What can be is the redundancy of pairs: that no latent above fires just when one below does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sae_experiments.saes.hierarchical.level import matmul

RARE, EPSILON = 1e-4, 1e-6


def entropy(p: Tensor) -> Tensor:
    """``h(p) = -p ln p - (1 - p) ln(1 - p)`` in nats."""
    p = p.clamp(RARE, 1 - RARE)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def pairwise(p11: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """``I_ij = sum_ab P_ab ln(P_ab / (P_a. P_.b))`` in nats, (n1, n2), from P(i and j on) (n1, n2) and the rates p (n1,), q (n2,).

    The plug-in estimate: from N rows it is too high by about 1/(2N). It is blind to dependence that takes two latents below to show (XOR).
    """
    p, q = p.clamp(EPSILON, 1 - EPSILON)[:, None], q.clamp(EPSILON, 1 - EPSILON)[None]
    total = 0.0
    for joint, product_of in (
        (p11, p * q),
        (p - p11, p * (1 - q)),
        (q - p11, (1 - p) * q),
        (1 - p - q + p11, (1 - p) * (1 - q)),
    ):
        joint = joint.clamp(EPSILON, 1.0)
        total = total + joint * (joint / product_of).log()
    return total


def redundancy(p11: Tensor, p: Tensor, q: Tensor, rows: int) -> Tensor:
    """``U_ij = max(I_ij - 1/(2N), 0) / min(h(p_i), h(q_j))``: 0 for independent latents, 1 where one tells the other; Miller-Madow corrected."""
    return (pairwise(p11, p, q) - 1 / (2 * rows)).clamp_min(0) / torch.minimum(
        entropy(p)[:, None], entropy(q)[None]
    )


class Information(nn.Module):
    """The loss: mean over latents above of the (soft) largest ``U_ij`` over latents below, plus the mean of U.

    Firing is softened to ``s = sigmoid((a - theta) / T)``, T = ``width`` times the level's mean active value; each step looks at random
    latents among those that fire in it.

    Args:
        bottom, top: how many latents of each level a step looks at.
        width: of the sigmoid, in mean active values. sharpness: of the softmax that stands for the maximum.
    """

    def __init__(self, *, bottom: int, top: int, width: float, sharpness: float) -> None:
        super().__init__()
        self.bottom, self.top, self.width, self.sharpness = bottom, top, width, sharpness

    def soft(self, pre: Tensor, threshold: Tensor, mean_active: Tensor) -> Tensor:
        """Soft indicators of pre-activations (B, n)."""
        return torch.sigmoid((pre - threshold) / (self.width * mean_active.clamp_min(1e-12)))

    def forward(self, below: Tensor, above: Tensor) -> Tensor:
        """The loss of soft indicators (B, n1) and (B, n2); 0 where a side is empty."""
        if not below.shape[1] or not above.shape[1]:
            return below.new_zeros(())
        rows = len(below)
        u = redundancy(matmul(below.t(), above) / rows, below.mean(0), above.mean(0), rows)
        nearest = (torch.softmax(self.sharpness * u, 0) * u).sum(0)
        return nearest.mean() + u.mean()


class Coherence(nn.Module):
    """The loss that keeps atoms of two levels apart: only what exceeds the random level is penalised.

    ``(1/m2) sum_i [(max_j ReLU(C_ij))^2 + excess mean_j ReLU(|C_ij| - tau)^2]``, C the cosines of atoms above and below,
    ``tau = sqrt(2 ln m1 / d)`` the largest cosine to expect among m1 random directions. Orthogonality to all of an overcomplete level
    is impossible: for a tight frame the mean squared cosine is 1/d whatever the direction. The first term follows OrtSAE (arXiv 2509.22033).
    """

    def __init__(self, *, excess: float, chunk: int) -> None:
        super().__init__()
        self.excess, self.chunk = excess, chunk

    def forward(self, above: Tensor, below: Tensor) -> Tensor:
        """The loss of unit atoms (n, D) above and (m1, D) below."""
        cosines = matmul(above, below.t())
        tau = math.sqrt(2 * math.log(max(len(below), 2)) / below.shape[1])
        over = (cosines.abs() - tau).clamp_min(0).square().mean(1)
        return (cosines.amax(1).clamp_min(0).square() + self.excess * over).mean()
