"""Transformer blocks of Llama's kind, taken apart for circuits.

Attention is the model's own module, so that rotary positions, grouped queries and windows need no
code here. The MLP is `down(act(gate(.)) * up(.))`.

Shape letters: R rows, P prompts, T positions, C width of the residual stream, M neurons of the MLP.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.models.blocks import Attended, Block
from sae_experiments.models.hooks import blocks_of
from sae_experiments.models.layouts import CausalLM, layout_of_model, matrix
from sae_experiments.models.norms import Norm

#: Model types whose blocks are of this kind.
GATED_KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma")


class _Reached(Exception):
    """A module that was waited for is about to run."""


@dataclass(frozen=True, slots=True)
class AttendedGated(Attended):
    """Attention at every position of P prompts; its backward pass runs it once more."""

    block: GatedBlock
    before: Tensor
    """The stream before the block, (P, T, C)."""
    stream: Tensor
    """Output of the attention plus the stream before it, (P, T, C)."""

    def pull_back(self, prompt: Tensor, position: Tensor, g: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = self.before[prompt].clone().requires_grad_()
            return torch.autograd.grad(self.block.attend_at(leaf, position), leaf, g)[0]


class GatedBlock(Block):
    """A block whose MLP is `down(act(gate(.)) * up(.))`.

    Args:
        model: A language model of one of `GATED_KINDS`.
        number: Number of the block, from 0.
    """

    pull_back_copies = 60

    def __init__(self, model: CausalLM, number: int) -> None:
        layout = layout_of_model(model)
        self.model = model
        self.module = blocks_of(model)[number]
        self.norm_2_module = self.module.get_submodule(layout.norm_2)
        self.norm_2 = Norm.of(self.norm_2_module, layout.gain)
        self._mlp: Any = self.module.get_submodule(layout.mlp_in)
        self._arguments: tuple[int, dict[str, Any]] | None = None

    def _arguments_for(self, h: Tensor) -> dict[str, Any]:
        """Arguments that the model passes to this block with a stream of this length."""
        length = h.shape[1]
        if self._arguments is None or self._arguments[0] != length:
            given: dict[str, Any] = {}

            def keep(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
                given.update(kwargs)
                raise _Reached

            handle = self.module.register_forward_pre_hook(keep, with_kwargs=True)
            tokens = torch.zeros(1, length, dtype=torch.long, device=h.device)
            try:
                with torch.no_grad(), suppress(_Reached):
                    self.model(input_ids=tokens, use_cache=False)
            finally:
                handle.remove()
            given.pop("hidden_states", None)
            self._arguments = (length, given)
        return self._arguments[1]

    def _after_attention(self, h: Tensor) -> Tensor:
        """The stream after attention (R, T, C) from the one before the block, differentiable."""
        seen: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _Reached

        arguments = self._arguments_for(h)
        handle = self.norm_2_module.register_forward_pre_hook(keep)
        try:
            with suppress(_Reached):
                self.module(h, **arguments)
        finally:
            handle.remove()
        return seen[0]

    def attend(self, h: Tensor) -> AttendedGated:
        return AttendedGated(self, h, self._after_attention(h))

    def attend_at(self, h: Tensor, position: Tensor) -> Tensor:
        return self._after_attention(h)[torch.arange(len(h), device=h.device), position]

    def hidden(self, n: Tensor) -> Tensor:
        return self._mlp.act_fn(self._mlp.gate_proj(n)) * self._mlp.up_proj(n)

    def written(self, acts: Tensor) -> Tensor:
        return self._mlp.down_proj(acts)

    @property
    def w_out(self) -> Tensor:
        return matrix(self._mlp.down_proj)

    def to_neurons(self, rows: Tensor, x: Tensor | None) -> Tensor:
        gate, up = self._weights(x)
        through_up = rows @ matrix(self._mlp.up_proj) * up
        return (
            through_up if gate is None else through_up + rows @ matrix(self._mlp.gate_proj) * gate
        )

    def from_neurons(self, rows: Tensor, x: Tensor | None) -> Tensor:
        gate, up = self._weights(x)
        read = (rows * up) @ matrix(self._mlp.up_proj).t()
        return read if gate is None else read + (rows * gate) @ matrix(self._mlp.gate_proj).t()

    def _weights(self, x: Tensor | None) -> tuple[Tensor | None, Tensor | float]:
        """Mean derivatives (M,) of the activations by the outputs of `gate` and of `up`."""
        if x is None:
            return None, 1.0
        with torch.enable_grad():
            gate = self._mlp.gate_proj(x).detach().requires_grad_()
            up = self._mlp.up_proj(x).detach().requires_grad_()
            acts = (self._mlp.act_fn(gate) * up).sum()
            by_gate, by_up = torch.autograd.grad(acts, (gate, up))
        return by_gate.flatten(0, -2).mean(0), by_up.flatten(0, -2).mean(0)
