"""What perturbed activations do to the language model, with the SAE in between and without; and whether another seed's latents are as stable."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr
from torch import Tensor

from sae_experiments.metrics.base import Bench
from sae_experiments.metrics.robustness.noise import Noises
from sae_experiments.metrics.robustness.sums import Sums
from sae_experiments.models.hooks import Site, patched
from sae_experiments.saes.purified.perturb import Cloud
from sae_experiments.sampling import spread


@torch.no_grad()
def denoising(bench: Bench, cloud: Cloud, eps: float, windows: int, seed: int) -> tuple[float | None, float | None]:
    """Bits a character by which Gaussian noise at the site raises the cross-entropy: as it is, and through the SAE (whose own error is in it)."""
    site = bench.read
    if bench.lm is None or bench.lm.model is None or bench.held_out is None or site != bench.write or not isinstance(site, Site):
        return None, None
    model, sae, starts = bench.lm.model, bench.sae, bench.held_out.starts[:windows]
    g = torch.Generator(bench.device).manual_seed(seed)
    sums = dict.fromkeys(("clean", "noisy", "rebuilt"), 0.0)
    for begin in range(0, len(starts), 32):
        x, y = (t.to(bench.device) for t in bench.lm.tokens(starts[begin : begin + 32]))
        delta = cloud.directions("gaussian", x.numel(), g).mul_(eps * cloud.radius).view(*x.shape, -1)

        def rebuilt(activation: Tensor, delta: Tensor = delta) -> Tensor:
            return sae((activation + delta).flatten(0, 1)).view_as(activation)

        for name, change in (("clean", lambda a: a), ("noisy", lambda a, delta=delta: a + delta), ("rebuilt", rebuilt)):
            with patched(model, site, change):
                logits = model(input_ids=x, use_cache=False).logits[:, 1:].float()
            sums[name] += float(F.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten(), reduction="sum"))
    n = len(starts) * (bench.held_out.length - 1) * math.log(2)
    return (sums["noisy"] - sums["clean"]) / n, (sums["rebuilt"] - sums["clean"]) / n


@torch.no_grad()
def seeds_agree(bench: Bench, noises: Noises, x: Tensor, total: Sums, eps: float, least: int, match: int) -> dict[str, float | None]:
    """Whether the latents that are stable in this SAE are stable in its replicas too: decoder rows matched one to one (Hungarian), cosine > 0.7."""
    part, ranks, shares = x[:16384], [], []
    mine = _some(np.flatnonzero(total.alive(least)), match)
    for replica in bench.replicas:
        sums = Sums(replica.d_sae)
        for i, rows in enumerate(part.split(4096)):
            sums.add(replica.encode(rows), replica.encode(rows + noises.delta("gaussian", rows, i * 4096, eps)))
        theirs = _some(np.flatnonzero(sums.alive(least)), match)
        if len(mine) < 3 or len(theirs) < 3:
            continue
        a, b = (F.normalize(s.W_dec[torch.from_numpy(w).to(x.device)], dim=1) for s, w in ((noises.sae, mine), (replica, theirs)))
        cosines = (a @ b.t()).cpu().numpy()
        i, j = linear_sum_assignment(-cosines)
        same = cosines[i, j] > 0.7
        shares.append(same.sum() / len(mine))
        if same.sum() >= 10:
            ranks.append(spearmanr(total.fss()[mine[i[same]]], sums.fss()[theirs[j[same]]]).statistic)
    ranks = [r for r in ranks if math.isfinite(r)]
    return {"seed_rank": float(np.mean(ranks)) if ranks else None, "seed_matched": float(np.mean(shares)) if shares else None}


def _some(latents: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` latents: nested dictionaries keep theirs in the order of their groups, so the first ones are no sample."""
    return latents[spread(len(latents), most)]
