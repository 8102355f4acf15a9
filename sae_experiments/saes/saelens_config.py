"""What a SAELens ``cfg.json`` and its tensors say, whatever version wrote them, in one plain form.

Everything that changes what the SAE computes is read, or refused in one line that names the key.
Keys that say how it was trained are left alone; a key that is not known is refused unless its value
switches nothing on. Where a directory says that its SAE sits is compared with the site by
:func:`site_of_hook`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes.base import Inference

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
#: What sae-lens reads our directories as: without a version of 6 or later it drops the metadata.
VERSION = "6.54.12"
#: Tensors of each architecture beside W_enc, W_dec and b_dec.
TENSORS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "r_mag", "b_mag"),
}
#: Names of the tensor that scales the codes of a fine-tuned SAE, in decoding only.
SCALES = ("scaling_factor", "finetuning_scaling_factor")
#: Values that switch nothing on, for keys that are not known.
NEUTRAL = (None, False, 0, 0.0, "", "none", [], {})
DTYPES = ("float32", "float", "float64", "double", "float16", "half", "bfloat16")
#: Keys about training, data, logging and files, of every version from 2 to 6: they do not change what is computed.
_ABOUT = """
    act_store_device adam_beta1 adam_beta2 autocast autocast_lm aux_loss_coefficient b_dec_init_method begin_batch_token
    begin_sequence_token buffer_size_gb cached_activations_path checkpoint_path column_name compile_llm compile_sae
    context_size data_dir data_files dataset_name dataset_path dataset_trust_remote_code dead_feature_threshold
    dead_feature_window decoder_heuristic_init decoder_heuristic_init_norm decoder_init_norm decoder_orthogonal_init device
    disable_concat_sequences eval_batch_size_prompts eval_every_n_wandb_logs exclude_special_tokens expansion_factor
    feature_sampling_window finetuning_method finetuning_tokens from_pretrained_path hf_is_private_repo hf_num_shards
    hf_repo_id hf_revision hook_eval hook_point_eval init_encoder_as_decoder_transpose is_dataset_tokenized
    jumprelu_bandwidth jumprelu_init_threshold jumprelu_sparsity_loss_mode jumprelu_ste_to_input jumprelu_tanh_scale k_aux l0_coefficient
    l0_warm_up_steps l1_coefficient l1_warm_up_steps llm_batch_size llm_compilation_mode log_activations_store_to_wandb
    log_optimizer_state_to_wandb log_to_wandb log_weights_to_wandb lp_norm lr lr_decay_steps lr_end lr_scheduler_name
    lr_warm_up_steps metadata model_batch_size model_class_name model_from_pretrained_kwargs model_kwargs model_name
    mse_loss_normalization n_batches_in_buffer n_checkpoints n_eval_batches n_eval_seqs n_restart_cycles n_training_steps
    neuronpedia_id new_cached_activations_path noise_scale normalize_sae_decoder num_proc output_path
    pre_act_loss_coefficient prepend_bos pretokenize_batch_size resume resume_from_checkpoint run_name sae_compilation_mode
    sae_lens_training_version sae_lens_version save_final_checkpoint save_path scale_sparsity_penalty_by_decoder_norm seed
    seqpos_slice sequence_separator_token shuffle shuffle_every_n_buffers sparsity_penalty split store_batch_size
    store_batch_size_prompts streaming target_l0 tokenizer_name tokens_per_buffer topk_threshold_lr
    total_training_samples total_training_steps total_training_tokens
    train_batch_size train_batch_size_samples train_batch_size_tokens training_tokens unique_id use_cached_activations
    use_ghost_grads use_sparse_activations verbose wandb_entity wandb_id wandb_log_frequency wandb_project warm_up_steps
    x_norm_coeff
"""
ABOUT = frozenset(_ABOUT.split())
#: Keys that are read here.
_READ = """
    architecture activation_fn activation_fn_str activation_fn_kwargs k d_in d_sae d_out dtype apply_b_dec_to_input
    normalize_activations reshape_activations rescale_acts_by_decoder_norm finetuning_scaling_factor hook_head_index
    hook_point_head_index hook_name hook_point hook_layer hook_point_layer
"""
READ = frozenset(_READ.split())


class Directory(NamedTuple):
    """An SAE in plain form (see :data:`TENSORS`), and what was left alone though it is worth a word."""

    inference: Inference
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Config:
    """A configuration that refuses in one line."""

    values: Mapping[str, Any]
    path: Path

    def wrong(self, key: str, why: str) -> UserError:
        """The refusal of a key's value."""
        value, name = repr(self.values.get(key)), key if key.isidentifier() else repr(key)
        return UserError(
            f"{self.path}: {name}={value if len(value) < 100 else value[:97] + '...'} {why}"
        )

    def whole(self, key: str) -> int:
        """A whole number of at least 1."""
        value = self.values.get(key)
        fine = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not fine or value != value or value < 1 or value != value // 1:
            raise self.wrong(key, "must be a whole number of at least 1")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false")
        return value

    def among(self, key: str, fine: tuple[Any, ...], why: str) -> None:
        """Refuse a value that is not one of ``fine`` (null always is)."""
        value = self.values.get(key)
        if value is not None and not any(type(value) is type(f) and value == f for f in fine):
            raise self.wrong(key, why)


def understood(values: Any, tensors: Mapping[str, Tensor], folder: Path) -> Directory:
    """The SAE of a directory in plain form.

    Args:
        values: the parsed ``cfg.json``.
        tensors: those of the weights file, in their own types.
        folder: where they come from, for messages.

    Raises:
        UserError: something changes what the SAE computes and is not supported, or does not fit.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{folder / CONFIG} is not a mapping")
    config = _Config(values, folder / CONFIG)
    architecture = _architecture(config)
    settings: dict[str, Any] = {"apply_b_dec_to_input": config.flag("apply_b_dec_to_input", True)}
    if architecture == "topk":
        settings |= {
            "k": _k(config),
            "rescale_acts_by_decoder_norm": config.flag("rescale_acts_by_decoder_norm", False),
        }
    _refuse_what_is_not_done(config, architecture)
    found = _tensors(config, architecture, tensors, folder / WEIGHTS)
    scale = _scale(config, tensors)
    if scale is not None:
        if settings.get("rescale_acts_by_decoder_norm"):
            raise config.wrong(
                "finetuning_scaling_factor",
                "is not supported together with rescale_acts_by_decoder_norm",
            )
        found["W_dec"] = found["W_dec"] * scale[:, None]
    noise = config.values.get("noise_scale")
    notes = (
        (f"{config.path}: noise_scale={noise!r} was noise in training, none is added here",)
        if noise
        else ()
    )
    return Directory(Inference(architecture, found, settings), notes)


def _architecture(config: _Config) -> str:
    """The architecture, from its name and from the activation function that older versions name beside it."""
    name = config.values.get("architecture", "standard")  # up to version 3.5 there was no other
    if not isinstance(name, str) or name not in TENSORS:
        raise config.wrong("architecture", f"is not one of {', '.join(TENSORS)}")
    named = [
        key for key in ("activation_fn_str", "activation_fn") if config.values.get(key) is not None
    ]
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
    """How many latents are active, from the place where the version puts it."""
    more = config.values.get("activation_fn_kwargs") or {}
    if not isinstance(more, Mapping) or set(more) - {"k"}:
        raise config.wrong("activation_fn_kwargs", "is not supported: only k is")
    inner = _Config(more, config.path)
    places = [c for c in (config, inner) if "k" in c.values]
    found = {c.whole("k") for c in places} or {config.whole("k")}
    if len(found) > 1:
        raise config.wrong("k", f"contradicts activation_fn_kwargs={dict(more)!r}")
    (k,) = found
    if k > config.whole("d_sae"):
        raise UserError(f"{config.path}: k={k} is above d_sae={config.values['d_sae']}")
    return k


def _refuse_what_is_not_done(config: _Config, architecture: str) -> None:
    """Settings that would change the result, and keys that might."""
    config.among(
        "normalize_activations",
        ("none", False),
        "is not supported, only none: choose an SAE of plain activations",
    )
    # Heads side by side are how activations come here already.
    config.among(
        "reshape_activations", ("none", "hook_z"), "is not supported, only none and hook_z"
    )
    config.among(
        "dtype",
        tuple(p + d for p in ("", "torch.") for d in DTYPES),
        f"is not one of {', '.join(DTYPES)}",
    )
    for key in ("hook_head_index", "hook_point_head_index"):
        config.among(key, (), "is not supported: an SAE of a single head has no site here")
    if config.values.get("d_out") is not None and config.whole("d_out") != config.whole("d_in"):
        raise config.wrong(
            "d_out", f"is not d_in={config.values['d_in']}: transcoders are not supported"
        )
    own = {"k", "activation_fn_kwargs", "rescale_acts_by_decoder_norm"}
    known = (READ if architecture == "topk" else READ - own) | ABOUT
    for key, value in config.values.items():
        neutral = (None, False, {}) if key in own else NEUTRAL
        if key not in known and not any(type(value) is type(n) and value == n for n in neutral):
            where = f" (architecture {architecture})" if key in own else ""
            raise config.wrong(
                key,
                f"is not understood{where}: remove it if it does not change what the SAE computes",
            )
    metadata = config.values.get("metadata")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise config.wrong("metadata", "is not a mapping")
    if metadata and metadata.get("hook_head_index") is not None:
        raise _Config(metadata, config.path).wrong(
            "hook_head_index", "is not supported: an SAE of a single head has no site here"
        )


def _tensors(
    config: _Config, architecture: str, tensors: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """The tensors of the plain form as float32, each of its shape, and none left over that would matter."""
    d_in, d_sae = config.whole("d_in"), config.whole("d_sae")
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)} | dict.fromkeys(
        TENSORS[architecture], (d_sae,)
    )
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise UserError(
                f"{path}: tensor {name} holds {value.dtype}, not floating-point numbers"
            )
        if not bool(torch.isfinite(value.float()).all()):
            raise UserError(f"{path}: tensor {name} holds values that are not finite")
    found = {name: value.float() for name, value in tensors.items()}
    if architecture == "jumprelu" and "threshold" not in found and "log_threshold" in found:
        found["threshold"] = found.pop("log_threshold").exp()  # as training keeps it
    for name, shape in shapes.items():
        if name not in found:
            raise UserError(f"{path}: tensor {name} is missing (architecture {architecture})")
        if tuple(found[name].shape) != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {tuple(found[name].shape)}, not {shape} (d_in={d_in}, d_sae={d_sae})"
            )
    for name in found.keys() - shapes.keys() - set(SCALES):
        if bool(found[name].any()):
            raise UserError(
                f"{path}: tensor {name} is not understood (architecture {architecture})"
            )
    return {name: found[name] for name in shapes}


def _scale(config: _Config, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """What the codes (F,) are multiplied by in decoding; None for nothing."""
    key = "finetuning_scaling_factor"
    asked = False if config.values.get(key) is None else config.flag(key, False)
    given = [tensors[name].float() for name in SCALES if name in tensors]
    if not asked:
        if any(bool((g != 1).any()) for g in given):
            raise config.wrong(key, "but the weights hold scaling factors that are not 1")
        return None
    if len(given) != 1 or tuple(given[0].shape) != (config.whole("d_sae"),):
        raise config.wrong(key, f"needs one tensor {' or '.join(SCALES)} of d_sae numbers")
    return given[0]


# ------------------------------------------------------------------------------------------------ sites


#: TransformerLens' names of what lies in a block, and ours. Its ``hook_mlp_in`` is the stream before the layer norm,
#: which has no name here; ``mlp.hook_in`` is what the MLP reads.
HOOKS = {
    "hook_resid_post": "resid",
    "mlp.hook_post": "mlp_act",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_in": "mlp_in",
}
OURS = re.compile(r"(resid|mlp_in|mlp_act|mlp_out)\.(\d+)")


def hook_of_site(name: str) -> str | None:
    """TransformerLens' name of one of our sites, ``blocks.1.hook_resid_post`` for ``resid.2``; None for anything else."""
    match = OURS.fullmatch(name)
    if not match:
        return None
    if name == "resid.0":
        return "blocks.0.hook_resid_pre"
    hooks = {stream: hook for hook, stream in HOOKS.items()}
    return f"blocks.{int(match[2]) - 1}.{hooks[match[1]]}" if int(match[2]) else None


def site_of_hook(name: str) -> str | None:
    """Our name of a hook point, in TransformerLens' terms or in ours; None where there is no such site here."""
    if OURS.fullmatch(name):
        return name
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match and match[2] == "hook_resid_pre":
        return f"resid.{int(match[1])}"
    return f"{HOOKS[match[2]]}.{int(match[1]) + 1}" if match and match[2] in HOOKS else None


def hook_name(values: Any, path: Path) -> str:
    """The hook point that a configuration names, wherever its version puts it; "" where it names none.

    Raises:
        UserError: it names two, or a layer that is not the name's.
    """
    values = values if isinstance(values, Mapping) else {}
    metadata = values.get("metadata")
    places = [values, metadata if isinstance(metadata, Mapping) else {}]
    layers = {
        str(p[k])
        for p in places
        for k in ("hook_layer", "hook_point_layer")
        if p.get(k) is not None
    }
    names = {str(p[k]) for p in places for k in ("hook_name", "hook_point") if p.get(k) is not None}
    if len(layers) == 1:
        names = {n.replace("{layer}", next(iter(layers))) for n in names}
    if len(names) > 1:
        raise UserError(f"{path}: hook_name is {' and '.join(sorted(names))}: an SAE has one")
    name = next(iter(names), "")
    match = re.match(r"blocks\.(\d+)\.", name)
    if len(layers) > 1 or (match and layers and layers != {match[1]}):
        raise UserError(
            f"{path}: hook_layer={', '.join(sorted(layers))} contradicts hook_name={name!r}"
        )
    return name


def exported(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as sae-lens keeps it: with its version, and the hook point in TransformerLens' terms (ours is ``site``)."""
    found = {"sae_lens_version": VERSION, "prepend_bos": False, **metadata}
    hook = hook_of_site(str(metadata.get("hook_name")))
    return found | ({"hook_name": hook, "site": metadata["hook_name"]} if hook else {})


def centred_in_training(values: Any) -> bool:
    """Whether sae-lens trained the SAE on a model whose streams have no mean over the width.

    Before version 3.19.2 it read models that TransformerLens had processed in this way; a directory of no known
    version may come from there.
    """
    values = values if isinstance(values, Mapping) else {}
    metadata = values.get("metadata")
    places = [p for p in (values, metadata) if isinstance(p, Mapping)]
    for key in ("sae_lens_training_version", "sae_lens_version"):
        for place in places:
            if match := re.match(r"(\d+)\.(\d+)\.(\d+)", str(place.get(key))):
                return tuple(map(int, match.groups())) < (3, 19, 2)
    return True
