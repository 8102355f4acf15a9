"""Transformer blocks of every layout as linear maps: attention weights and denominators are held.

Queries and keys have no part in it, so that rotary positions, soft caps and sliding windows need
not be known: they are in the attention weights of a pass.

Shape letters: R rows, P prompts, T positions, C width of the residual stream, H heads, E width of a
head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sae_experiments.models.hooks import blocks_of
from sae_experiments.models.layouts import CausalLM, layout_of_model, matrix
from sae_experiments.models.norms import Norm, full


@contextmanager
def eager_attention(model: CausalLM) -> Iterator[None]:
    """Within the context, a model computes attention weights that it can return."""
    kind: Any = model.config._attn_implementation
    model.set_attn_implementation("eager")  # fused kernels do not give their weights away
    try:
        yield
    finally:
        model.set_attn_implementation(kind)


class LinearBlock:
    """One block as a linear map: attention weights and the norms' denominators are held.

        h' = h + attention(norm_1(h)) + mlp(norm_2(r))

    where r is `h + attention(norm_1(h))`, or h itself in blocks that are `parallel`. Some layouts
    norm what attention writes once more.

    Args:
        model: A causal language model of a known layout.
        number: Number of the block, from 0.
    """

    def __init__(self, model: CausalLM, number: int) -> None:
        layout, config = layout_of_model(model), model.config
        block = blocks_of(model)[number]
        setting = layout.parallel
        self.parallel = bool(getattr(config, setting) if isinstance(setting, str) else setting)
        self.norm_1 = Norm.of(block.get_submodule(layout.norm_1), layout.gain)
        self.norm_2 = Norm.of(block.get_submodule(layout.norm_2), layout.gain)
        after = layout.attn_out != layout.out_proj
        #: Norm of what attention writes.
        self.norm_out = (
            Norm.of(block.get_submodule(layout.attn_out), layout.gain) if after else None
        )
        self.n_head = int(config.num_attention_heads)
        n_values = int(getattr(config, "num_key_value_heads", None) or self.n_head)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // self.n_head)
        values = block.get_submodule(layout.values)
        W = full(matrix(values))
        b = _bias_of(values, W)
        if layout.interleaved:
            W, b = (x.unflatten(-1, (n_values, 3, width))[..., 2, :] for x in (W, b))
        else:
            W, b = (x[..., -n_values * width :].unflatten(-1, (n_values, width)) for x in (W, b))
        groups = self.n_head // n_values
        #: Weight (C, H, E) and bias (H, E) of the values.
        self.W_v = W.repeat_interleave(groups, -2)
        self.b_v = b.repeat_interleave(groups, -2)
        out = block.get_submodule(layout.out_proj)
        W_o = full(matrix(out))
        #: Weight (H, E, C) and bias (C,) of the output.
        self.W_o = W_o.unflatten(0, (self.n_head, width))
        self.b_o = _bias_of(out, W_o)

    def mix(self, weights: Tensor, n: Tensor) -> Tensor:
        """Output of attention before any norm, with given weights: linear in its input.

        Args:
            weights: Attention weights, (P, H, T, T); P may be 1 for all rows.
            n: Input of the attention, after the norm, (R, T, C).

        Returns:
            (R, T, C).
        """
        mixed = self.mix_heads(weights, n) + self.b_v
        return mixed.flatten(2) @ self.W_o.flatten(0, 1) + self.b_o

    def mix_heads(self, weights: Tensor, n: Tensor) -> Tensor:
        """Values (R, T, H, E) that each head mixes, without their bias; arguments as in `mix`."""
        values = (n @ self.W_v.flatten(1)).unflatten(-1, (self.n_head, -1))
        return torch.einsum("phts,pshe->pthe", weights, values)

    @property
    def mixed_bias(self) -> Tensor:
        """Vector (C,) that `mix` of the norm's bias alone adds at every position.

        The weights of every query sum to 1.
        """
        values = self.norm_1.bias @ self.W_v.flatten(1) + self.b_v.flatten()
        return values @ self.W_o.flatten(0, 1) + self.b_o

    def past_norm_out(self, rstd: Tensor | None, g: Tensor) -> Tensor:
        """Gradients (R, T, C) before the norm of what attention writes, from those after it."""
        return g if self.norm_out is None or rstd is None else self.norm_out.pull_back(rstd, g)

    def pull_back(self, weights: Tensor, rstd: Tensor, g: Tensor) -> Tensor:
        """Gradients at the block's input through attention, from those at the output of `mix`.

        Args:
            weights: Attention weights of one prompt, (H, T, T).
            rstd: Inverse deviation in the first norm, (T, 1).
            g: Gradients, (R, T, C).

        Returns:
            (R, T, C).
        """
        g_out = (g @ self.W_o.flatten(0, 1).t()).unflatten(-1, (self.n_head, -1))
        g_v = torch.einsum("hts,rthe->rshe", weights, g_out).flatten(2)
        return self.norm_1.pull_back(rstd, g_v @ self.W_v.flatten(1).t())


def _bias_of(layer: torch.nn.Module, weight: Tensor) -> Tensor:
    """Bias of a linear layer with a weight (in, out), zeros if it has none."""
    bias: Any = getattr(layer, "bias", None)
    return weight.new_zeros(weight.shape[1]) if bias is None else full(bias)
