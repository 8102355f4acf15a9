"""Blocks of GPT-2 and GPT-Neo, taken apart for circuits.

Attention is written as matrices, so that one query alone can be run and pulled back.

Shape letters: R rows, P prompts, T positions, C width of the residual stream, H heads, E width of a
head (C = H E), M neurons of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.models.blocks import Attended, Block
from sae_experiments.models.layouts import matrix
from sae_experiments.models.norms import Norm

if TYPE_CHECKING:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
    from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

#: Model types whose blocks are of this kind.
PLAIN_KINDS = ("gpt2", "gpt_neo")


class MLP(Protocol):
    """An MLP of GPT-2 or GPT-Neo, `c_proj(act(c_fc(.)))`."""

    c_fc: nn.Module
    act: Callable[[Tensor], Tensor]
    c_proj: nn.Module

    def __call__(self, x: Tensor, /) -> Tensor:
        """Output (..., C) for rows (..., C)."""
        ...


class _Parts(Protocol):
    """The parts that blocks of GPT-2 and GPT-Neo have in common."""

    ln_1: nn.LayerNorm
    attn: nn.Module
    ln_2: nn.LayerNorm
    mlp: MLP


@dataclass(frozen=True, slots=True)
class AttendedPlain(Attended):
    """Attention at every position of P prompts, with what its backward pass needs."""

    block: PlainBlock
    q: Tensor
    """Queries, (P, T, H, E)."""
    k: Tensor
    """Keys, (P, T, H, E)."""
    v: Tensor
    """Values, (P, T, H, E)."""
    weights: Tensor
    """Attention weights, (P, H, T, T)."""
    stream: Tensor
    """Output of the attention plus the stream before it, (P, T, C)."""
    normed: Tensor
    """Input of the layer norm, centred and scaled to unit variance, (P, T, C)."""
    rstd: Tensor
    """Its inverse standard deviation, (P, T, 1)."""

    def pull_back(self, prompt: Tensor, position: Tensor, g: Tensor) -> Tensor:
        """Gradients at the block's input, in closed form.

        With one query, the gradient at the keys and values of the other positions is an outer
        product for each head. So nothing of the size of the keys is multiplied with a matrix, which
        for T = C = 128 takes a hundredth of the work.
        """
        rows = torch.arange(len(g), device=g.device)
        g_out = (g @ self.block.W_o.t()).view(len(g), self.block.n_head, -1)
        weights, q = self.weights[prompt, :, position], self.q[prompt, position]
        g_weights = torch.einsum("rhe,rshe->rhs", g_out, self.v[prompt])
        g_scores = (
            weights * (g_weights - (weights * g_weights).sum(-1, keepdim=True)) * self.block.scale
        )
        g_q = torch.einsum("rhs,rshe->rhe", g_scores, self.k[prompt])
        W_q, W_k, W_v = (w.view(w.shape[0], self.block.n_head, -1) for w in self.block.W)
        vectors = torch.cat(
            [torch.einsum("rhe,che->rhc", q, W_k), torch.einsum("rhe,che->rhc", g_out, W_v)], 1
        )
        g_n = torch.cat([g_scores, weights], 1).transpose(1, 2) @ vectors
        g_n[rows, position] += torch.einsum("rhe,che->rc", g_q, W_q)
        g_n *= self.block.ln_1.weight
        normed = self.normed[prompt]
        g_n -= g_n.mean(-1, keepdim=True) + normed * (g_n * normed).mean(-1, keepdim=True)
        g_n *= self.rstd[prompt]
        g_n[rows, position] += g
        return g_n


def _scale_of(attention: GPT2Attention) -> float:
    """The factor of GPT-2's attention scores; the first releases of transformers 5 store none."""
    known = getattr(attention, "scaling", None)
    if known is not None:
        return float(known)
    scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    if attention.scale_attn_by_inverse_layer_idx:
        scale /= (attention.layer_idx or 0) + 1
    return scale


class PlainBlock(Block):
    """A block whose MLP is `c_proj(act(c_fc(.)))`.

    Args:
        module: A block of GPT-2 or GPT-Neo.

    Raises:
        UserError: It is another kind of block.
    """

    pull_back_copies = 12

    def __init__(self, module: nn.Module) -> None:
        known = all(hasattr(module, name) for name in ("ln_1", "attn", "ln_2", "mlp"))
        known = known and all(hasattr(module.mlp, name) for name in ("c_fc", "act", "c_proj"))
        if not known or hasattr(module, "crossattention"):
            raise UserError(
                f"{type(module).__name__} is not a block of GPT-2 or GPT-Neo "
                "(ln_1, attn, ln_2, mlp.c_fc, mlp.c_proj): not supported"
            )
        parts = cast("_Parts", module)
        self.ln_1 = parts.ln_1
        self.norm_2_module = parts.ln_2
        self.norm_2 = Norm.of(parts.ln_2)
        self._mlp = parts.mlp
        self.W: tuple[Tensor, ...]
        self.b: tuple[Tensor, ...]
        self.mask: Tensor | None = None
        inner: Any = getattr(parts.attn, "attention", parts.attn)
        if hasattr(inner, "c_attn"):
            self._read_gpt2(inner)
        elif all(hasattr(inner, name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")):
            self._read_gpt_neo(inner)
        else:
            raise UserError(
                f"{type(inner).__name__} is not an attention of GPT-2 or GPT-Neo: not supported"
            )
        self.n_head: int = inner.num_heads

    def _read_gpt2(self, attention: GPT2Attention) -> None:
        self.W = attention.c_attn.weight.detach().chunk(3, 1)
        self.b = attention.c_attn.bias.detach().chunk(3)
        self.W_o = attention.c_proj.weight.detach()
        self.b_o = attention.c_proj.bias.detach()
        self.scale = _scale_of(attention)

    def _read_gpt_neo(self, attention: GPTNeoSelfAttention) -> None:
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.W = tuple(layer.weight.detach().t() for layer in layers)
        self.b = tuple(
            layer.weight.new_zeros(layer.out_features)
            if layer.bias is None
            else layer.bias.detach()
            for layer in layers
        )
        self.W_o = attention.out_proj.weight.detach().t()
        self.b_o = attention.out_proj.bias.detach()
        self.scale = 1.0  # GPT-Neo does not scale
        # Local attention reaches no further than a window.
        self.mask = attention.get_buffer("bias")[0, 0]

    def allowed(self, length: int, device: torch.device) -> Tensor:
        """Mask (T, T) of the positions that each query (row) may attend to."""
        if self.mask is not None:
            return self.mask[:length, :length].bool().to(device)
        return torch.ones(length, length, dtype=torch.bool, device=device).tril()

    def heads(self, x: Tensor, which: int) -> Tensor:
        """Queries (0), keys (1) or values (2) of normed rows (..., C) as (..., H, E)."""
        projected = x @ self.W[which] + self.b[which]
        return projected.view(*projected.shape[:-1], self.n_head, -1)

    def attend(self, h: Tensor) -> AttendedPlain:
        n = self.ln_1(h)
        q, k, v = (self.heads(n, i) for i in range(3))
        scores = torch.einsum("pthe,pshe->phts", q, k) * self.scale
        weights = scores.masked_fill(~self.allowed(h.shape[1], h.device), -torch.inf).softmax(-1)
        out = torch.einsum("phts,pshe->pthe", weights, v).flatten(2) @ self.W_o + self.b_o
        centred = h - h.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + self.ln_1.eps).rsqrt()
        return AttendedPlain(self, q, k, v, weights, h + out, centred * rstd, rstd)

    def attend_at(self, h: Tensor, position: Tensor) -> Tensor:
        rows = torch.arange(len(h), device=h.device)
        n = self.ln_1(h)
        q, k, v = self.heads(n[rows, position], 0), self.heads(n, 1), self.heads(n, 2)
        scores = torch.einsum("rhe,rshe->rhs", q, k) * self.scale
        allowed = self.allowed(h.shape[1], h.device)[position]
        weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        out = torch.einsum("rhs,rshe->rhe", weights, v).flatten(1) @ self.W_o
        return h[rows, position] + out + self.b_o

    def hidden(self, n: Tensor) -> Tensor:
        return self._mlp.act(self._mlp.c_fc(n))

    def written(self, acts: Tensor) -> Tensor:
        return self._mlp.c_proj(acts)

    def to_neurons(self, rows: Tensor, x: Tensor | None) -> Tensor:
        return rows @ matrix(self._mlp.c_fc) * self._slope(x)

    def from_neurons(self, rows: Tensor, x: Tensor | None) -> Tensor:
        return (rows * self._slope(x)) @ matrix(self._mlp.c_fc).t()

    def _slope(self, x: Tensor | None) -> Tensor | float:
        """Mean derivative (M,) of the MLP's non-linearity per neuron, over its inputs (..., C)."""
        if x is None:
            return 1.0
        with torch.enable_grad():
            pre = self._mlp.c_fc(x).detach().requires_grad_()
            return torch.autograd.grad(self._mlp.act(pre).sum(), pre)[0].flatten(0, -2).mean(0)

    @property
    def w_out(self) -> Tensor:
        return matrix(self._mlp.c_proj)
