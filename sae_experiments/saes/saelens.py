"""Reading and writing of SAELens directories, `cfg.json` and `sae_weights.safetensors`.

A directory written here also holds reference rows, which every load checks. It loads in sae-lens
6.x and computes the same there. A directory of sae-lens loads here as a `Loaded` SAE.
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

#: Name of the file with rows, their codes and their reconstructions.
REFERENCE = "reference.safetensors"
#: Metadata key of our safetensors files that holds the checksum of their tensors.
CHECKSUM = "sha256"


@torch.no_grad()
def save_sae(
    sae: SAE, folder: Path | str, *, reference: Tensor, metadata: Mapping[str, Any]
) -> None:
    """Write a trained SAE in SAELens' directory format.

    Args:
        sae: The SAE; it is put in eval mode.
        folder: Directory to write.
        reference: Rows (N, D) that are stored with their codes and reconstructions, so that a
            loader can check that it computes the same.
        metadata: Further keys of `cfg.json`, JSON-like; other values are stored as text.

    Raises:
        NotExportable: The format has no counterpart of the variant.
        UserError: A tensor or a number of the metadata is not finite.
    """
    folder = Path(folder)
    if next(sae.parameters()).dtype != torch.float32:
        # The file is in float32, so its reference rows must be computed in float32.
        sae = copy.deepcopy(sae).float()
    sae.eval()
    architecture, tensors, config = sae.inference()
    reference = sae.as_rows(reference, "d_in").detach().reshape(-1, sae.d_in)
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
    """Refuse infinite numbers and NaN, which JSON does not have, in a JSON-like `value`."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"save_sae: {where}={value} is no number that JSON has: "
            "leave it out, or give it as text"
        )
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_finite(inner, f"{where}.{key}" if where else key)
    if isinstance(value, list):
        for i, inner in enumerate(value):
            _check_finite(inner, f"{where}[{i}]")


def load_sae(folder: Path | str) -> Loaded:
    """Read a SAELens directory, written here or by sae-lens.

    Returns:
        An SAE that can be used and trained further.

    Raises:
        UserError: The folder is not an SAE directory, a tensor is missing or has another shape, an
            architecture or setting is unknown, or the weights do not reproduce the stored
            reference rows.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} is not an SAE directory: it needs {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    tensors = _tensors(folder / WEIGHTS)
    inference, notes = understood(config, tensors, folder)
    sae = Loaded(inference, notes)
    if (folder / REFERENCE).is_file():
        reference = {name: t.float() for name, t in _tensors(folder / REFERENCE).items()}
        _check_reference(sae, reference, folder)
    return sae


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file and verify its checksum, if it has one."""
    try:
        with safe_open(path, framework="pt") as f:
            names = f.keys()  # safe_open is not a mapping: it cannot be iterated over
            tensors = {name: f.get_tensor(name) for name in names}
            written = (f.metadata() or {}).get(CHECKSUM)
        if written is not None and written != _checksum(tensors):
            raise ValueError("its checksum differs")
        return tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error


def _check_reference(sae: Loaded, reference: dict[str, Tensor], folder: Path) -> None:
    """Refuse weights that do not reproduce the stored reconstructions of the reference rows."""
    for key in ("x", "recon"):
        if key not in reference:
            raise UserError(f"{folder / REFERENCE}: tensor {key} is missing")
    stored = reference["recon"]
    recon = sae(reference["x"])
    error = float((recon - stored).norm() / stored.norm().clamp_min(1e-12))
    if not error <= 1e-3:  # NaN is refused as well
        raise UserError(
            f"{folder}: the weights do not compute the stored reference rows "
            f"(error {error:.2g}): tensors are swapped or damaged"
        )


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of the tensors as float32, with their checksum in its metadata."""
    plain = {k: v.detach().float().cpu().contiguous().clone() for k, v in tensors.items()}
    return save(plain, {CHECKSUM: _checksum(plain)})


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and bytes of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key}{list(tensors[key].shape)}".encode())
        digest.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
