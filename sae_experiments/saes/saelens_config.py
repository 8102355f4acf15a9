"""Reader of SAELens' `cfg.json` and tensors, of every version, into one common form.

Every key that changes what the SAE computes is read, or refused in one line that names the key.
Keys about training are ignored. An unknown key is refused unless its value switches nothing on.
`site_of_hook` translates the hook point of a directory, so that it can be compared with a site.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.files import read_json
from sae_experiments.saes.base import Inference

#: Names of the two files of a directory.
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
#: Version written into our directories: sae-lens drops the metadata of versions before 6.
VERSION = "6.54.12"
#: Tensors (F,) of each architecture beside `W_enc`, `W_dec` and `b_dec`.
TENSORS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "r_mag", "b_mag"),
}
#: Architectures of training checkpoints: batch top-k, whose codes have one threshold afterwards.
CHECKPOINTS = ("batchtopk", "matryoshka_batchtopk")
#: Transcoders, with the architecture of their code and whether a linear path goes past it.
TRANSCODERS = {
    "transcoder": ("standard", False),
    "jumprelu_transcoder": ("jumprelu", False),
    "skip_transcoder": ("standard", True),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}
ARCHITECTURES = (*TENSORS, *CHECKPOINTS, *TRANSCODERS)
#: Normalisations of the input by their names in `cfg.json`; versions before 6 write booleans.
NORMALISATIONS = {
    None: "none",
    False: "none",
    True: "expected_average_only_in",
    "none": "none",
    "expected_average_only_in": "expected_average_only_in",
    "constant_norm_rescale": "constant_norm_rescale",
    "layer_norm": "layer_norm",
}
#: Files beside a checkpoint that hold the factor of `expected_average_only_in`, by version.
SCALER, STORE_STATE = "activation_scaler.json", "activations_store_state.safetensors"
#: Names of the tensor that scales the codes of a fine-tuned SAE, in decoding only.
SCALES = ("scaling_factor", "finetuning_scaling_factor")
#: Reason to refuse the index of an attention head.
SINGLE_HEAD = "is not supported: an SAE of a single head has no site here"
#: Values that switch nothing on, for unknown keys.
NEUTRAL = (None, False, 0, 0.0, "", "none", [], {})
#: Accepted types of the weights.
DTYPES = ("float32", "float", "float64", "double", "float16", "half", "bfloat16")
#: Keys about training, data, logging and files, of every version from 2 to 6. They do not change
#: what the SAE computes.
_ABOUT = """
    act_store_device adam_beta1 adam_beta2 autocast autocast_lm aux_loss_coefficient
    b_dec_init_method begin_batch_token begin_sequence_token buffer_size_gb
    cached_activations_path checkpoint_path column_name compile_llm compile_sae context_size
    data_dir data_files dataset_name dataset_path dataset_trust_remote_code
    dead_feature_threshold dead_feature_window decoder_heuristic_init
    decoder_heuristic_init_norm decoder_init_norm decoder_orthogonal_init device
    disable_concat_sequences eval_batch_size_prompts eval_every_n_wandb_logs
    exclude_special_tokens expansion_factor feature_sampling_window finetuning_method
    finetuning_tokens from_pretrained_path hf_is_private_repo hf_num_shards hf_repo_id
    hf_revision hook_eval hook_point_eval init_encoder_as_decoder_transpose is_dataset_tokenized
    jumprelu_bandwidth jumprelu_init_threshold jumprelu_sparsity_loss_mode jumprelu_ste_to_input
    jumprelu_tanh_scale k_aux l0_coefficient l0_warm_up_steps l1_coefficient l1_warm_up_steps
    llm_batch_size llm_compilation_mode log_activations_store_to_wandb
    log_optimizer_state_to_wandb log_to_wandb log_weights_to_wandb lp_norm lr lr_decay_steps
    lr_end lr_scheduler_name lr_warm_up_steps metadata model_batch_size model_class_name
    model_from_pretrained_kwargs model_kwargs model_name mse_loss_normalization
    n_batches_in_buffer n_checkpoints n_eval_batches n_eval_seqs n_restart_cycles
    n_training_steps neuronpedia_id new_cached_activations_path noise_scale
    normalize_sae_decoder num_proc output_path pre_act_loss_coefficient prepend_bos
    pretokenize_batch_size resume resume_from_checkpoint run_name sae_compilation_mode
    sae_lens_training_version sae_lens_version save_final_checkpoint save_path
    scale_sparsity_penalty_by_decoder_norm seed seqpos_slice sequence_separator_token shuffle
    shuffle_every_n_buffers sparsity_penalty split store_batch_size store_batch_size_prompts
    streaming target_l0 tokenizer_name tokens_per_buffer topk_threshold_lr
    total_training_samples total_training_steps total_training_tokens train_batch_size
    train_batch_size_samples train_batch_size_tokens training_tokens unique_id
    use_cached_activations use_ghost_grads use_sparse_activations verbose wandb_entity wandb_id
    wandb_log_frequency wandb_project warm_up_steps x_norm_coeff
"""
ABOUT = frozenset(_ABOUT.split())
#: Keys that this module reads.
_READ = """
    architecture activation_fn activation_fn_str activation_fn_kwargs k d_in d_sae d_out dtype
    apply_b_dec_to_input normalize_activations reshape_activations rescale_acts_by_decoder_norm
    finetuning_scaling_factor hook_head_index hook_point_head_index hook_name hook_point
    hook_layer hook_point_layer hook_name_out hook_layer_out hook_head_index_out
"""
READ = frozenset(_READ.split())
#: Numbers of training in the checkpoints of batch top-k SAEs.
OF_CHECKPOINTS = frozenset(
    ("k", "rescale_acts_by_decoder_norm", "matryoshka_widths", "use_matryoshka_aux_loss")
)


class Directory(NamedTuple):
    """An SAE in the common form, with notes for the user."""

    inference: Inference
    """Architecture, its tensors (see `TENSORS`) and its settings."""
    notes: tuple[str, ...]
    """Ignored settings that a user may want to know about."""


@dataclass(frozen=True, slots=True)
class _Config:
    """A configuration whose readers refuse a wrong value in one line."""

    values: Mapping[str, Any]
    """Keys and values, unchecked."""
    path: Path
    """File they come from, for messages."""

    def wrong(self, key: str, why: str) -> UserError:
        """The error for the value of a key."""
        name = key if key.isidentifier() else repr(key)
        value = repr(self.values.get(key))
        if len(value) >= 100:
            value = value[:97] + "..."
        return UserError(f"{self.path}: {name}={value} {why}")

    def whole(self, key: str) -> int:
        """Read a whole number of at least 1."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, "must be a whole number of at least 1")
        # The first comparison refuses NaN, the second one fractions and infinity.
        if value >= 1 and value == value // 1:
            return int(value)
        raise self.wrong(key, "must be a whole number of at least 1")

    def flag(self, key: str, default: bool) -> bool:
        """Read true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false")
        return value

    def among(self, key: str, allowed: tuple[Any, ...], why: str) -> None:
        """Refuse a value that is neither null nor in `allowed`."""
        value = self.values.get(key)
        if value is not None and not _is_among(value, allowed):
            raise self.wrong(key, why)


def _is_among(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Membership by type and value: 0 is not among (False,)."""
    return any(type(value) is type(other) and value == other for other in allowed)


def to_common_form(values: Any, tensors: Mapping[str, Tensor], folder: Path) -> Directory:
    """Bring the SAE of a directory into the common form.

    Args:
        values: The parsed `cfg.json`.
        tensors: Tensors of the weights file, in the types of the file.
        folder: Directory they come from, for messages.

    Raises:
        UserError: A setting that changes what the SAE computes is not supported or is wrong, or
            the tensors do not fit the configuration.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{folder / CONFIG} is not a mapping")
    config = _Config(values, folder / CONFIG)
    name = _architecture(config)
    kind, skip = TRANSCODERS.get(name, (name, False))
    settings: dict[str, Any] = {
        "apply_b_dec_to_input": config.flag("apply_b_dec_to_input", True),
        "normalize_activations": _normalisation(config),
    }
    if name in TRANSCODERS:
        settings["transcoder"] = True
        if settings["apply_b_dec_to_input"]:
            raise config.wrong("apply_b_dec_to_input", f"must be false (architecture {name})")
    if kind == "topk" or kind in CHECKPOINTS:
        by_norm = config.flag("rescale_acts_by_decoder_norm", kind in CHECKPOINTS)
        settings["rescale_acts_by_decoder_norm"] = by_norm
    if kind == "topk":
        settings["k"] = _k(config)
    _refuse_unsupported(config, name)
    weights = _tensors(config, kind, tensors, folder / WEIGHTS, skip=skip, name=name)
    if kind in CHECKPOINTS:
        weights = _with_thresholds(weights, settings.pop("rescale_acts_by_decoder_norm"))
        kind = "jumprelu"
    scale = _scale(config, tensors)
    if scale is not None:
        if settings.get("rescale_acts_by_decoder_norm"):
            raise config.wrong(
                "finetuning_scaling_factor",
                "is not supported together with rescale_acts_by_decoder_norm",
            )
        weights["W_dec"] = weights["W_dec"] * scale[:, None]
    if settings["normalize_activations"] == "expected_average_only_in":
        settings["input_scale"] = _input_scale(folder)
    notes: tuple[str, ...] = ()
    if noise := config.values.get("noise_scale"):
        notes = (f"{config.path}: noise_scale={noise!r} was noise in training, none is added here",)
    return Directory(Inference(kind, weights, settings), notes)


def _normalisation(config: _Config) -> str:
    """Read the normalisation of the input."""
    value = config.values.get("normalize_activations")
    if not _is_among(value, tuple(NORMALISATIONS)):
        known = ", ".join(name for name in NORMALISATIONS if isinstance(name, str))
        raise config.wrong("normalize_activations", f"is not supported, only {known}")
    return NORMALISATIONS[value]


def _input_scale(folder: Path) -> float | None:
    """The factor of `expected_average_only_in` from a file beside the weights; None without one.

    Raises:
        UserError: The file cannot be read, or holds no positive number.
    """
    for path in (folder / SCALER, folder / STORE_STATE):
        if not path.is_file():
            continue
        if path.name == SCALER:
            values = read_json(path)
            factor = values.get("scaling_factor") if isinstance(values, Mapping) else None
        else:
            try:
                factor = load_file(path).get("estimated_norm_scaling_factor")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a whole safetensors file ({error})") from error
            factor = float(factor) if factor is not None and factor.numel() == 1 else None
        if factor is None:
            continue
        is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if not is_number or not 0 < factor < float("inf"):
            raise UserError(f"{path}: scaling_factor={factor!r} is no positive number")
        return float(factor)
    return None


def _with_thresholds(weights: dict[str, Tensor], by_norm: bool) -> dict[str, Tensor]:
    """Tensors of a batch top-k checkpoint as those of a jumprelu SAE with the same codes.

    Args:
        weights: Its tensors, `topk_threshold` () among them.
        by_norm: Whether codes are multiplied by the lengths of the decoder's rows.
    """
    threshold = weights.pop("topk_threshold")
    if by_norm:
        norms = weights["W_dec"].norm(dim=1)
        weights["W_enc"] = weights["W_enc"] * norms
        weights["b_enc"] = weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / norms.clamp_min(1e-12)[:, None]
    return weights | {"threshold": threshold.expand(len(weights["b_enc"])).contiguous()}


def _architecture(config: _Config) -> str:
    """Read the architecture from its name and the activation function of older versions."""
    name = config.values.get("architecture", "standard")  # up to version 3.5 there was no other
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise config.wrong("architecture", f"is not one of {', '.join(ARCHITECTURES)}")
    keys = ("activation_fn_str", "activation_fn")
    named = [key for key in keys if config.values.get(key) is not None]
    for key in named:
        value = config.values[key]
        if value not in ("relu", "topk"):
            raise config.wrong(key, "is not supported: only relu and topk are")
        if value != config.values[named[0]]:
            raise config.wrong(key, f"contradicts {named[0]}={config.values[named[0]]!r}")
        if name != "standard" and (value == "topk") != (name == "topk"):
            raise config.wrong(key, f"contradicts architecture={name!r}")
    return "topk" if named and config.values[named[0]] == "topk" else name


def _k(config: _Config) -> int:
    """Read the number of active latents, at the key where the version stores it."""
    kwargs = config.values.get("activation_fn_kwargs") or {}
    if not isinstance(kwargs, Mapping) or set(kwargs) - {"k"}:
        raise config.wrong("activation_fn_kwargs", "is not supported: only k is")
    inner = _Config(kwargs, config.path)
    sources = [c for c in (config, inner) if "k" in c.values] or [config]
    values = {c.whole("k") for c in sources}
    if len(values) > 1:
        raise config.wrong("k", f"contradicts activation_fn_kwargs={dict(kwargs)!r}")
    (k,) = values
    if k > config.whole("d_sae"):
        raise UserError(f"{config.path}: k={k} is above d_sae={config.values['d_sae']}")
    return k


def _refuse_unsupported(config: _Config, architecture: str) -> None:
    """Refuse settings that would change the result, and unknown keys that might."""
    # hook_z is fine: activations come with their heads side by side already.
    config.among(
        "reshape_activations", ("none", "hook_z"), "is not supported, only none and hook_z"
    )
    config.among(
        "dtype",
        tuple(prefix + dtype for prefix in ("", "torch.") for dtype in DTYPES),
        f"is not one of {', '.join(DTYPES)}",
    )
    for key in ("hook_head_index", "hook_point_head_index", "hook_head_index_out"):
        config.among(key, (), SINGLE_HEAD)
    has_d_out = architecture not in TRANSCODERS and config.values.get("d_out") is not None
    if has_d_out and config.whole("d_out") != config.whole("d_in"):
        raise config.wrong(
            "d_out", f"is not d_in={config.values['d_in']} (architecture {architecture})"
        )
    _refuse_unknown_keys(config, architecture)
    metadata = config.values.get("metadata")
    if metadata is None:
        return
    if not isinstance(metadata, Mapping):
        raise config.wrong("metadata", "is not a mapping")
    _Config(metadata, config.path).among("hook_head_index", (), SINGLE_HEAD)


def _refuse_unknown_keys(config: _Config, architecture: str) -> None:
    """Refuse keys of unknown meaning, or of another architecture, that switch something on."""
    of_topk = {"k", "activation_fn_kwargs", "rescale_acts_by_decoder_norm"}
    known = READ | ABOUT
    if architecture in CHECKPOINTS:  # k is a number of training there: the threshold counts
        known = known | OF_CHECKPOINTS
        of_topk = {"activation_fn_kwargs"}
    if architecture != "topk":
        known = known - of_topk
    for key, value in config.values.items():
        neutral = (None, False, {}) if key in of_topk else NEUTRAL
        if key in known or _is_among(value, neutral):
            continue
        where = f" (architecture {architecture})" if key in of_topk else ""
        raise config.wrong(
            key,
            f"is not understood{where}: remove it if it does not change what the SAE computes",
        )


def _tensors(
    config: _Config,
    architecture: str,
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    skip: bool,
    name: str,
) -> dict[str, Tensor]:
    """Check the tensors and bring them into the common form.

    Args:
        config: The configuration, for the widths.
        architecture: A key of `TENSORS`, or one of `CHECKPOINTS`.
        tensors: Tensors of the weights file.
        path: The weights file, for messages.
        skip: Whether there is a linear path past the code.
        name: Name of the architecture in the configuration, for messages.

    Returns:
        The tensors of the architecture as float32.

    Raises:
        UserError: A tensor is missing, not finite, of another shape, or of unknown meaning.
    """
    shapes, sizes = _shapes(config, architecture, skip, name)
    floats = _as_float32(tensors, path)
    if architecture == "jumprelu" and "threshold" not in floats and "log_threshold" in floats:
        floats["threshold"] = floats.pop("log_threshold").exp()  # training stores the logarithm
    for key, shape in shapes.items():
        if key not in floats:
            raise UserError(f"{path}: tensor {key} is missing (architecture {name})")
        actual = tuple(floats[key].shape)
        if actual != shape:
            raise UserError(f"{path}: tensor {key} has shape {actual}, not {shape} ({sizes})")
    for key in floats.keys() - shapes.keys() - set(SCALES):
        if bool(floats[key].any()):
            raise UserError(f"{path}: tensor {key} is not understood (architecture {name})")
    return {key: floats[key] for key in shapes}


def _shapes(
    config: _Config, architecture: str, skip: bool, name: str
) -> tuple[dict[str, tuple[int, ...]], str]:
    """Shapes of the tensors of an architecture, and the widths they follow from, in words."""
    d_in, d_sae = config.whole("d_in"), config.whole("d_sae")
    sizes, d_out = f"d_in={d_in}, d_sae={d_sae}", d_in
    if name in TRANSCODERS:
        d_out = config.whole("d_out")
        sizes += f", d_out={d_out}"
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out)}
    shapes["b_dec"] = (d_out,)
    if architecture in CHECKPOINTS:
        shapes |= {"b_enc": (d_sae,), "topk_threshold": ()}
    else:
        shapes |= dict.fromkeys(TENSORS[architecture], (d_sae,))
    if skip:
        shapes["W_skip"] = (d_out, d_in)
    return shapes, sizes


def _as_float32(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Convert tensors to float32; refuse integers and values that are not finite."""
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise UserError(
                f"{path}: tensor {name} holds {value.dtype}, not floating-point numbers"
            )
        if not bool(torch.isfinite(value.float()).all()):
            raise UserError(f"{path}: tensor {name} holds values that are not finite")
    return {name: value.float() for name, value in tensors.items()}


def _scale(config: _Config, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Factors (F,) of the codes in decoding; None for an SAE without them."""
    key = "finetuning_scaling_factor"
    scaled = config.values.get(key) is not None and config.flag(key, False)
    factors = [tensors[name].float() for name in SCALES if name in tensors]
    if not scaled:
        if any(bool((factor != 1).any()) for factor in factors):
            raise config.wrong(key, "but the weights hold scaling factors that are not 1")
        return None
    if len(factors) != 1 or tuple(factors[0].shape) != (config.whole("d_sae"),):
        raise config.wrong(key, f"needs one tensor {' or '.join(SCALES)} of d_sae numbers")
    return factors[0]


# --- sites ----------------------------------------------------------------------------------


#: Streams of a block: TransformerLens' names and ours. Its `hook_mlp_in` is the residual stream
#: before the layer norm, which has no name here; its `mlp.hook_in` is the input of the MLP.
HOOKS = {
    "hook_resid_post": "resid",
    "hook_attn_out": "attn_out",
    "mlp.hook_post": "mlp_act",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_in": "mlp_in",
}
#: Our names of sites.
OURS = re.compile(r"(resid|attn_out|mlp_in|mlp_act|mlp_out)\.(\d+)")


def hook_of_site(name: str) -> str | None:
    """TransformerLens' name of one of our sites; None for anything else.

    For example `blocks.1.hook_resid_post` for `resid.2`.
    """
    match = OURS.fullmatch(name)
    if not match:
        return None
    if name == "resid.0":
        return "blocks.0.hook_resid_pre"
    stream, layer = match[1], int(match[2])
    hooks = {ours: hook for hook, ours in HOOKS.items()}
    return f"blocks.{layer - 1}.{hooks[stream]}" if layer else None


def site_of_hook(name: str) -> str | None:
    """Our name of a hook point, given in TransformerLens' terms or in ours.

    None for a hook point that is no site here.
    """
    if OURS.fullmatch(name):
        return name
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if not match:
        return None
    block, hook = int(match[1]), match[2]
    if hook == "hook_resid_pre":
        return f"resid.{block}"
    return f"{HOOKS[hook]}.{block + 1}" if hook in HOOKS else None


def hook_name(values: Any, path: Path) -> str:
    """Read the hook point of a configuration of any version; "" if it names none.

    Raises:
        UserError: It names two hook points, or a layer that contradicts the name.
    """
    places = _places(values)
    layers = _named(places, ("hook_layer", "hook_point_layer"))
    names = _named(places, ("hook_name", "hook_point"))
    if len(layers) == 1:
        (layer,) = layers
        names = {name.replace("{layer}", layer) for name in names}
    if len(names) > 1:
        raise UserError(f"{path}: hook_name is {' and '.join(sorted(names))}: an SAE has one")
    name = next(iter(names), "")
    match = re.match(r"blocks\.(\d+)\.", name)
    contradicts = match is not None and bool(layers) and layers != {match[1]}
    if len(layers) > 1 or contradicts:
        raise UserError(
            f"{path}: hook_layer={', '.join(sorted(layers))} contradicts hook_name={name!r}"
        )
    return name


def output_hook_name(values: Any, path: Path) -> str:
    """Read the hook point that a transcoder rebuilds; "" if the configuration names none."""
    names = _named(_places(values), ("hook_name_out",))
    if len(names) > 1:
        raise UserError(f"{path}: hook_name_out is {' and '.join(sorted(names))}: an SAE has one")
    return next(iter(names), "")


def is_transcoder(values: Any) -> bool:
    """True if a configuration, which may be of any form, names a transcoder."""
    name = values.get("architecture") if isinstance(values, Mapping) else None
    return isinstance(name, str) and name in TRANSCODERS


def _places(values: Any) -> list[Mapping[str, Any]]:
    """Mappings where a version may store a key: the configuration itself and its metadata."""
    if not isinstance(values, Mapping):
        return []
    metadata = values.get("metadata")
    return [values, metadata] if isinstance(metadata, Mapping) else [values]


def _named(places: list[Mapping[str, Any]], keys: tuple[str, ...]) -> set[str]:
    """Values of the keys, other than null, as text."""
    return {str(place[key]) for place in places for key in keys if place.get(key) is not None}


def exported(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata in the form that sae-lens keeps.

    It gets a version; the hook point is given in TransformerLens' terms, and `site` holds ours.
    """
    full = {"sae_lens_version": VERSION, "prepend_bos": False, **metadata}
    hook = hook_of_site(str(metadata.get("hook_name")))
    if hook:
        full |= {"hook_name": hook, "site": metadata["hook_name"]}
    return full


def centred_in_training(values: Any) -> bool:
    """True if sae-lens trained the SAE on a model whose streams have no mean over the width.

    Before version 3.19.2 it read models that TransformerLens had processed in this way. A
    directory of unknown version may be that old, so it counts as centred.
    """
    places = _places(values)
    for key in ("sae_lens_training_version", "sae_lens_version"):
        for place in places:
            match = re.match(r"(\d+)\.(\d+)\.(\d+)", str(place.get(key)))
            if match:
                return tuple(map(int, match.groups())) < (3, 19, 2)
    return True
