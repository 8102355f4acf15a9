"""Layouts of language models: one row of a table for every layout that is proven.

A layout is proven when the laws of `tests/models/test_layouts.py` hold for it; every other model
type is refused, since a part found in the wrong place gives wrong numbers without a word. A model
that is loaded is checked once more, by `check_layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError, of_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel as CausalLM
else:
    # Importing transformers takes seconds, and only type checkers read the name.
    CausalLM = nn.Module

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True, slots=True)
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
    flat: bool = False
    """True if the MLP sees all positions of a batch as one axis, (B T, D)."""
    gain: float = 0.0
    """Number that norms add to their weight before they multiply with it."""


_GPT2 = Layout(
    "transformer.h", "transformer.ln_f", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "mlp.c_proj"
)
_LLAMA = Layout(
    "model.layers", "model.norm", "self_attn.o_proj", "mlp", "mlp.down_proj", "mlp.down_proj"
)
#: Gemma 2 and 3 normalise what attention and MLP write.
_GEMMA2 = Layout(
    "model.layers",
    "model.norm",
    "post_attention_layernorm",
    "mlp",
    "mlp.down_proj",
    "post_feedforward_layernorm",
    gain=1.0,
)
#: By the `model_type` of a configuration.
LAYOUTS = {
    "gpt2": _GPT2,
    "gpt_neo": Layout(
        "transformer.h",
        "transformer.ln_f",
        "attn.attention.out_proj",
        "mlp.c_fc",
        "mlp.c_proj",
        "mlp.c_proj",
    ),
    "gpt_neox": Layout(  # Pythia
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
        "mlp.dense_4h_to_h",
    ),
    "opt": Layout(
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        "self_attn.out_proj",
        "fc1",
        "fc2",
        "fc2",
        flat=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "gemma": Layout(
        "model.layers",
        "model.norm",
        "self_attn.o_proj",
        "mlp",
        "mlp.down_proj",
        "mlp.down_proj",
        gain=1.0,
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi": Layout(
        "model.layers", "model.final_layernorm", "self_attn.dense", "mlp", "mlp.fc2", "mlp.fc2"
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


class FinalNorm(NamedTuple):
    """Norm before the unembedding."""

    gain: Tensor
    """Factor of each dimension, (D,)."""
    centred: bool
    """True if it subtracts the mean over the width (LayerNorm), false for RMSNorm."""
    eps: float
    """Added to the variance, or to the mean square."""


def layout_of(config: Any, where: str) -> Layout:
    """Look up the layout of a model's configuration.

    Args:
        config: A configuration of transformers.
        where: What was read, for the message.

    Raises:
        UserError: The model type is not in the table, or is used in a form that is not.
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


def final_norm(model: nn.Module) -> FinalNorm:
    """Gain, centring and epsilon of the norm before the unembedding."""
    layout = layout_of_model(model)
    norm: Any = model.get_submodule(layout.norm)
    gain = norm.weight.float()
    return FinalNorm(
        gain=gain + layout.gain if layout.gain else gain,
        centred=isinstance(norm, nn.LayerNorm),
        eps=norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps,
    )


def matrix(layer: nn.Module) -> Tensor:
    """Weight (in, out) of a linear layer, which rows are multiplied with from the left.

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
