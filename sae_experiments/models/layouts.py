"""Layouts of language models: one row of a table for every layout that is proven.

A layout is proven when the laws of `tests/models/test_layouts.py` hold for it; every other model
type is refused, since a part found in the wrong place silently gives wrong numbers. A loaded model
is checked once more, by `check_layout`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError, of_type
from sae_experiments.models.norms import Norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel as CausalLM
else:
    # Importing transformers takes seconds, and only type checkers read the name.
    CausalLM = nn.Module

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Dotted paths to the parts of a model type: two from the model, the others from a block."""

    blocks: str
    """List of transformer blocks."""
    norm: str
    """Last norm before the unembedding."""
    attn_out: str
    """Module whose output attention adds to the residual stream."""
    mlp_in: str
    """Module whose input the MLP reads."""
    mlp_act: str
    """Output projection of the MLP: its input is the hidden activation."""
    mlp_out: str
    """Module whose output the MLP adds to the residual stream."""
    norm_1: str
    """Norm before attention."""
    norm_2: str
    """Norm before the MLP."""
    values: str
    """Projection whose last outputs are attention's values, head by head."""
    out_proj: str
    """Output projection of attention; a norm follows it if it is not `attn_out`."""
    interleaved: bool = False
    """True if the outputs of `values` are query, key and value of each head in turn."""
    positions: bool = False
    """True if the model adds position embeddings to those of tokens."""
    parallel: bool | str = False
    """True if the MLP reads the stream before attention; a text names the setting that says so."""
    flat: bool = False
    """True if the MLP sees all positions of a batch as one axis, (B T, D)."""
    gain: float = 0.0
    """Number that norms add to their weight before they multiply by it."""
    waits: bool = False
    """True if a forward pass copies numbers to the device, so that no CUDA graph can hold it."""


_GPT2 = Layout(
    blocks="transformer.h",
    norm="transformer.ln_f",
    attn_out="attn.c_proj",
    mlp_in="mlp.c_fc",
    mlp_act="mlp.c_proj",
    mlp_out="mlp.c_proj",
    norm_1="ln_1",
    norm_2="ln_2",
    values="attn.c_attn",
    out_proj="attn.c_proj",
    positions=True,
)
_LLAMA = Layout(
    blocks="model.layers",
    norm="model.norm",
    attn_out="self_attn.o_proj",
    mlp_in="mlp",
    mlp_act="mlp.down_proj",
    mlp_out="mlp.down_proj",
    norm_1="input_layernorm",
    norm_2="post_attention_layernorm",
    values="self_attn.v_proj",
    out_proj="self_attn.o_proj",
)
_GEMMA = replace(_LLAMA, gain=1.0)
#: Gemma 2 and 3 normalise what attention and MLP write.
_GEMMA2 = replace(
    _GEMMA,
    attn_out="post_attention_layernorm",
    norm_2="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
)
#: By the `model_type` of a configuration.
LAYOUTS = {
    "gpt2": _GPT2,
    "gpt_neo": replace(
        _GPT2,
        attn_out="attn.attention.out_proj",
        values="attn.attention.v_proj",
        out_proj="attn.attention.out_proj",
        waits=True,
    ),
    "gpt_neox": Layout(  # Pythia
        blocks="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        attn_out="attention.dense",
        mlp_in="mlp.dense_h_to_4h",
        mlp_act="mlp.dense_4h_to_h",
        mlp_out="mlp.dense_4h_to_h",
        norm_1="input_layernorm",
        norm_2="post_attention_layernorm",
        values="attention.query_key_value",
        out_proj="attention.dense",
        interleaved=True,
        parallel="use_parallel_residual",
    ),
    "opt": Layout(
        blocks="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        attn_out="self_attn.out_proj",
        mlp_in="fc1",
        mlp_act="fc2",
        mlp_out="fc2",
        norm_1="self_attn_layer_norm",
        norm_2="final_layer_norm",
        values="self_attn.v_proj",
        out_proj="self_attn.out_proj",
        positions=True,
        flat=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": replace(_LLAMA, values="self_attn.qkv_proj"),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi": replace(
        _LLAMA,
        norm="model.final_layernorm",
        attn_out="self_attn.dense",
        mlp_act="mlp.fc2",
        mlp_out="mlp.fc2",
        norm_2="input_layernorm",
        out_proj="self_attn.dense",
        parallel=True,
    ),
}
#: Names of the MLP's width in configurations; a null one means four times the stream's width.
INNER = ("n_inner", "intermediate_size", "ffn_dim")


class Sizes(NamedTuple):
    """Sizes of a model, known without its weights."""

    n_layer: int
    """Number of transformer blocks."""
    width: int
    """Width of the residual stream."""
    inner: int
    """Width of the MLP's hidden activation."""
    context: int
    """Largest number of positions."""
    vocabulary: int
    """Number of token ids."""

    def width_of(self, stream: str) -> int:
        """Width of a site of the stream."""
        return self.inner if stream == "mlp_act" else self.width


def layout_of(config: Any, where: str) -> Layout:
    """Look up the layout of a model's configuration.

    Args:
        config: A configuration of transformers.
        where: What was read, for the message.

    Raises:
        UserError: The model type is not in the table, or has options that are not supported.
    """
    kind = getattr(config, "model_type", None)
    if kind not in LAYOUTS:
        heads = [str(name) for name in getattr(config, "architectures", None) or ()]
        if heads and not any("CausalLM" in name or "LMHeadModel" in name for name in heads):
            raise UserError(
                f"{where}: {heads[0]} ({kind}) is not a causal language model, such as GPT-2"
            )
        raise UserError(
            f"{where}: model_type={kind!r} is not a known layout: looked for one of "
            f"{', '.join(LAYOUTS)}; a new one is a line of LAYOUTS in models/layouts.py and its "
            "configuration in tests/models/test_layouts.py"
        )
    if kind == "opt" and not getattr(config, "do_layer_norm_before", True):
        raise UserError(
            f"{where}: do_layer_norm_before=false (OPT-350m) normalises after each sum, so that "
            "its streams are no sums: use another OPT"
        )
    return LAYOUTS[kind]


def sizes_of_config(config: Any, where: str) -> Sizes:
    """Sizes of the model of a configuration.

    Args:
        config: A configuration of transformers.
        where: What was read, for the message.

    Raises:
        UserError: The layout is not known.
    """
    layout_of(config, where)
    width = int(config.hidden_size)
    inner = next((getattr(config, n) for n in INNER if getattr(config, n, None)), 4 * width)
    return Sizes(
        n_layer=int(config.num_hidden_layers),
        width=width,
        inner=int(inner),
        context=int(config.max_position_embeddings),
        vocabulary=int(config.vocab_size),
    )


def layout_of_model(model: nn.Module) -> Layout:
    """Look up the layout of a loaded model; see `layout_of`."""
    return layout_of(getattr(model, "config", None), type(model).__name__)


def final_norm(model: nn.Module) -> Norm:
    """Norm before the unembedding."""
    layout = layout_of_model(model)
    return Norm.of(model.get_submodule(layout.norm), layout.gain)


def matrix(layer: nn.Module) -> Tensor:
    """Weight (in, out) of a linear layer, as in `rows @ weight`.

    `nn.Linear` stores (out, in), GPT-2's Conv1D stores (in, out).
    """
    weight = layer.get_parameter("weight").detach()
    return weight.t() if isinstance(layer, nn.Linear) else weight


def embeddings(model: CausalLM) -> Tensor:
    """Token embeddings (V, D) of a language model."""
    return model.get_input_embeddings().get_parameter("weight")


def unembedding(model: CausalLM) -> nn.Module:
    """Linear layer of a language model that gives the logits (..., V) of rows (..., D)."""
    return of_type(model.get_output_embeddings(), nn.Module)  # a causal language model has one


def moved(model: ModelT, device: torch.device) -> ModelT:
    """The model on a device; typed, unlike the `to` of models of transformers."""
    return model.to(device)
