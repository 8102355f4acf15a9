"""SAEs as SAELens directories: ``cfg.json`` and ``sae_weights.safetensors``, plus reference rows that are checked on every load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from sae_experiments.io import write_bytes, write_json
from sae_experiments.saes.base import SAE

CONFIG, WEIGHTS, REFERENCE = "cfg.json", "sae_weights.safetensors", "reference.safetensors"


@torch.no_grad()
def save_sae(sae: SAE, folder: Path, *, reference: Tensor, metadata: Mapping[str, Any]) -> None:
    """Write a trained SAE in SAELens' directory format.

    ``reference`` (N, D) rows are stored with the SAE's codes and reconstructions, so that a loader can tell whether it computes the same.
    Raises :class:`NotExportable` for a variant that has no counterpart in the format.
    """
    sae.eval()
    architecture, tensors, config = sae.inference()
    full = {
        "architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float32", "device": "cpu",
        "normalize_activations": "none", "reshape_activations": "none", "metadata": dict(metadata), **config,
    }  # fmt: skip
    acts = sae.encode(reference)
    stored = {"x": reference, "acts": acts, "recon": sae.decode(acts)}
    write_bytes(folder / WEIGHTS, _bytes(tensors))
    write_bytes(folder / REFERENCE, _bytes(stored))
    write_json(folder / CONFIG, json.loads(json.dumps(full, default=str)))


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return save({k: v.detach().float().cpu().contiguous().clone() for k, v in tensors.items()})
