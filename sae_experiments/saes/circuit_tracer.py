"""Read and write transcoders of all layers in the local layouts of circuit-tracer 0.5.

Cross-layer transcoders are `W_enc_<i>.safetensors` and `W_dec_<i>.safetensors` per layer, per-layer
ones `layer_<i>.safetensors`, beside a `config.yaml`. Thresholds are of the JumpReLU kind, compared
with a strict `>` as here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.files import write_bytes
from sae_experiments.saes.cross_layer import CrossLayerTranscoder, EveryLayer

CONFIG = "config.yaml"
#: Sites of our transcoders, in names that circuit-tracer's wrapper of an MLP gives.
#: TransformerLens' `ln2.hook_normalized` is the norm's output in some releases, and what comes
#: before its weight and bias in others.
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
#: Name of the thresholds in the files of per-layer transcoders.
THRESHOLD = "activation_function.threshold"


@torch.no_grad()
def save_transcoders(sae: EveryLayer, folder: Path, *, model: str, scan: str) -> None:
    """Write transcoders of all layers for circuit-tracer.

    Args:
        sae: The fitted transcoders; with skip paths only if they are per-layer, as the layout of
            cross-layer transcoders has no place for these.
        folder: Directory to write.
        model: Name or folder of the language model.
        scan: Name of the set.

    Raises:
        UserError: The layout cannot hold a part of the transcoders.
    """
    if sae.cross and sae.W_skip is not None:
        raise UserError(
            f"{folder} is not written: circuit-tracer's layout of cross-layer transcoders has no "
            "skip paths"
        )
    threshold = sae.cutoffs()
    files: dict[str, dict[str, Tensor]] = {}
    for k in range(sae.n_sites):
        latents, site = sae.latents_of(k), sae.site_of(k)
        rows, centre = sae.encoders[latents], sae.centre[site]
        b_enc, b_dec = sae.b_enc[latents] - rows @ centre, sae.b_dec[site]
        if sae.W_skip is not None:
            b_dec = b_dec - sae.W_skip[k] @ centre
        if sae.cross:
            blocks = [
                sae.decoders[to][latents.start - sae.sources(to).start :][: sae.per_layer]
                for to in range(k, sae.n_sites)
            ]
            files[f"W_enc_{k}"] = {
                f"W_enc_{k}": rows,
                f"b_enc_{k}": b_enc,
                f"b_dec_{k}": b_dec,
                f"threshold_{k}": threshold[latents],
            }
            files[f"W_dec_{k}"] = {f"W_dec_{k}": torch.stack(blocks, 1)}
            continue
        files[f"layer_{k}"] = {
            "W_enc": rows,
            "W_dec": sae.decoders[k],
            "b_enc": b_enc,
            "b_dec": b_dec,
            THRESHOLD: threshold[latents],
        }
        if sae.W_skip is not None:
            files[f"layer_{k}"]["W_skip"] = sae.W_skip[k]
    for name, tensors in files.items():
        write_bytes(folder / f"{name}.safetensors", _packed(tensors))
    kind = "cross_layer_transcoder" if sae.cross else "transcoder_set"
    about = {"model_name": model, "model_kind": kind, "scan": scan, **HOOKS}
    # A string of JSON is one of YAML.
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in about.items()]
    write_bytes(folder / CONFIG, "".join(lines).encode())


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    return save({k: v.detach().float().cpu().contiguous().clone() for k, v in tensors.items()})


@torch.no_grad()
def load_transcoders(folder: Path) -> CrossLayerTranscoder:
    """Read transcoders of all layers from circuit-tracer's layout.

    Args:
        folder: A directory with the files of either kind, of layers 0 and up.

    Returns:
        The transcoders, in eval mode. Latents without a threshold are active above 0.

    Raises:
        UserError: Files or tensors are missing, damaged or of different sizes.
    """
    cross = (folder / "W_enc_0.safetensors").is_file()
    first = "W_enc" if cross else "layer"
    n_sites = 0
    while (folder / f"{first}_{n_sites}.safetensors").is_file():
        n_sites += 1
    if not n_sites:
        raise UserError(
            f"{folder} holds no transcoders of circuit-tracer: it needs W_enc_0.safetensors, or "
            "layer_0.safetensors"
        )
    layers = [_layer(folder, k, cross) for k in range(n_sites)]
    try:
        per_layer, width = layers[0]["W_enc"].shape
        sae = CrossLayerTranscoder(
            n_sites=n_sites,
            cross=cross,
            skip="W_skip" in layers[0],
            k=1,
            d_in=n_sites * width,
            d_sae=n_sites * per_layer,
            unit_decoder=False,
        )
        _fill(sae, layers)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: a tensor is missing or has another shape ({error})") from error
    sae.fitted = True
    return sae.eval().requires_grad_(False)


def _layer(folder: Path, k: int, cross: bool) -> dict[str, Tensor]:
    """Tensors of one layer, by the names that the files of per-layer transcoders use."""
    names = (f"W_enc_{k}", f"W_dec_{k}") if cross else (f"layer_{k}",)
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / f"{name}.safetensors"
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error})") from error
    if cross:
        tensors = {name.removesuffix(f"_{k}"): value for name, value in tensors.items()}
    if "threshold" in tensors:
        tensors[THRESHOLD] = tensors.pop("threshold")
    return {name: value.float() for name, value in tensors.items()}


def _fill(sae: CrossLayerTranscoder, layers: list[dict[str, Tensor]]) -> None:
    """Copy the tensors of all layers into an SAE of the right sizes."""
    threshold = torch.zeros(sae.d_sae)
    for k, tensors in enumerate(layers):
        latents = sae.latents_of(k)
        sae.encoders[latents].copy_(_shaped(tensors["W_enc"], sae.per_layer, sae.width))
        sae.b_enc[latents].copy_(_shaped(tensors["b_enc"], sae.per_layer))
        sae.b_dec[sae.site_of(k)].copy_(_shaped(tensors["b_dec"], sae.width))
        if THRESHOLD in tensors:
            threshold[latents] = _shaped(tensors[THRESHOLD].flatten(), sae.per_layer)
        if sae.W_skip is not None:
            sae.W_skip[k].copy_(_shaped(tensors["W_skip"], sae.width, sae.width))
        written = tensors["W_dec"] if sae.cross else tensors["W_dec"][:, None]
        reached = sae.n_sites - k if sae.cross else 1
        written = _shaped(written, sae.per_layer, reached, sae.width)
        for i in range(reached):
            start = latents.start - sae.sources(k + i).start
            sae.decoders[k + i][start : start + sae.per_layer].copy_(written[:, i])
    sae.threshold = threshold


def _shaped(tensor: Tensor, *shape: int) -> Tensor:
    if tensor.shape != shape:
        raise ValueError(f"{tuple(tensor.shape)} in place of {shape}")
    return tensor
