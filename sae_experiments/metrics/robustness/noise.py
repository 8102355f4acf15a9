"""Held-out rows and their perturbed twins: every kind of noise of :mod:`..saes.perturb`, of a size relative to the rows' spread."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_experiments.metrics.base import Bench
from sae_experiments.models.hooks import as_sites, capture
from sae_experiments.saes.base import SAE, Codes
from sae_experiments.saes.purified.perturb import Cloud
from sae_experiments.saes.purified.sae import perturb

NO_MODEL = "there is no language model around the rows"
NO_INPUT = "decoder directions are no inputs: the SAE rebuilds another site than it reads"


@dataclass(frozen=True, kw_only=True)
class Noises:
    """Makes perturbations of rows (N, D). The same seed gives the same noise to every SAE, but for attacks, which are made for each SAE.

    ``alt``: the rows after earlier characters were replaced, or None where there is no language model.
    """

    sae: SAE
    cloud: Cloud
    attack_steps: int
    seed: int
    alt: Tensor | None

    def why_not(self, kind: str) -> str:
        """Why there is no such noise for this SAE; empty where there is."""
        if kind == "token" and self.alt is None:
            return NO_MODEL
        return NO_INPUT if kind == "targeted" and self.sae.d_in != self.sae.d_out else ""

    def delta(self, kind: str, x: Tensor, begin: int, eps: float, draw: int = 0) -> Tensor:
        """Perturbations (n, D) of the rows ``x``, the first of which is row ``begin``."""
        g = torch.Generator(x.device).manual_seed(self.seed + 7919 * draw + 104_729 * begin + perturb.TYPES.index(kind))
        reach = eps * float(self.cloud.radius)
        if eps == 0:
            return torch.zeros_like(x)
        if kind in perturb.SHARED:
            return self.cloud.directions(kind, len(x), g).mul_(reach)
        if kind == "mask":
            return self.cloud.mask(x, eps, g)
        if kind == "swap":
            return self.cloud.towards(x, x[torch.randperm(len(x), generator=g, device=x.device)], eps, beyond=False)
        if kind == "token":
            return self.cloud.towards(x, self.alt[begin : begin + len(x)].to(x), eps, beyond=True)
        if kind == "targeted":
            latents, sign = self.aimed(x, g)
            return perturb.unit(self.sae.W_dec[latents.clamp_min(0)]) * (sign * reach)[:, None]
        return perturb.pgd(self.sae.encode, x, reach, 1 if kind == "fgsm" else self.attack_steps, g)

    def aimed(self, x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """For each row one of its active latents, at random (-1 where there is none), and a random sign (0 there)."""
        sae = self.sae
        latents = perturb.choose(Codes(sae.encode(x)), torch.zeros(sae.d_sae, device=x.device), sae.W_enc, sae.W_dec, {"weak": 1.0}, g)
        return latents, perturb.signs(len(x), g) * (latents >= 0)


@torch.no_grad()
def other_texts(bench: Bench, rows: int, share: float, seed: int) -> Tensor | None:
    """The first ``rows`` rows (N, D) as they are after every character of the text was replaced with probability ``share`` by a random one.

    Rows whose own character was replaced stay as they were: only what came before may have changed. None without a language model.
    """
    if bench.lm is None or bench.lm.model is None or bench.held_out is None:
        return None
    store, sites, found = bench.held_out, as_sites(bench.read), []
    g = torch.Generator().manual_seed(seed)
    n = -(-min(rows, store.n_rows) // store.length)
    symbols = max(len(bench.symbols), 2)
    for begin in range(0, n, 32):
        starts = store.starts[begin : min(begin + 32, n)]
        ids = bench.lm.tokens(starts)[0].cpu()
        gone = torch.rand(ids.shape, generator=g) < share
        # A shift by at least one symbol: the replacement is never the same character.
        changed = torch.where(gone, (ids + torch.randint(1, symbols, ids.shape, generator=g)) % symbols, ids)
        with capture(bench.lm.model, sites) as seen:
            bench.lm.model(input_ids=changed.to(bench.device), use_cache=False)
        alt = torch.cat([seen[s].flatten(0, 1).float() for s in sites], 1)
        part = slice(begin * store.length, begin * store.length + len(alt))
        x = store.rows(bench.read, part).to(bench.device)
        found.append(torch.where(gone.reshape(-1, 1).to(bench.device), x, alt))
    return torch.cat(found)
