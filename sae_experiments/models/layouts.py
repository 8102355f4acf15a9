"""Where the parts of a language model are: one row of a table for every layout that is proven.

A layout is proven when the laws of ``tests/test_layouts.py`` hold for it; every other model type is
refused, since a part found in the wrong place gives wrong numbers without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sae_experiments.errors import UserError


@dataclass(frozen=True, slots=True)
class Layout:
    """Dotted paths to the parts of a model type.

    Args:
        blocks: list of transformer blocks, from the model.
        norm: last norm before the unembedding, from the model.
        up: input projection of the MLP, from a block; it reads ``mlp_in``.
        down: output projection of the MLP, from a block; it reads ``mlp_act``, writes ``mlp_out``.
        inner: the configuration's name for the MLP's width; null there means four times the width.
    """

    blocks: str
    norm: str
    up: str
    down: str
    inner: str


#: By the ``model_type`` of a configuration.
LAYOUTS = {
    "gpt2": Layout("transformer.h", "transformer.ln_f", "mlp.c_fc", "mlp.c_proj", "n_inner"),
    "gpt_neo": Layout(
        "transformer.h", "transformer.ln_f", "mlp.c_fc", "mlp.c_proj", "intermediate_size"
    ),
}


def layout_of(config: Any, where: str) -> Layout:
    """The layout of a model's configuration.

    Raises:
        UserError: the model type is not in the table; ``where`` names what was read.
    """
    kind = getattr(config, "model_type", None)
    if kind not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise UserError(f"{where}: model_type={kind!r} is not a known layout: use one of {known}")
    return LAYOUTS[kind]


def layout_of_model(model: nn.Module) -> Layout:
    """The layout of a loaded model; see :func:`layout_of`."""
    return layout_of(getattr(model, "config", None), type(model).__name__)


def matrix(layer: nn.Module) -> Tensor:
    """The weight (in, out) of a linear layer, which rows are multiplied with from the left.

    ``nn.Linear`` stores (out, in), GPT-2's Conv1D stores (in, out).
    """
    weight = layer.weight.detach()
    return weight.t() if isinstance(layer, nn.Linear) else weight
