"""One SAE on a world of known features, scored in seconds to minutes: what agents' scripts call.

Nothing is cached or written. The worlds are drawn afresh from a seed, so that a score on other
seeds than those an SAE was developed on is a fair one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.fitting.fit import Sample, fit_saes
from sae_experiments.metrics import reconstruction, recovery, sparsity
from sae_experiments.metrics.base import EvalContext
from sae_experiments.metrics.recovery import Truth
from sae_experiments.saes.base import SAE, Batch
from sae_experiments.studies.ground_truth.world import Planted, World
from sae_experiments.training.loop import History, Session, TrainConfig, seed_of

_USUAL = Planted(
    width=64,
    features=384,
    zipf=0.5,
    p_max=0.4,
    p_min=0.0005,
    trees=8,
    levels=3,
    branching=4,
    child=0.8,
    rank=8,
    correlation=0.1,
    magnitude=4.5,
    spread=0.5,
    noise=0.0,
)
#: Worlds of a size for a processor: features in trees, independent ones, and noisy rows.
WORLDS = {
    "trees": _USUAL,
    "flat": replace(_USUAL, trees=0, p_max=0.2),
    "noisy": replace(_USUAL, noise=0.3),
}
#: Latents, and active latents per row, of an SAE on them.
D_SAE, K = 96, 4


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Outcome of a trial."""

    sae: SAE
    """The SAE, fitted."""
    metrics: dict[str, float | None]
    """Values by metric; None for one that is undefined."""
    history: History
    """Curves of the fit."""
    seconds: float
    """Time of the fit."""
    cut: bool
    """True if the time limit ended the fit early."""


def trial(
    model: Callable[..., SAE],
    world: str = "trees",
    *,
    seed: int = 0,
    steps: int = 1500,
    lr: float = 3e-3,
    rows: int = 16384,
    seconds: float | None = None,
    **settings: Any,
) -> Trial:
    """Fit an SAE to fresh rows of a world and score it on rows that it has not seen.

    Args:
        model: Class of the SAE (or what builds it from `d_in`, `d_sae` and settings).
        world: Name in `WORLDS`.
        seed: Seed of world, weights and rows.
        steps: Optimiser steps of 1,024 rows.
        lr: Peak learning rate.
        rows: Rows to calibrate on, and as many to score on.
        seconds: Training ends early after so many; None: never.
        **settings: Settings of the model; by default `k=4`.

    Raises:
        UserError: The world does not exist.
    """
    if world not in WORLDS:
        raise UserError(f"world={world} is not one of {', '.join(WORLDS)}")
    began = time.monotonic()
    cpu = torch.device("cpu")
    drawn = World(WORLDS[world], seed_of(seed, "world"), cpu)

    def sample(n: int, *what: Any) -> tuple[Tensor, Tensor]:
        number = seed_of(seed, *what)
        acts = drawn.acts(n, number)
        return drawn.rows(acts, number + 1), acts

    def batch_at(step: int) -> Batch:
        x, _ = sample(1024, "rows", step)
        return Batch(x, x)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "sae"))
        sae = model(d_in=WORLDS[world].width, d_sae=D_SAE, **({"k": K} | settings))
    start, _ = sample(4096, "initial")
    held, _ = sample(rows, "calibration")
    deadline = None if seconds is None else began + seconds
    fits = fit_saes(
        {"sae": sae},
        batch_at,
        _config(steps, lr),
        Sample(start, start, held),
        seed=seed,
        dead_after=steps * 10,
        session=Session(deadline=deadline),
    )
    x, acts = sample(rows, "score")
    truth = {"truth": Truth(drawn.directions, acts)}
    context = EvalContext(sae=sae.eval(), device=cpu, x=x, extras=truth)
    metrics: dict[str, float | None] = {}
    for measured in (
        recovery.measure(context, rows=None, min_fires=5, found=0.9, seed=0),
        reconstruction.measure(context, rows=None),
        sparsity.measure(context, rows=None, entropy_latents=256),
    ):
        metrics |= measured.scalars
    fit = fits["sae"]
    spent = time.monotonic() - began
    return Trial(sae=sae, metrics=metrics, history=fit.history, seconds=spent, cut=fit.cut)


def _config(steps: int, lr: float) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=1024,
        lr=lr,
        min_lr=0.0,
        warmup_steps=min(50, steps // 10),
        decay="linear",
        decay_from=0.7,
        optimizer="adam",
        muon_lr=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        clip=1.0,
        log_every=max(steps // 20, 1),
        eval_every=10**9,
        checkpoint_every_s=1e9,
    )
