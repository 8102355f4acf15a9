"""Purified SAEs of every host."""

from __future__ import annotations

import copy

import torch

from sae_experiments.saes.purified import sae as purified
from support.saes import D, M, sae_spec, unsettled

HOSTS = ["topk", "standard", "jumprelu", "gated", "matryoshka", "tied", "lista", "abs_topk"]


def kinds(**shares: float) -> list[str]:
    return [f"sae.model.mixture.{k}={v}" for k, v in ({"gaussian": 0.0} | shares).items()]


def plainly(*overrides: str, host: str = "batch_topk", seed: int = 0):
    """What ``make("purified", "sae/host=...", *overrides)`` builds, without the half second
    that composing a configuration takes.
    """
    settings = copy.deepcopy(dict(sae_spec("purified").model.keywords)) | {
        "host": sae_spec(host).model
    }
    for override in overrides:
        *path, last = override.removeprefix("sae.model.").split("=")[0].split(".")
        value = override.split("=")[1]
        node = settings
        for name in path:
            node = node[name]
        node[last] = (
            value == "true"
            if value in ("true", "false")
            else value
            if value[0].isalpha()
            else float(value)
            if "." in value
            else int(value)
        )
    torch.manual_seed(seed)
    return unsettled(purified.purify(d_in=D, d_sae=M, d_out=D, **settings), seed)
