"""How far an input may move before the support changes, in closed form, and what a step along one latent's decoder row does to the others."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_experiments.metrics.robustness.noise import Noises
from sae_experiments.saes.base import SAE
from sae_experiments.saes.jumprelu import JumpReLU
from sae_experiments.saes.purified.perturb import unit
from sae_experiments.saes.topk import TopK

NO_CLOSED_FORM = "no closed form for this encoder"


def has_margins(sae: SAE) -> bool:
    """Whether the support is a threshold, or a top k, of a pre-activation that is linear in the input."""
    kind = type(sae)
    if kind.encoder_input is not SAE.encoder_input or kind.pre_acts is not SAE.pre_acts:
        return False
    if issubclass(kind, TopK):
        return kind.strength is SAE.strength and kind.shape is TopK.shape
    return kind.strength in (SAE.strength, JumpReLU.strength)


@torch.no_grad()
def radii(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every active latent of rows (B, D): row, latent and the l2 distance within which it stays on.

    Threshold encoders: ``(a_j - theta_j) / ||e_j||``, exact. TopK: the smaller of ``a_j / ||e_j||`` (a value of 0 is off) and, over the latents
    i outside, ``(a_j - a_i) / ||e_j - e_i||``, the nearest input at which i overtakes j: there the support changes, be it by j or by another.
    """
    sae.eval()
    pre = sae.pre_acts(x)
    row, col = (sae.activate(pre).dense() != 0).nonzero().unbind(1)
    norms = sae.W_enc.norm(dim=1).clamp_min(1e-12)
    if not isinstance(sae, TopK):
        return row, col, (sae.strength(pre)[row, col] - sae.threshold) / norms[col]
    found = pre[row, col] / norms[col]
    squares = sae.W_enc.square().sum(1)
    on = torch.zeros_like(pre, dtype=torch.bool)
    on[row, col] = True
    for part in torch.arange(len(row), device=x.device).split(max(1, (1 << 22) // sae.d_sae)):
        r, c = row[part], col[part]
        apart = (squares[c, None] + squares - 2 * sae.W_enc[c] @ sae.W_enc.t()).clamp_min(1e-24).sqrt()
        swap = (pre[r, c][:, None] - pre[r]) / apart
        found[part] = torch.minimum(found[part], swap.masked_fill(on[r], torch.inf).amin(1))
    return row, col, found


@torch.no_grad()
def confirmed(sae: SAE, x: Tensor, pairs: int, seed: int) -> float:
    """Share of ``pairs`` random (row, latent) whose radius holds by trial: one per cent beyond it in the worst direction the latent is off (TopK:
    the support is another), one per cent before it there it is on, and on at that length in a random direction. 1 unless the formula is wrong.
    """
    row, col, radius = radii(sae, x)
    g = torch.Generator().manual_seed(seed)
    pick = torch.randperm(len(row), generator=g)[:pairs].to(row.device)
    row, col, radius = row[pick], col[pick], radius[pick]
    here, worst = x[row], -sae.W_enc[col]
    if isinstance(sae, TopK):
        pre = sae.pre_acts(here)
        codes = sae.activate(pre).dense() != 0
        apart = torch.cdist(sae.W_enc[col], sae.W_enc).clamp_min(1e-12)
        at = pre.gather(1, col[:, None])
        rival = ((at - pre) / apart).masked_fill(codes, torch.inf)
        least = rival.amin(1) < at[:, 0] / sae.W_enc[col].norm(dim=1)
        worst = torch.where(least[:, None], sae.W_enc[rival.argmin(1)] - sae.W_enc[col], worst)
    worst = worst / worst.norm(dim=1, keepdim=True)
    anywhere = torch.randn(here.shape, generator=g).to(here)
    anywhere = anywhere / anywhere.norm(dim=1, keepdim=True)

    before = sae.encode(here) != 0

    def after(direction: Tensor, factor: float) -> Tensor:
        return sae.encode(here + direction * (factor * radius)[:, None]) != 0

    def on(direction: Tensor, factor: float) -> Tensor:
        return after(direction, factor).gather(1, col[:, None])[:, 0]

    beyond = (after(worst, 1.01) != before).any(1) if isinstance(sae, TopK) else ~on(worst, 1.01)
    # A radius near 0 is below what float32 can tell.
    sure = radius > 1e-3 * radius.median()
    holds = beyond & on(worst, 0.99) & on(anywhere, 0.99)
    return float(holds[sure].float().mean()) if bool(sure.any()) else float("nan")


@torch.no_grad()
def crosstalk(noises: Noises, x: Tensor, eps: float) -> tuple[float | None, float | None]:
    """A step ``+-eps R d_i`` for a random active latent i of each row: median of ``sum_{l != i} dz_l^2 / dz_i^2``, and mean of ``dz_i / (+-eps R)``
    (the slope, ideally 1), over the rows where i stays on; each dz_l times ||d_l||, so that it does not matter how a code is scaled.
    """
    sae, reach = noises.sae, eps * float(noises.cloud.radius)
    latents, sign = noises.aimed(x, torch.Generator(x.device).manual_seed(noises.seed))
    some = latents >= 0
    x, latents, sign = x[some], latents[some], sign[some]
    rows, sizes = unit(sae.W_dec[latents]), sae.reach()  # a latent is worth z_j ||d_j|| in the units of the activations
    z, after = sae.encode(x), sae.encode(x + rows * (sign * reach)[:, None])
    change = (after - z) * sizes
    own = change.gather(1, latents[:, None])[:, 0]
    kept = (after.gather(1, latents[:, None])[:, 0] != 0) & (own != 0)
    if not bool(kept.any()):
        return None, None
    ratio = (change.square().sum(1) - own.square()) / own.square()
    return float(ratio[kept].median()), float((own / (sign * reach))[kept].mean())
