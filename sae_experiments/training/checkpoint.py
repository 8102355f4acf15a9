"""Checkpoints: tensors and JSON in one checksummed safetensors file that is whole or absent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sae_experiments.files import write_bytes


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write `tensors` and `info`, which JSON can hold.

    Tied weights share storage, which the format refuses, so that every tensor is written as a copy.
    """
    text = json.dumps(info)
    copies = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    write_bytes(path, save(copies, {"info": text, "sha256": _checksum(copies, text)}))


def read_checkpoint(path: Path | None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors (on the CPU) and info, or None if there is no file.

    A damaged file is reported and removed: training starts again, and no wrong number is used.
    """
    if path is None or not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            names = f.keys()
            tensors = {name: f.get_tensor(name) for name in names}
            written = f.metadata()
        if written["sha256"] != _checksum(tensors, written["info"]):
            raise ValueError("its checksum differs")
        return tensors, json.loads(written["info"])
    except Exception as error:  # whatever is wrong with the file, this stage can start again
        path.unlink()
        print(f"checkpoint {path.name} is damaged ({error}): starting this stage again", flush=True)
        return None


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensors_of(module: nn.Module) -> bytes:
    """The state of a module as safetensors, with tied weights as copies."""
    state = module.state_dict()
    return save({k: v.detach().cpu().contiguous().clone() for k, v in state.items()})
