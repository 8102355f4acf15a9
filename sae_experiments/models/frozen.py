"""A language model at given prompts, to be run again with some of its parts held or replaced.

Attention weights and the denominators of the norms can be held at the values they have in the clean
run. With both held and the MLPs replaced by something linear, the logits are linear in the
embeddings: the local replacement model of Ameisen et al. 2025.

Shape letters: P prompts, R rows, T positions, C width of the residual stream, H heads, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.models.blocks import Block, inverse_deviation, norm_with
from sae_experiments.models.hooks import Site, blocks_of, capture
from sae_experiments.models.layouts import CausalLM, layout_of_model, unembedding

#: Largest relative difference of the logits computed here from the model's own.
TOLERANCE = 1e-3


class Clean(NamedTuple):
    """Values of one block in the clean run."""

    weights: Tensor
    """Attention weights, (P, H, T, T)."""
    rstd_1: Tensor
    """Inverse deviation in the norm before attention, (P, T, 1)."""
    rstd_2: Tensor
    """Inverse deviation in the norm before the MLP, (P, T, 1)."""
    mlp_in: Tensor
    """Input of the MLP, (P, T, C)."""
    mlp_out: Tensor
    """Output of the MLP, (P, T, C)."""


class Rerun(NamedTuple):
    """One run with parts held or replaced."""

    logits: Tensor
    """(R, T, V), or (R, 1, V) if only the last position was asked for."""
    mlp_in: list[Tensor]
    """Inputs of the MLPs, (R, T, C) each."""


class FrozenModel:
    """GPT-2 or GPT-Neo at prompts (P, T).

    Args:
        model: The language model.
        tokens: Token ids (P, T).

    Raises:
        UserError: The model is of another kind, or these blocks do not give its logits.
    """

    @torch.no_grad()
    def __init__(self, model: CausalLM, tokens: Tensor) -> None:
        self.model = model
        self.tokens = tokens
        self.blocks = [Block(module) for module in blocks_of(model)]
        norm = cast("nn.LayerNorm", model.get_submodule(layout_of_model(model).norm))
        self.norm = norm
        self.unembed = unembedding(model)
        with capture(model, [Site("resid", 0)]) as seen:
            wanted = model(input_ids=tokens, use_cache=False).logits
        h = self.embedded = seen[Site("resid", 0)]
        self.clean: list[Clean] = []
        for block in self.blocks:
            attended = block.attend(h)
            x = block.ln_2(attended.stream)
            y = block.mlp(x)
            rstd_2 = inverse_deviation(block.ln_2, attended.stream)
            self.clean.append(Clean(attended.weights, attended.rstd, rstd_2, x, y))
            h = attended.stream + y
        self.final = h
        self.rstd_f = inverse_deviation(norm, h)
        self.logits = self.unembed(norm(h))
        error = float((self.logits - wanted).norm() / wanted.norm().clamp_min(1e-12))
        if not error <= TOLERANCE:
            raise UserError(
                f"{type(model).__name__}: its blocks do not compute its logits (relative error "
                f"{error:.2g}): an option of the model is not known here"
            )

    @torch.no_grad()
    def run(
        self,
        mlp: Callable[[int, Tensor], Tensor],
        *,
        rows: int | None = None,
        hold_attention: bool,
        hold_norms: bool,
        last: bool = False,
    ) -> Rerun:
        """Run the model with other MLPs.

        Args:
            mlp: Output (R, T, C) of the MLP of a block, from its number and its input (R, T, C).
            rows: Copies of the only prompt to run. None: each prompt once.
            hold_attention: Attention weights are those of the clean run.
            hold_norms: Denominators of the norms are those of the clean run.
            last: Logits of the last position alone.
        """
        h = self.embedded
        if rows is not None:
            h = h.expand(rows, -1, -1)
        inputs = []
        for k, (block, clean) in enumerate(zip(self.blocks, self.clean, strict=True)):
            if hold_attention:
                n = norm_with(block.ln_1, h, clean.rstd_1) if hold_norms else block.ln_1(h)
                r = h + block.mix(clean.weights, n)
            elif hold_norms:
                raise ValueError("norms are held only together with attention")
            else:
                r = block.attend(h).stream
            x = norm_with(block.ln_2, r, clean.rstd_2) if hold_norms else block.ln_2(r)
            inputs.append(x)
            h = r + mlp(k, x)
        rstd = self.rstd_f
        if last:
            h, rstd = h[:, -1:], rstd[:, -1:]
        n = norm_with(self.norm, h, rstd) if hold_norms else self.norm(h)
        return Rerun(self.unembed(n), inputs)
