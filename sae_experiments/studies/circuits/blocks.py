"""Transformer blocks of GPT-2 and GPT-Neo, taken apart: attention as matrices, so that one query can be run, and pulled back, by itself.

Shape letters: R rows, T positions, C width of the residual stream, H heads, E width of a head (C = H E).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.models.hooks import Site, blocks_of
from sae_experiments.models.layouts import matrix

#: Where in a block a site lies; the residual stream after a block is its end.
ORDER = {"mlp_in": 0, "mlp_act": 1, "mlp_out": 2, "resid": 3}


class Attended(NamedTuple):
    """Attention at every position of P prompts: queries, keys, values (P, T, H, E), weights (P, H, T, T), output plus stream (P, T, C)."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    stream: Tensor
    normed: Tensor  # the layer norm's input, centred and scaled to unit variance, (P, T, C)
    rstd: Tensor  # what it was scaled with, (P, T, 1)


def _scale_of(attention: nn.Module) -> float:
    """The factor of GPT-2's attention scores; the first releases of transformers 5 store none."""
    known = getattr(attention, "scaling", None)
    if known is not None:
        return float(known)
    scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    if attention.scale_attn_by_inverse_layer_idx:
        scale /= attention.layer_idx + 1
    return scale


class Block:
    """One block: ``r = h + attention(ln_1(h))``, ``h' = r + mlp(ln_2(r))``, the MLP being ``c_proj(act(c_fc(.)))``.

    Raises :class:`UserError` for a block that is neither GPT-2's nor GPT-Neo's.
    """

    def __init__(self, module: nn.Module) -> None:
        attention = getattr(module, "attn", None)
        inner = getattr(attention, "attention", attention)
        mlp = getattr(module, "mlp", None)
        names = (hasattr(module, n) for n in ("ln_1", "ln_2"))
        if (
            not all(names)
            or any(not hasattr(mlp, n) for n in ("c_fc", "act", "c_proj"))
            or hasattr(module, "crossattention")
        ):
            raise UserError(
                f"{type(module).__name__} is not a block of GPT-2 or GPT-Neo (ln_1, attn, ln_2, mlp.c_fc, mlp.c_proj): not supported"
            )
        self.ln_1, self.ln_2, self.mlp = module.ln_1, module.ln_2, mlp
        self.mask: Tensor | None = None
        if hasattr(inner, "c_attn"):
            self.W = inner.c_attn.weight.detach().chunk(3, 1)
            self.b = inner.c_attn.bias.detach().chunk(3)
            self.W_o, self.b_o, self.scale = (
                inner.c_proj.weight.detach(),
                inner.c_proj.bias.detach(),
                _scale_of(inner),
            )
        elif all(hasattr(inner, n) for n in ("q_proj", "k_proj", "v_proj", "out_proj")):
            parts = (inner.q_proj, inner.k_proj, inner.v_proj)
            self.W = tuple(p.weight.detach().t() for p in parts)
            self.b = tuple(
                p.weight.new_zeros(p.weight.shape[0]) if p.bias is None else p.bias.detach()
                for p in parts
            )
            self.W_o, self.b_o, self.scale = (
                inner.out_proj.weight.detach().t(),
                inner.out_proj.bias.detach(),
                1.0,
            )  # GPT-Neo does not scale
            self.mask = inner.bias[0, 0]  # local attention looks no further than a window
        else:
            raise UserError(
                f"{type(inner).__name__} is not an attention of GPT-2 or GPT-Neo: not supported"
            )
        self.n_head = inner.num_heads

    def allowed(self, length: int, device: torch.device) -> Tensor:
        """Which positions (T, T) a query (row) may look at."""
        if self.mask is not None:
            return self.mask[:length, :length].bool().to(device)
        return torch.ones(length, length, dtype=torch.bool, device=device).tril()

    def heads(self, x: Tensor, which: int) -> Tensor:
        """Queries (0), keys (1) or values (2) of normed rows (..., C) as (..., H, E)."""
        found = x @ self.W[which] + self.b[which]
        return found.view(*found.shape[:-1], self.n_head, -1)

    def attend(self, h: Tensor) -> Attended:
        """Attention at every position of ``h`` (P, T, C)."""
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
        """The stream after attention at one position (R,) of every row of ``h`` (R, T, C), as (R, C): one query a row."""
        rows = torch.arange(len(h), device=h.device)
        n = self.ln_1(h)
        q, k, v = self.heads(n[rows, position], 0), self.heads(n, 1), self.heads(n, 2)
        scores = torch.einsum("rhe,rshe->rhs", q, k) * self.scale
        allowed = self.allowed(h.shape[1], h.device)[position]
        weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        return (
            h[rows, position]
            + torch.einsum("rhs,rshe->rhe", weights, v).flatten(1) @ self.W_o
            + self.b_o
        )

    def pull_back(self, at: Attended, prompt: Tensor, position: Tensor, g: Tensor) -> Tensor:
        """Gradients (R, T, C) at the block's input from gradients ``g`` (R, C) at the stream after attention, at one position of a prompt each.

        The backward pass of :meth:`attend_at` in closed form. One query makes the gradient at the keys and values of the other positions an
        outer product for each head, so nothing of the size of the keys is multiplied with a matrix: for T = C = 128 a hundredth of the work.
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
        """The block's site ``stream`` (..., D) from the stream after attention (..., C)."""
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
        """The MLP's input matrix (C, M): rows times it are pre-activations."""
        return matrix(self.mlp.c_fc)

    @property
    def w_out(self) -> Tensor:
        """The MLP's output matrix (M, C)."""
        return matrix(self.mlp.c_proj)


def blocks_between(model: nn.Module, upstream: Site, downstream: Site) -> list[Block]:
    """The blocks that a change at ``upstream`` passes on its way to ``downstream``, the last of which holds ``downstream``."""
    return [Block(m) for m in blocks_of(model)[upstream.layer : downstream.layer]]


def check_order(upstream: Site, downstream: Site) -> None:
    """Raises :class:`UserError` unless ``upstream`` comes before ``downstream``."""
    for role, site in (("upstream", upstream), ("downstream", downstream)):
        if site.stream not in ORDER:
            raise UserError(
                f"{role}.site={site} cannot be part of a circuit: use one of {', '.join(ORDER)}"
            )
    if (upstream.layer, ORDER[upstream.stream]) >= (downstream.layer, ORDER[downstream.stream]):
        raise UserError(
            f"upstream.site={upstream} does not come before downstream.site={downstream}: nothing at the one can reach the other"
        )


def n_blocks(model: nn.Module) -> int:
    """How many blocks the model has."""
    blocks: Sequence[nn.Module] = blocks_of(model)
    return len(blocks)
