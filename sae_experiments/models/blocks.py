"""Transformer blocks of GPT-2 and GPT-Neo, taken apart.

Attention is written as matrices, so that one query alone can be run and pulled back.

Shape letters: R rows, P prompts, T positions, C width of the residual stream, H heads, E width of a
head (C = H E), M neurons of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.models.hooks import Site, blocks_of
from sae_experiments.models.layouts import matrix

if TYPE_CHECKING:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
    from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

#: Order of the sites within a block; the residual stream after a block is its end.
ORDER = {"mlp_in": 0, "mlp_act": 1, "mlp_out": 2, "resid": 3}


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


class Attended(NamedTuple):
    """Attention at every position of P prompts."""

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


def _scale_of(attention: GPT2Attention) -> float:
    """The factor of GPT-2's attention scores; the first releases of transformers 5 store none."""
    known = getattr(attention, "scaling", None)
    if known is not None:
        return float(known)
    scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    if attention.scale_attn_by_inverse_layer_idx:
        scale /= (attention.layer_idx or 0) + 1
    return scale


class Block:
    """One block: `r = h + attention(ln_1(h))`, `h' = r + mlp(ln_2(r))`.

    The MLP is `c_proj(act(c_fc(.)))`.

    Args:
        module: A block of GPT-2 or GPT-Neo.

    Raises:
        UserError: It is another kind of block.
    """

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
        self.ln_2 = parts.ln_2
        self.mlp = parts.mlp
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

    def attend(self, h: Tensor) -> Attended:
        """Attention at every position of a stream (P, T, C)."""
        n = self.ln_1(h)
        q, k, v = (self.heads(n, i) for i in range(3))
        scores = torch.einsum("pthe,pshe->phts", q, k) * self.scale
        weights = scores.masked_fill(~self.allowed(h.shape[1], h.device), -torch.inf).softmax(-1)
        out = torch.einsum("phts,pshe->pthe", weights, v).flatten(2) @ self.W_o + self.b_o
        centred = h - h.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + self.ln_1.eps).rsqrt()
        return Attended(q, k, v, weights, h + out, centred * rstd, rstd)

    def forward(self, h: Tensor) -> Tensor:
        """The stream after the block (R, T, C) from the one before it."""
        r = self.attend(h).stream
        return r + self.mlp(self.ln_2(r))

    def attend_at(self, h: Tensor, position: Tensor) -> Tensor:
        """The stream after attention at one position per row: a single query each.

        Args:
            h: The stream before the block, (R, T, C).
            position: Position of each row, (R,).

        Returns:
            The stream (R, C).
        """
        rows = torch.arange(len(h), device=h.device)
        n = self.ln_1(h)
        q, k, v = self.heads(n[rows, position], 0), self.heads(n, 1), self.heads(n, 2)
        scores = torch.einsum("rhe,rshe->rhs", q, k) * self.scale
        allowed = self.allowed(h.shape[1], h.device)[position]
        weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        out = torch.einsum("rhs,rshe->rhe", weights, v).flatten(1) @ self.W_o
        return h[rows, position] + out + self.b_o

    def pull_back(self, at: Attended, prompt: Tensor, position: Tensor, g: Tensor) -> Tensor:
        """Gradients at the block's input: the backward pass of `attend_at` in closed form.

        With one query, the gradient at the keys and values of the other positions is an outer
        product for each head. So nothing of the size of the keys is multiplied with a matrix, which
        for T = C = 128 takes a hundredth of the work.

        Args:
            at: Attention of the prompts.
            prompt: Prompt of each row, (R,).
            position: Position of each row, (R,).
            g: Gradients at the stream after attention, (R, C).

        Returns:
            Gradients (R, T, C).
        """
        rows = torch.arange(len(g), device=g.device)
        g_out = (g @ self.W_o.t()).view(len(g), self.n_head, -1)
        weights, q = at.weights[prompt, :, position], at.q[prompt, position]
        g_weights = torch.einsum("rhe,rshe->rhs", g_out, at.v[prompt])
        g_scores = weights * (g_weights - (weights * g_weights).sum(-1, keepdim=True)) * self.scale
        g_q = torch.einsum("rhs,rshe->rhe", g_scores, at.k[prompt])
        W_q, W_k, W_v = (w.view(w.shape[0], self.n_head, -1) for w in self.W)
        vectors = torch.cat(
            [torch.einsum("rhe,che->rhc", q, W_k), torch.einsum("rhe,che->rhc", g_out, W_v)], 1
        )
        g_n = torch.cat([g_scores, weights], 1).transpose(1, 2) @ vectors
        g_n[rows, position] += torch.einsum("rhe,che->rc", g_q, W_q)
        g_n *= self.ln_1.weight
        normed = at.normed[prompt]
        g_n -= g_n.mean(-1, keepdim=True) + normed * (g_n * normed).mean(-1, keepdim=True)
        g_n *= at.rstd[prompt]
        g_n[rows, position] += g
        return g_n

    def inside(self, r: Tensor, stream: str) -> Tensor:
        """The block's site `stream` (..., D), from the stream after attention (..., C)."""
        n = self.ln_2(r)
        if stream == "mlp_in":
            return n
        acts = self.mlp.act(self.mlp.c_fc(n))
        if stream == "mlp_act":
            return acts
        out = self.mlp.c_proj(acts)
        return out if stream == "mlp_out" else r + out

    @property
    def w_in(self) -> Tensor:
        """The MLP's input matrix (C, M), which rows are multiplied with from the left."""
        return matrix(self.mlp.c_fc)

    @property
    def w_out(self) -> Tensor:
        """The MLP's output matrix (M, C)."""
        return matrix(self.mlp.c_proj)


def blocks_between(model: nn.Module, upstream: Site, downstream: Site) -> list[Block]:
    """Blocks that a change at one site passes on its way to another, which the last one holds."""
    return [Block(m) for m in blocks_of(model)[upstream.layer : downstream.layer]]


def check_order(upstream: Site, downstream: Site) -> None:
    """Raise `UserError` unless the upstream site comes before the downstream one."""
    for role, site in (("upstream", upstream), ("downstream", downstream)):
        if site.stream not in ORDER:
            raise UserError(
                f"{role}.site={site} cannot be part of a circuit: use one of {', '.join(ORDER)}"
            )
    if (upstream.layer, ORDER[upstream.stream]) >= (downstream.layer, ORDER[downstream.stream]):
        raise UserError(
            f"upstream.site={upstream} does not come before downstream.site={downstream}: "
            "nothing at the one can reach the other"
        )
