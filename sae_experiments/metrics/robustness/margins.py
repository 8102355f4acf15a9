"""Certified radii of active latents in closed form, and cross-talk between latents."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_experiments.metrics.robustness.noise import NoiseSource
from sae_experiments.saes.base import SAE
from sae_experiments.saes.jumprelu import JumpReLU
from sae_experiments.saes.ops import unit_rows
from sae_experiments.saes.topk import TopK

NO_CLOSED_FORM = "no closed form for this encoder"
#: Entries of the matrices (pairs, F) that TopK radii are computed in at a time.
MATRIX_ENTRIES = 1 << 22


def has_margins(sae: SAE) -> bool:
    """True if latents are selected by threshold or top k from a linear function of the input."""
    kind = type(sae)
    if kind.encoder_input is not SAE.encoder_input or kind.pre_acts is not SAE.pre_acts:
        return False
    if issubclass(kind, TopK):
        return kind.threshold_score is SAE.threshold_score and kind.activation is TopK.activation
    return kind.threshold_score in (SAE.threshold_score, JumpReLU.threshold_score)


@torch.no_grad()
def radii(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """l2 distance within which each active latent stays on.

    Threshold encoders: `(a_j - theta_j) / ||e_j||`, exact. TopK: the smaller of `a_j / ||e_j||`, at
    which the value reaches 0, and the minimum of `(a_j - a_i) / ||e_j - e_i||` over the latents i
    outside the support, at which i overtakes j. The support changes at that distance, but the
    latent that leaves it may be another than j.

    Args:
        sae: An SAE that has margins.
        x: Rows, (B, D).

    Returns:
        Row, latent and distance of every active latent, (n,) each.
    """
    sae.eval()
    pre = sae.pre_acts(x)
    row, col = (sae.activate(pre).dense() != 0).nonzero().unbind(1)
    norms = sae.W_enc.norm(dim=1).clamp_min(1e-12)
    if isinstance(sae, TopK):
        distance = torch.minimum(pre[row, col] / norms[col], _overtaken(sae, pre, row, col))
    else:
        distance = (sae.threshold_score(pre)[row, col] - sae.threshold) / norms[col]
    return row, col, distance


def _overtaken(sae: TopK, pre: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Distance at which a latent outside the support overtakes an active one.

    Args:
        sae: The SAE.
        pre: Pre-activations, (B, F).
        row: Rows of the active latents, (n,).
        col: The active latents, (n,).

    Returns:
        Distances, (n,).
    """
    squares = sae.W_enc.square().sum(1)
    on = torch.zeros_like(pre, dtype=torch.bool)
    on[row, col] = True
    distance = torch.empty_like(pre[row, col])
    for part in torch.arange(len(row), device=pre.device).split(
        max(1, MATRIX_ENTRIES // sae.d_sae)
    ):
        r, c = row[part], col[part]
        squared = squares[c, None] + squares - 2 * sae.W_enc[c] @ sae.W_enc.t()
        apart = squared.clamp_min(1e-24).sqrt()
        swap = (pre[r, c][:, None] - pre[r]) / apart
        distance[part] = swap.masked_fill(on[r], torch.inf).amin(1)
    return distance


@torch.no_grad()
def confirmed(sae: SAE, x: Tensor, pairs: int, seed: int) -> float:
    """Share of random pairs (row, latent) whose radius is confirmed by encoding perturbed rows.

    At 1.01 times the radius in the worst direction, the latent must be off (TopK: the support must
    have changed). At 0.99 times the radius, in the worst and in a random direction, it must be on.

    Args:
        sae: An SAE that has margins.
        x: Rows, (B, D).
        pairs: Number of pairs tried.
        seed: Seed of the pairs and directions.

    Returns:
        The share, which is 1 unless the formula is wrong; NaN without radii to try.
    """
    row, col, radius = radii(sae, x)
    g = torch.Generator().manual_seed(seed)
    pick = torch.randperm(len(row), generator=g)[:pairs].to(row.device)
    row, col, radius = row[pick], col[pick], radius[pick]
    clean = x[row]
    worst = unit_rows(_worst_direction(sae, clean, col))
    anywhere = unit_rows(torch.randn(clean.shape, generator=g).to(clean))
    before = sae.encode(clean) != 0

    def support(direction: Tensor, factor: float) -> Tensor:
        return sae.encode(clean + direction * (factor * radius)[:, None]) != 0

    def is_on(direction: Tensor, factor: float) -> Tensor:
        return support(direction, factor).gather(1, col[:, None])[:, 0]

    if isinstance(sae, TopK):
        changed = (support(worst, 1.01) != before).any(1)
    else:
        changed = ~is_on(worst, 1.01)
    holds = changed & is_on(worst, 0.99) & is_on(anywhere, 0.99)
    # A radius near 0 is below the precision of float32.
    resolved = radius > 1e-3 * radius.median()
    return float(holds[resolved].float().mean()) if bool(resolved.any()) else float("nan")


def _worst_direction(sae: SAE, x: Tensor, col: Tensor) -> Tensor:
    """Direction (n, D) in which rows `x` (n, D) lose their active latent `col` (n,) soonest."""
    down = -sae.W_enc[col]
    if not isinstance(sae, TopK):
        return down
    pre = sae.pre_acts(x)
    active = sae.activate(pre).dense() != 0
    apart = torch.cdist(sae.W_enc[col], sae.W_enc).clamp_min(1e-12)
    own = pre.gather(1, col[:, None])
    rival = ((own - pre) / apart).masked_fill(active, torch.inf)
    rival_first = rival.amin(1) < own[:, 0] / sae.W_enc[col].norm(dim=1)
    towards_rival = sae.W_enc[rival.argmin(1)] - sae.W_enc[col]
    return torch.where(rival_first[:, None], towards_rival, down)


@torch.no_grad()
def crosstalk(noises: NoiseSource, x: Tensor, eps: float) -> tuple[float | None, float | None]:
    """Response of a code to a step `+-eps R d_i` along a random active latent i of each row.

    Each change dz_l is multiplied by `||d_l||`, so that the scale of a code does not matter.

    Args:
        noises: The SAE and the spread of its rows.
        x: Rows, (B, D).
        eps: Length of the step in units of R.

    Returns:
        Over the rows on which i stays on: the median of `sum_{l != i} dz_l^2 / dz_i^2`, and the
        mean slope `dz_i / (+-eps R)` (ideally 1). None if there are none.
    """
    sae = noises.sae
    length = eps * float(noises.cloud.radius)
    g = torch.Generator(x.device).manual_seed(noises.seed)
    latents, sign = noises.aimed(x, g)
    active = latents >= 0
    x, latents, sign = x[active], latents[active], sign[active]
    directions = unit_rows(sae.W_dec[latents])
    clean = sae.encode(x)
    perturbed = sae.encode(x + directions * (sign * length)[:, None])
    # A latent moves the reconstruction by z_j ||d_j||, in the units of the activations.
    change = (perturbed - clean) * sae.decoder_norms()
    own = change.gather(1, latents[:, None])[:, 0]
    kept = (perturbed.gather(1, latents[:, None])[:, 0] != 0) & (own != 0)
    if not bool(kept.any()):
        return None, None
    ratio = (change.square().sum(1) - own.square()) / own.square()
    return float(ratio[kept].median()), float((own / (sign * length))[kept].mean())
