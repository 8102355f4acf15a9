"""Every SAE of conf/sae, built small, and a world of sparse features to train it on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from sae_experiments.config.compose import build, compose_checked
from sae_experiments.fitting.fit import Sample, fit_saes
from sae_experiments.fitting.laws import (
    L0,
    TRUE,
    D,
    M,
    Subject,
    batch,
    config,
    downstream,
    effect,
    rows,
    step,
    unsettled,
)
from sae_experiments.saes.base import SAE

__all__ = ["L0", "NAMES", "TRUE", "D", "M", "batch", "config", "downstream", "effect"]
__all__ += ["make", "rows", "sae_spec", "step", "subject", "trained", "unsettled"]

CONF = Path(__file__).resolve().parents[2] / "conf"
#: SAEs that are trained here, which sae=saelens is not.
NAMES = sorted(p.stem for p in (CONF / "sae").glob("[!_]*.yaml") if p.stem != "saelens")
#: Those that read several sites at once.
OF_SEVERAL_SITES = {
    "cross_layer_jumprelu",
    "cross_layer_transcoder",
    "crosscoder",
    "per_layer_transcoder",
}
#: Steps until the L0 is met, and how well, where that is not the usual.
N_TRAIN = {"crosscoder": 600}  # its L0 is 2 to 9 % low after 300
TOLERANCE = {"kl": 0.05, "p_anneal": 0.05, "topk": 0.05}  # topk: few positive pre-activations


@functools.cache
def sae_spec(name: str, *overrides: str) -> Any:
    """The sae_spec of ``conf/sae/<name>.yaml`` with ``target_l0`` L0."""
    cfg, _ = compose_checked(
        CONF, ["preset=smoke", f"sae={name}", f"sae.target_l0={L0}", *overrides]
    )
    return next(iter(build(cfg.study).saes.values()))


@functools.cache
def subject(name: str) -> Subject:
    """The variant as the laws see it; its fits are shared by all of them."""
    model = sae_spec(name).model
    return Subject(model, N_TRAIN.get(name, 300), TOLERANCE.get(name, 0.03))


def make(name: str, *overrides: str, seed: int = 0, d_sae: int = M, **kwargs: Any) -> SAE:
    """A small untrained SAE whose biases and scales are not at their (zero) start, so that
    nothing is trivially true.
    """
    torch.manual_seed(seed)
    sae = sae_spec(name, *overrides).model(d_in=D, d_sae=d_sae, d_out=D, **kwargs)
    return unsettled(sae, seed)


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
