"""Redundancy of two levels: mutual information of their latents, and coherence of their directions.

The mutual information of the *joint* codes cannot be minimised: the upper code is a function of the
lower one, so it is the whole entropy of the upper code. The redundancy of pairs can be: no latent
above should fire exactly when one below does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sae_experiments.saes import ops
from sae_experiments.saes.hierarchical.level import matmul

#: Rates are clamped to [RARE, 1 - RARE] before their entropy is taken.
RARE = 1e-4
#: Probabilities are clamped to [EPSILON, 1 - EPSILON] before their logarithm is taken.
EPSILON = 1e-6


def entropy(p: Tensor) -> Tensor:
    """`h(p) = -p ln p - (1 - p) ln(1 - p)` in nats."""
    p = p.clamp(RARE, 1 - RARE)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def pairwise(p11: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Mutual information `I_ij = sum_ab P_ab ln(P_ab / (P_a. P_.b))` of pairs, in nats.

    The plug-in estimate: from N rows it is too high by about 1/(2N). It does not see a dependence
    that only two latents below together show (XOR).

    Args:
        p11: Probability that both fire, (n1, n2).
        p: Rates of the first latents, (n1,).
        q: Rates of the second latents, (n2,).

    Returns:
        Mutual information (n1, n2).
    """
    p = p.clamp(EPSILON, 1 - EPSILON)[:, None]
    q = q.clamp(EPSILON, 1 - EPSILON)[None]
    outcomes = (
        (p11, p * q),
        (p - p11, p * (1 - q)),
        (q - p11, (1 - p) * q),
        (1 - p - q + p11, (1 - p) * (1 - q)),
    )
    terms = []
    for joint, independent in outcomes:
        joint = joint.clamp(EPSILON, 1.0)
        terms.append(joint * (joint / independent).log())
    return ops.total(terms)


def redundancy(p11: Tensor, p: Tensor, q: Tensor, rows: int) -> Tensor:
    """`U_ij = max(I_ij - 1/(2N), 0) / min(h(p_i), h(q_j))`, with the Miller-Madow correction.

    0 for independent latents, 1 where one determines the other.

    Args:
        p11: Probability that both fire, (n1, n2).
        p: Rates of the first latents, (n1,).
        q: Rates of the second latents, (n2,).
        rows: Number N of rows that the probabilities come from.

    Returns:
        Redundancy (n1, n2).
    """
    information = (pairwise(p11, p, q) - 1 / (2 * rows)).clamp_min(0)
    return information / torch.minimum(entropy(p)[:, None], entropy(q)[None])


class Information(nn.Module):
    """Loss that lowers the redundancy U of pairs of latents of two levels.

    It is the mean of U plus the mean over top latents of the soft maximum of U over bottom latents.

    Firing is softened to `s = sigmoid((a - theta) / T)`, with T = `width` times the level's mean
    active value. Each step uses random latents among those that fire in it.

    Args:
        bottom: Latents of the bottom per step.
        top: Latents of the top per step.
        width: Width of the sigmoid, in mean active values.
        sharpness: Inverse temperature of the softmax that stands for the maximum.
    """

    def __init__(self, *, bottom: int, top: int, width: float, sharpness: float) -> None:
        super().__init__()
        self.bottom = bottom
        self.top = top
        self.width = width
        self.sharpness = sharpness

    def soft(self, pre: Tensor, threshold: Tensor, mean_active: Tensor) -> Tensor:
        """Soft firing (B, n) of pre-activations (B, n), from threshold and mean active value."""
        return torch.sigmoid((pre - threshold) / (self.width * mean_active.clamp_min(1e-12)))

    def forward(
        self, below: Tensor, above: Tensor, counted: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The loss; 0 if either side has no latents.

        Args:
            below: Soft firing (B, n1).
            above: Soft firing (B, n2).
            counted: Latents of either side that count, (n1,) and (n2,) boolean. None: all.
        """
        if not below.shape[1] or not above.shape[1]:
            return below.new_zeros(())
        rows = len(below)
        u = redundancy(matmul(below.t(), above) / rows, below.mean(0), above.mean(0), rows)
        if counted is not None:
            return self._of_some(u, *counted)
        nearest = (torch.softmax(self.sharpness * u, 0) * u).sum(0)
        return nearest.mean() + u.mean()

    def _of_some(self, u: Tensor, below: Tensor, above: Tensor) -> Tensor:
        """The loss from the redundancy U (n1, n2) of pairs, of which some count."""
        u = torch.where(below[:, None] & above, u, 0.0)
        # Without any latent below, softmax would give NaN, and the product with 0 as well.
        score = torch.where(below[:, None] | ~below.any(), self.sharpness * u, -torch.inf)
        nearest = (torch.softmax(score, 0) * u).sum(0)
        n_below, n_above = below.sum().clamp_min(1), above.sum().clamp_min(1)
        return nearest.sum() / n_above + u.sum() / (n_below * n_above)


class Coherence(nn.Module):
    """Loss that separates directions of two levels as far as random directions are:

        (1/m2) sum_i [(max_j ReLU(C_ij))^2 + excess mean_j ReLU(|C_ij| - tau)^2]

    C holds the cosines of directions above and below, and `tau = sqrt(2 ln m1 / d)` is the largest
    cosine to expect among m1 random directions. Orthogonality to all of an overcomplete level is
    impossible: for a tight frame the mean squared cosine is 1/d whatever the direction. The first
    term follows OrtSAE (arXiv 2509.22033).

    Args:
        excess: Weight of the second term.
        chunk: Directions of the top per step.
    """

    def __init__(self, *, excess: float, chunk: int) -> None:
        super().__init__()
        self.excess = excess
        self.chunk = chunk

    def forward(self, above: Tensor, below: Tensor) -> Tensor:
        """The loss of unit directions (n, D) above and (m1, D) below."""
        cosines = matmul(above, below.t())
        tau = math.sqrt(2 * math.log(max(len(below), 2)) / below.shape[1])
        over = (cosines.abs() - tau).clamp_min(0).square().mean(1)
        return (cosines.amax(1).clamp_min(0).square() + self.excess * over).mean()
