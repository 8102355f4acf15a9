"""SAEs as SAELens directories: ``cfg.json`` and ``sae_weights.safetensors``, plus reference rows that are checked on every load.

What is written here loads in sae-lens 6.x and computes the same; what sae-lens writes loads here as a :class:`Loaded` SAE.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sae_experiments.io import UserError, read_json, write_bytes, write_json
from sae_experiments.saelens import CONFIG, TENSORS, WEIGHTS, exported, understood
from sae_experiments.saes.base import SAE, Inference

REFERENCE = "reference.safetensors"
CHECKSUM = "sha256"  # in the metadata of a safetensors file that was written here


@torch.no_grad()
def save_sae(sae: SAE, folder: Path | str, *, reference: Tensor, metadata: Mapping[str, Any]) -> None:
    """Write a trained SAE in SAELens' directory format.

    ``reference`` (N, D) rows are stored with the SAE's codes and reconstructions, so that a loader can tell whether it computes the same.
    Raises :class:`NotExportable` for a variant that has no counterpart in the format.
    """
    folder = Path(folder)
    sae.eval()
    architecture, tensors, config = sae.inference()
    full = {
        "architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float32", "device": "cpu",
        "normalize_activations": "none", "reshape_activations": "none", "metadata": exported(metadata), **config,
    }  # fmt: skip
    acts = sae.encode(reference)
    write_bytes(folder / WEIGHTS, _bytes(tensors))
    write_bytes(folder / REFERENCE, _bytes({"x": reference, "acts": acts, "recon": sae.decode(acts)}))
    write_json(folder / CONFIG, json.loads(json.dumps(full, default=str)))


def load_sae(folder: Path | str) -> Loaded:
    """Read a SAELens directory, written here or by sae-lens, as an SAE for inference.

    Raises :class:`UserError`, one line that names the file, for a folder that is not one, a tensor that is missing or has another shape, an
    architecture or setting that is not known, and, where reference rows are stored, weights that compute something else than they say.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} is not an SAE directory: it needs {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    tensors = _tensors(folder / WEIGHTS)
    inference, notes = understood(config, tensors, folder)
    sae = Loaded(inference, folder)
    sae.notes = notes
    if (folder / REFERENCE).is_file():
        _check_reference(sae, {k: v.float() for k, v in _tensors(folder / REFERENCE).items()}, folder)
    return sae


class Loaded(SAE):
    """An SAE read from a SAELens directory: fixed weights, inference only. ``notes``: what its configuration says that was left alone."""

    notes: tuple[str, ...] = ()

    def __init__(self, inference: Inference, folder: Path) -> None:
        architecture, tensors, config = inference
        d_in, d_sae = tensors["W_enc"].shape
        super().__init__(d_in=d_in, d_sae=d_sae, unit_decoder=False, pre_bias=bool(config.get("apply_b_dec_to_input", True)))
        self.architecture, self.config = architecture, config
        self.W_enc = nn.Parameter(tensors["W_enc"].t().contiguous())
        self.W_dec = nn.Parameter(tensors["W_dec"].contiguous())
        self.b_dec = nn.Parameter(tensors["b_dec"])
        self.b_enc = nn.Parameter(tensors["b_gate" if architecture == "gated" else "b_enc"])
        for name in TENSORS[architecture]:
            if name not in ("b_enc", "b_gate"):
                self.register_buffer(name, tensors[name])
        # SAELens' default ranks latents by pre-activation times decoder norm: the same as a decoder of unit rows.
        norms = tensors["W_dec"].norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(d_sae)
        self.register_buffer("norms", norms)
        self.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        pre = self.pre_acts(x)
        if self.architecture == "topk":
            pre = pre * self.norms
            kept = pre.topk(int(self.config["k"]), dim=1)
            return torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())
        if self.architecture == "jumprelu":
            return pre.relu() * (pre > self.threshold)
        if self.architecture == "gated":
            return (pre > 0) * torch.relu(self.r_mag.exp() * (pre - self.b_enc) + self.b_mag)
        return pre.relu()

    def decode(self, acts: Tensor) -> Tensor:
        return (acts / self.norms.clamp_min(1e-12) if self.architecture == "topk" else acts) @ self.W_dec + self.b_dec

    def contributions(self, acts: Tensor, direction: Tensor) -> Tensor:
        return super().contributions(acts, direction) / (self.norms.clamp_min(1e-12) if self.architecture == "topk" else 1.0)

    def reach(self) -> Tensor:
        return super().reach() / (self.norms.clamp_min(1e-12) if self.architecture == "topk" else 1.0)

    def inference(self) -> Inference:
        names = ("W_enc", "W_dec", "b_dec", *TENSORS[self.architecture])
        values = {n: self.b_enc if n == "b_gate" else getattr(self, n) for n in names} | {"W_enc": self.W_enc.t().contiguous()}
        settings = {k: self.config[k] for k in ("k", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm") if k in self.config}
        return Inference(self.architecture, values, settings)


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
        raise UserError(f"{folder}: the weights do not compute the stored reference rows (error {error:.2g}): tensors are swapped or damaged")


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    plain = {k: v.detach().float().cpu().contiguous().clone() for k, v in tensors.items()}
    return save(plain, {CHECKSUM: _checksum(plain)})


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for key in sorted(tensors):
        found.update(f"{key}{list(tensors[key].shape)}".encode())
        found.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
