"""Perturbed held-out rows: every kind of noise of `perturb`, of a size relative to their spread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sae_experiments.metrics.base import EvalContext, logits_of
from sae_experiments.metrics.robustness.sums import Sums
from sae_experiments.models.hooks import capture
from sae_experiments.saes.base import SAE, Codes
from sae_experiments.saes.ops import unit_rows
from sae_experiments.saes.purified import perturb
from sae_experiments.saes.purified.perturb import NoiseModel

NO_MODEL = "there is no language model around the rows"
NO_INPUT = "decoder directions are no inputs: the SAE rebuilds another site than it reads"
CHUNK = 4096
WINDOWS_PER_PASS = 32


@dataclass(frozen=True, kw_only=True)
class NoiseSource:
    """Perturbations of rows (N, D).

    The same seed gives the same noise to every SAE, except for attacks: these depend on the SAE.
    """

    sae: SAE
    """The SAE, for attacks on it."""
    cloud: NoiseModel
    """Mean, radius R and covariance of the rows."""
    attack_steps: int
    """Steps of `pgd`."""
    seed: int
    """Seed of the noise."""
    alt: Tensor | None
    """The rows after earlier characters were replaced; None without a language model."""

    def why_not(self, kind: str) -> str:
        """Reason why this SAE cannot have a kind of noise; empty if it can."""
        if kind == "token" and self.alt is None:
            return NO_MODEL
        if kind == "targeted" and self.sae.d_in != self.sae.d_out:
            return NO_INPUT
        return ""

    def delta(self, kind: str, x: Tensor, begin: int, eps: float, draw: int = 0) -> Tensor:
        """Draw perturbations of rows.

        Args:
            kind: One of `perturb.TYPES`.
            x: Rows, (n, D).
            begin: Number of the first of these rows.
            eps: Size of the noise in units of R.
            draw: Number of the draw.

        Returns:
            Perturbations, (n, D).
        """
        if eps == 0:
            return torch.zeros_like(x)
        seed = self.seed + 7919 * draw + 104_729 * begin + perturb.TYPES.index(kind)
        g = torch.Generator(x.device).manual_seed(seed)
        reach = eps * float(self.cloud.radius)
        if kind in perturb.SHARED:
            return self.cloud.directions(kind, len(x), g).mul_(reach)
        if kind == "mask":
            return self.cloud.mask(x, eps, g)
        if kind == "swap":
            other = x[torch.randperm(len(x), generator=g, device=x.device)]
            return self.cloud.towards(x, other, eps, beyond=False)
        if kind == "token":
            alt = cast("Tensor", self.alt)  # there is no such noise otherwise, see `why_not`
            other = alt[begin : begin + len(x)].to(x)
            return self.cloud.towards(x, other, eps, beyond=True)
        if kind == "targeted":
            latents, sign = self.aimed(x, g)
            directions = unit_rows(self.sae.W_dec[latents.clamp_min(0)])
            return directions * (sign * reach)[:, None]
        steps = 1 if kind == "fgsm" else self.attack_steps
        return perturb.pgd(self.sae.encode, x, reach, steps, g)

    def pairs(
        self, kind: str, x: Tensor, eps: float, *, draw: int = 0, size: int = CHUNK
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield clean and perturbed rows, at most `size` at a time (see `delta`)."""
        for begin in range(0, len(x), size):
            part = x[begin : begin + size]
            yield part, part + self.delta(kind, part, begin, eps, draw)

    def sums(self, kind: str, x: Tensor, eps: float, sae: SAE | None = None) -> Sums:
        """Sums over the codes of clean and perturbed rows `x` (N, D).

        Args:
            kind: One of `perturb.TYPES`.
            x: Rows, (N, D).
            eps: Size of the noise in units of R.
            sae: SAE that encodes the rows; None: the SAE of this source.
        """
        encoder = self.sae if sae is None else sae
        sums = Sums(encoder.d_sae)
        for clean, perturbed in self.pairs(kind, x, eps):
            sums.add(encoder.encode(clean), encoder.encode(perturbed))
        return sums

    def aimed(self, x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Choose an active latent of each row at random, and a random sign.

        Returns:
            Latents (n,), -1 for rows without active latents, and signs (n,), 0 for these rows.
        """
        sae = self.sae
        stability = torch.zeros(sae.d_sae, device=x.device)
        codes = Codes(sae.encode(x))
        latents = perturb.choose(codes, stability, sae.W_enc, sae.W_dec, {"weak": 1.0}, g)
        return latents, perturb.signs(len(x), g) * (latents >= 0)


@torch.no_grad()
def other_texts(ctx: EvalContext, rows: int, share: float, seed: int) -> Tensor | None:
    """Activations after random characters of the text were replaced.

    Rows whose own character was replaced stay as they were: only the text before may have changed.

    Args:
        ctx: The language model and the held-out text.
        rows: Number of rows, from the first.
        share: Probability that a character is replaced by a random one.
        seed: Seed of the replacements.

    Returns:
        Rows (N, D); None without a language model.
    """
    if ctx.lm is None or ctx.lm.model is None or ctx.held_out is None:
        return None
    store, sites = ctx.held_out, ctx.read_sites
    g = torch.Generator().manual_seed(seed)
    n_windows = -(-min(rows, store.n_rows) // store.length)
    n_symbols = max(ctx.vocabulary, 2)
    parts = []
    for begin in range(0, n_windows, WINDOWS_PER_PASS):
        starts = store.starts[begin : min(begin + WINDOWS_PER_PASS, n_windows)]
        ids = ctx.lm.tokens(starts)[0].cpu()
        replaced = torch.rand(ids.shape, generator=g) < share
        # A shift by at least one symbol: the replacement is never the same character.
        shift = torch.randint(1, n_symbols, ids.shape, generator=g)
        changed = torch.where(replaced, (ids + shift) % n_symbols, ids)
        with capture(ctx.lm.model, sites) as seen:
            logits_of(ctx.lm.model, changed.to(ctx.device))
        alt = torch.cat([seen[s].flatten(0, 1).float() for s in sites], 1)
        first_row = begin * store.length
        x = ctx.inputs(slice(first_row, first_row + len(alt))).to(ctx.device)
        parts.append(torch.where(replaced.reshape(-1, 1).to(ctx.device), x, alt))
    return torch.cat(parts)[:rows]
