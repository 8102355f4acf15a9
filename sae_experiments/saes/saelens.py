"""SAEs as SAELens directories: ``cfg.json`` and ``sae_weights.safetensors``, plus reference rows that are checked on every load.

What is written here loads in sae-lens 6.x and computes the same; what sae-lens writes loads here as a :class:`Loaded` SAE.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.files import read_json, write_bytes, write_json
from sae_experiments.saes.base import SAE
from sae_experiments.saes.loaded import Loaded
from sae_experiments.saes.saelens_config import CONFIG, WEIGHTS, exported, understood

REFERENCE = "reference.safetensors"
CHECKSUM = "sha256"  # in the metadata of a safetensors file that was written here


@torch.no_grad()
def save_sae(
    sae: SAE, folder: Path | str, *, reference: Tensor, metadata: Mapping[str, Any]
) -> None:
    """Write a trained SAE in SAELens' directory format.

    ``reference`` (N, D) rows are stored with the SAE's codes and reconstructions, so that a loader can tell whether it computes the same.
    Raises :class:`NotExportable` for a variant that has no counterpart in the format.
    """
    folder = Path(folder)
    if (
        next(sae.parameters()).dtype != torch.float32
    ):  # the file is in float32, and so its reference rows must be
        sae = copy.deepcopy(sae).float()
    sae.eval()
    architecture, tensors, config = sae.inference()
    reference = sae.accepted(reference, "d_in").detach().reshape(-1, sae.d_in)
    full = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": exported(metadata),
        **config,
    }
    full = json.loads(json.dumps(full, default=str))
    _check_finite(full, "")
    acts = sae.encode(reference)
    for name, tensor in {**tensors, "reference": reference}.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{folder} is not written: {name} holds a value that is not finite")
    write_bytes(folder / WEIGHTS, _bytes(tensors))
    write_bytes(
        folder / REFERENCE, _bytes({"x": reference, "acts": acts, "recon": sae.decode(acts)})
    )
    write_json(folder / CONFIG, full)


def _check_finite(value: Any, where: str) -> None:
    """Raise :class:`UserError` for a number in JSON-like ``value`` that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"save_sae: {where}={value} is no number that JSON has: leave it out, or give it as text"
        )
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_finite(inner, f"{where}.{key}" if where else key)
    for i, inner in enumerate(value if isinstance(value, list) else ()):
        _check_finite(inner, f"{where}[{i}]")


def load_sae(folder: Path | str) -> Loaded:
    """Read a SAELens directory, written here or by sae-lens, as an SAE that can be used and trained on.

    Raises :class:`UserError`, one line that names the file, for a folder that is not one, a tensor that is missing or has another shape, an
    architecture or setting that is not known, and, where reference rows are stored, weights that compute something else than they say.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} is not an SAE directory: it needs {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    tensors = _tensors(folder / WEIGHTS)
    inference, notes = understood(config, tensors, folder)
    sae = Loaded(inference, notes)
    if (folder / REFERENCE).is_file():
        _check_reference(
            sae, {k: v.float() for k, v in _tensors(folder / REFERENCE).items()}, folder
        )
    return sae


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (safe_open is not a mapping)
            written = (f.metadata() or {}).get(CHECKSUM)
        if written is not None and written != _checksum(tensors):
            raise ValueError("its checksum differs")
        return tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error


def _check_reference(sae: Loaded, reference: dict[str, Tensor], folder: Path) -> None:
    for key in ("x", "recon"):
        if key not in reference:
            raise UserError(f"{folder / REFERENCE}: tensor {key} is missing")
    found, stored = sae(reference["x"]), reference["recon"]
    error = float((found - stored).norm() / stored.norm().clamp_min(1e-12))
    if not error <= 1e-3:
        raise UserError(
            f"{folder}: the weights do not compute the stored reference rows (error {error:.2g}): tensors are swapped or damaged"
        )


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    plain = {k: v.detach().float().cpu().contiguous().clone() for k, v in tensors.items()}
    return save(plain, {CHECKSUM: _checksum(plain)})


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for key in sorted(tensors):
        found.update(f"{key}{list(tensors[key].shape)}".encode())
        found.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
