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
from sae_experiments.files import digest, read_json, sha256_file, write_bytes, write_json
from sae_experiments.saes.base import SAE, warn_unless_fitted
from sae_experiments.saes.loaded import Loaded, loaded
from sae_experiments.saes.saelens_config import (
    CONFIG,
    SCALER,
    STORE_STATE,
    WEIGHTS,
    centred_in_training,
    exported,
    hook_name,
    is_transcoder,
    output_hook_name,
    site_of_hook,
    to_common_form,
)

#: Name of the file with rows, their codes and their reconstructions.
REFERENCE = "reference.safetensors"
#: Metadata key of our safetensors files that holds the checksum of their tensors.
CHECKSUM = "sha256"


@torch.no_grad()
def save_sae(
    sae: SAE,
    folder: Path | str,
    *,
    reference: Tensor,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a trained SAE in SAELens' directory format.

    Args:
        sae: The SAE; it is put in eval mode.
        folder: Directory to write.
        reference: Rows (N, D) that are stored with their codes and reconstructions, so that a
            loader can check that it computes the same.
        metadata: Further keys of `cfg.json`, JSON-like; other values are stored as text. None: no
            further keys.

    Raises:
        NotExportable: The format has no counterpart of the variant.
        UserError: A tensor or a number of the metadata is not finite, or the directory cannot be
            written.
    """
    warn_unless_fitted(sae, "save_sae")
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
        "metadata": exported(metadata or {}),
        **config,
    }
    full = json.loads(json.dumps(full, default=str))
    _check_finite(full, "")
    acts = sae.encode(reference)
    for name, tensor in {**tensors, "reference": reference}.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{folder} is not written: {name} holds a value that is not finite")
    recon = sae.reconstruct(reference, acts)
    try:
        write_bytes(folder / WEIGHTS, _bytes(tensors))
        write_bytes(folder / REFERENCE, _bytes({"x": reference, "acts": acts, "recon": recon}))
        write_json(folder / CONFIG, full)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): give a folder that can be"
        ) from error


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


def load_sae(folder: Path | str, *, rows: Tensor | None = None) -> Loaded:
    """Read a SAELens directory, written here or by sae-lens.

    Args:
        folder: The directory.
        rows: Activations (N, D) of the model. A training checkpoint with
            `normalize_activations: expected_average_only_in` may need them to estimate the factor
            of its input. An SAE that normalises each row gets its decoder in their units.

    Returns:
        An SAE that can be used, and trained further unless its `trains_on` is False.

    Raises:
        UserError: The folder is not an SAE directory, a tensor is missing or has another shape, an
            architecture or setting is unknown, or the weights do not reproduce the stored
            reference rows.
    """
    sae = read_directory(Path(folder))
    if rows is not None:
        sae.adapt(sae.as_rows(rows, "d_in").reshape(-1, sae.d_in))
    if sae.needs_scale:
        raise UserError(
            f"{Path(folder) / CONFIG}: normalize_activations=expected_average_only_in needs the "
            f"factor of the input, and there is no {SCALER}: give rows of the model, "
            "load_sae(folder, rows=x)"
        )
    return sae


def read_directory(folder: Path) -> Loaded:
    """The SAE of a directory before it has seen any row; see `Loaded.adapt` and `load_sae`."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} is not an SAE directory: it needs {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    inference, notes = to_common_form(config, _tensors(folder / WEIGHTS), folder)
    sae = loaded(inference, notes)
    if (folder / REFERENCE).is_file():
        reference = {name: t.float() for name, t in _tensors(folder / REFERENCE).items()}
        _check_reference(sae, reference, folder)
    return sae


def directory_digest(folder: Path) -> str:
    """SHA-256 of the files of a directory that decide what its SAE computes."""
    names = (CONFIG, WEIGHTS, SCALER, STORE_STATE)
    return digest({n: sha256_file(folder / n) for n in names if (folder / n).is_file()})


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
        digest.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- SAEs of a run ----------------------------------------------------------------------------


def from_directory(*, d_in: int, d_out: int, path: str | None = None) -> Loaded:
    """The SAE of `sae=saelens`, which is evaluated and not trained.

    Args:
        d_in: Width of the site that is read.
        d_out: Width of the site that is rebuilt.
        path: The directory.

    Raises:
        UserError: There is no path, or the directory cannot be read or has other widths.
    """
    if not path:
        raise UserError("sae=saelens evaluates an SAE that is there: give sae.path=DIR")
    with torch.device("cpu"):  # a check before the run builds all SAEs without their numbers
        sae = read_directory(Path(path).expanduser())
    for key, asked, site in (("d_in", d_in, "reads"), ("d_out", d_out, "rebuilds")):
        actual = getattr(sae, key)
        if actual != asked:
            raise UserError(
                f"sae.path={path} has {key}={actual}, but the site that it {site} is {asked} wide: "
                "it belongs to another model or site"
            )
    return sae


def sites_of(path: str, read: str | None, write: str | None, default: str) -> tuple[str, str]:
    """Names of the sites that the SAE of a directory reads and rebuilds.

    Args:
        path: The directory.
        read: Site asked for by `sae.read`; None: the directory's own, which must be `default`
            unless it is a transcoder's.
        write: Site asked for by `sae.write`; None: the directory's own.
        default: Site of the run.

    Raises:
        UserError: The directory was fitted at another site, or does not name one that is needed.
    """
    folder = Path(path).expanduser()
    if not (folder / CONFIG).is_file():
        raise UserError(f"sae.path={path} is not an SAE directory: it needs {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    hook = hook_name(config, folder / CONFIG)
    own = site_of_hook(hook)
    if hook and own is None and read is None:
        raise UserError(
            f"sae.path={path} was fitted at hook_name={hook!r}, which is no site here: "
            "name the site that it reads with sae.read"
        )
    if not is_transcoder(config):
        if own is not None and read is None and own != default:
            raise UserError(
                f"sae.path={path} was fitted at {own}, not at {default}: set site={own}"
            )
        read = read or own or default
        return read, write or read
    target = site_of_hook(output_hook_name(config, folder / CONFIG))
    if write is None and target is None:
        raise UserError(
            f"sae.path={path} is a transcoder whose hook_name_out names no site here: "
            "name the site that it rebuilds with sae.write"
        )
    return read or own or default, write or str(target)


def remarks(folder: Path, sae: Loaded, site: str) -> list[str]:
    """Remarks for the user on an SAE whose site may be the wrong one."""
    config = read_json(folder / CONFIG)
    hook = hook_name(config, folder / CONFIG)
    said = [*sae.notes]
    if not hook:
        said.append(f"{folder} names no hook_name: it is taken for one of {site}")
    elif site_of_hook(hook) not in (None, site):
        said.append(f"{folder} was fitted at {hook}, and reads {site} here")
    elif site.startswith(("resid", "mlp_out")) and centred_in_training(config):
        said.append(
            f"{folder} is of sae-lens before 3.19.2 or of no known version: it may expect rows "
            "less their mean over the width, which are not taken here"
        )
    return said
