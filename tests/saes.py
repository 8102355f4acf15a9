"""Every SAE of conf/sae, built small, and a world of sparse features to train it on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_experiments.config.compose import build, compose_checked
from sae_experiments.fitting.fit import Sample, fit_saes
from sae_experiments.saes.base import SAE, Batch, Step
from sae_experiments.training.loop import TrainConfig

CONF = Path(__file__).resolve().parents[1] / "conf"
#: SAEs that are trained here, which sae=saelens is not.
NAMES = sorted(p.stem for p in (CONF / "sae").glob("[!_]*.yaml") if p.stem != "saelens")
#: Those that read several sites at once.
OF_SEVERAL_SITES = {"crosscoder", "cross_layer_transcoder", "per_layer_transcoder"}
D, M, L0, TRUE = 16, 48, 4, 40


@functools.cache
def sae_spec(name: str, *overrides: str) -> Any:
    """The sae_spec of ``conf/sae/<name>.yaml`` with ``target_l0`` L0."""
    cfg, _ = compose_checked(
        CONF, ["preset=smoke", f"sae={name}", f"sae.target_l0={L0}", *overrides]
    )
    return next(iter(build(cfg.study).saes.values()))


def make(name: str, *overrides: str, seed: int = 0, d_sae: int = M, **kwargs: Any) -> SAE:
    """A small untrained SAE whose biases and scales are not at their (zero) start, so that nothing is trivially true."""
    torch.manual_seed(seed)
    sae = sae_spec(name, *overrides).model(d_in=D, d_sae=d_sae, d_out=D, **kwargs)
    return unsettled(sae, seed)


def unsettled(sae: SAE, seed: int = 0) -> SAE:
    """The SAE with biases and scales moved away from their start."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in sae.parameters():
            if p.ndim == 1:
                p.add_(0.05 * torch.rand(p.shape, generator=generator))
    return sae


@functools.cache
def _features() -> Tensor:
    return torch.nn.functional.normalize(
        torch.randn(TRUE, D, generator=torch.Generator().manual_seed(0)), dim=1
    )


def rows(n: int, seed: int) -> Tensor:
    """n rows that are sums of a few of 40 fixed directions, with a mean that is not zero."""
    g = torch.Generator().manual_seed(seed)
    on = (torch.rand(n, TRUE, generator=g) < 0.06).float()
    return on * (1 + 0.2 * torch.randn(n, TRUE, generator=g)) @ _features() + 0.3


def effect(recon: Tensor) -> dict[str, Tensor]:
    """A stand-in for the rest of a language model."""
    return {"kl": (recon[:, 0] - 0.1).square().mean(), "later": recon[:, 1].square().mean()}


def batch(n: int = 64, seed: int = 0) -> Batch:
    """Rows as an autoencoder's batch (a transcoder's target differs from its input)."""
    x = rows(n, seed)
    return Batch(x, x, None, effect)


def step(sae: SAE, progress: float = 0.5, dead: Tensor | None = None) -> Step:
    """A moment in the middle of training."""
    none = torch.zeros(sae.d_sae, dtype=torch.bool)
    return Step(
        phase="train",
        progress=progress,
        dead=none if dead is None else dead,
        generator=torch.Generator().manual_seed(5),
    )


def config(**changes: Any) -> TrainConfig:
    """A short fit."""
    plain: dict[str, Any] = {
        "steps": 300,
        "batch_size": 256,
        "lr": 3e-3,
        "min_lr": 0.0,
        "warmup_steps": 20,
        "decay": "linear",
        "decay_from": 0.7,
        "optimizer": "adam",
        "muon_lr": 0.0,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip": 1.0,
        "log_every": 50,
        "eval_every": 10**9,
        "checkpoint_every_s": 1e9,
    }
    return TrainConfig(**(plain | changes))


def trained(name: str, *overrides: str, seed: int = 0, n_train: int = 300, **kwargs: Any) -> SAE:
    """An SAE of the family after a short fit, calibrated."""
    sae = make(name, *overrides, seed=seed)
    start = rows(4096, 10**6)
    fit_saes(
        {name: sae},
        lambda s: batch(256, s),
        config(steps=n_train, **kwargs),
        Sample(start, start, rows(16384, 10**6 + 1)),
        seed=seed,
        dead_after=4000,
    )
    return sae
