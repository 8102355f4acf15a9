"""Dense codes on a device, in as few passes over (B, F) as can be.

There, such a pass takes about as long as the encoder's product, and PyTorch makes up to 33 of them
in a step. Here the code, what its penalty counts and how often latents fire come from a single one,
and all gradients with respect to pre-activations from another.

Shape letters: B rows, D `d_in`, F latents.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_experiments.errors import of_type
from sae_experiments.saes import static
from sae_experiments.saes.ops import fast_matmul
from sae_experiments.saes.types import Codes, DenseForm


class FusedCode(NamedTuple):
    """A dense code with its sums."""

    codes: Codes
    """The code z (B, F)."""
    gate: Tensor
    """The gate (B, F) of `gated`; z itself for other forms."""
    counted: Tensor
    """Sum over the batch of what the penalty counts, a differentiable scalar."""


def can_fuse(x: Tensor) -> bool:
    """True within `static.shapes()`, if the kernels run on the device of x."""
    return static.on() and static.kernels_for(x) is not None


def dense_code(x: Tensor, weight: Tensor, bias: Tensor, pre: Tensor, form: DenseForm) -> FusedCode:
    """Code of the pre-activations `x W^T + bias`, differentiable in all but `pre`.

    Args:
        x: Rows (B, D).
        weight: (F, D).
        bias: (F,).
        pre: The pre-activations (B, F), computed before without a graph.
        form: How the code follows from them.
    """
    values, gate, counted, fires = _DenseCode.apply(x, weight, bias, pre, *form)
    return FusedCode(Codes(values, None, fires), gate if form.name == "gated" else values, counted)


class _DenseCode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, pre: Tensor, *form: Any
    ) -> tuple[Tensor, ...]:
        of = DenseForm(*form)
        values, gate, counted, fires = _kernels(pre).dense_code(pre, of)
        ctx.save_for_backward(x, weight, pre, of.scale, of.shift, of.bias)
        ctx.form = of
        ctx.mark_non_differentiable(fires)
        if of.name != "gated":
            ctx.mark_non_differentiable(gate)
        return values, gate, counted, fires

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, pre, *parameters = ctx.saved_tensors
        form = ctx.form._replace(scale=parameters[0], shift=parameters[1], bias=parameters[2])
        grad, of_pre, of_scale, of_bias = _kernels(pre).dense_gradient(pre, form, *grads[:3])
        with fast_matmul():
            of_x = grad @ weight if ctx.needs_input_grad[0] else None
            of_weight = grad.t() @ x if ctx.needs_input_grad[1] else None
        of_form: list[Tensor | None] = [None, None, None]
        if form.scale is not None:
            of_form[0] = of_scale
            if form.name == "gated":
                of_form[1:] = [-form.scale * of_bias, of_bias]
        return of_x, of_weight, of_pre, None, None, *of_form, None, None


def _kernels(t: Tensor) -> ModuleType:
    return of_type(static.kernels_for(t), ModuleType)
