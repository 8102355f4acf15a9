"""The part of a language model between two sites.

It is run for changed activations, and gradients are pulled back through it from one unit at one
position per row.

Shape letters: P prompts, R rows (one target or one changed prompt each), T positions, C width of
the residual stream, D width of a site.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError, of_type
from sae_experiments.models.blocks import Attended, Block, check_order
from sae_experiments.models.gated_blocks import GATED_KINDS, GatedBlock
from sae_experiments.models.hooks import Site, activations, blocks_of
from sae_experiments.models.plain_blocks import PLAIN_KINDS, PlainBlock

if TYPE_CHECKING:
    from sae_experiments.models.layouts import CausalLM

#: Model types whose blocks can be taken apart.
KINDS = (*PLAIN_KINDS, *GATED_KINDS)
#: Maps downstream activations (R, D) to one number per row, (R,), such as a pre-activation.
Read = Callable[[Tensor], Tensor]


def block_of(model: nn.Module, number: int) -> Block:
    """A block of a model by its number, from 0.

    Raises:
        UserError: This kind of block is not supported.
    """
    if getattr(getattr(model, "config", None), "model_type", None) in GATED_KINDS:
        return GatedBlock(cast("CausalLM", model), number)
    return PlainBlock(blocks_of(model)[number])


class Path:
    """The path from an upstream to a downstream site.

    A *state* (P, T, C) is the tensor that upstream latents add to. It is the residual stream after
    the upstream block if the way there is linear (`resid`, `mlp_out`, and `mlp_act`, whose decoder
    rows are carried through the output matrix by `carried`), and the site itself for `mlp_in`.
    Everything before a state is constant.

    Args:
        model: The language model.
        upstream: The upstream site.
        downstream: The downstream site.
    """

    def __init__(self, model: nn.Module, upstream: Site, downstream: Site) -> None:
        check_order(upstream, downstream)
        self.model = model
        self.upstream = upstream
        self.downstream = downstream
        # The blocks that a change passes; the last one holds the downstream site.
        blocks = [block_of(model, k) for k in range(upstream.layer, downstream.layer)]
        self.middle = blocks[:-1]
        self.last = blocks[-1] if blocks else None
        self.stream = Site("resid", upstream.layer)
        self._source = block_of(model, upstream.layer - 1) if upstream.layer else None

    @property
    def source(self) -> Block:
        """The block of the upstream site, which is inside a block."""
        return of_type(self._source, Block)

    @property
    def sites(self) -> list[Site]:
        """Sites whose activations the path needs."""
        return list(dict.fromkeys([self.upstream, self.stream, self.downstream]))

    @torch.no_grad()
    def carried(self, rows: Tensor) -> Tensor:
        """Directions at the upstream site (n, D) as directions of the state (n, C)."""
        if self.upstream.stream == "mlp_act":
            return rows @ self.source.w_out
        return rows

    def state(self, seen: dict[Site, Tensor]) -> Tensor:
        """The state of prompts, from their activations at `sites`."""
        return seen[self.upstream if self.upstream.stream == "mlp_in" else self.stream]

    def moved(self, seen: dict[Site, Tensor], x: Tensor) -> dict[Site, Tensor]:
        """The activations with `x` (P, T, D) at the upstream site.

        The stream after its block changes accordingly.
        """
        before = seen[self.upstream]
        if self.upstream.stream == "mlp_in":
            change = self.source.mlp(x) - self.source.mlp(before)
        else:
            change = self.carried(x - before)
        moved = seen | {self.upstream: x}
        if self.upstream != self.stream:
            moved[self.stream] = seen[self.stream] + change
        return moved

    def base(self, seen: dict[Site, Tensor]) -> Tensor | None:
        """The stream (P, T, C) without the output of the MLP in the upstream block.

        None if the path does not need that output separately.
        """
        if self.upstream.stream == "mlp_in":
            return seen[self.stream] - self.source.mlp(seen[self.upstream])
        if self.last is None and self.downstream.stream == "mlp_out":
            return seen[self.stream] - seen[self.downstream]
        return None

    def enter(self, state: Tensor, base: Tensor | None) -> Tensor:
        """The residual stream after the upstream block."""
        if self.upstream.stream != "mlp_in":
            return state
        return of_type(base, Tensor) + self.source.mlp(state)

    def value(self, state: Tensor, base: Tensor | None, position: Tensor, read: Read) -> Tensor:
        """Read the downstream activations for changed states, differentiably.

        Args:
            state: States (R, T, C).
            base: The base of each, (R, T, C), see `base`.
            position: Position to read in each row, (R,).
            read: Maps activations (R, D) to numbers.

        Returns:
            Numbers (R,).
        """
        if self.last is None:
            rows = torch.arange(len(state), device=state.device)
            base_here = None if base is None else base[rows, position]
            return read(self._within(state[rows, position], base_here))
        h = self.enter(state, base)
        for block in self.middle:
            h = block.forward(h)
        return read(self.last.inside(self.last.attend_at(h, position), self.downstream.stream))

    def _within(self, state: Tensor, base: Tensor | None) -> Tensor:
        """Downstream activations if both sites lie in one block, with only the MLP between them."""
        if self.downstream.stream == "resid":
            return self.enter(state, base)
        if self.upstream.stream == "mlp_act":
            # The state is the stream, of which the MLP's output is a part.
            return state - of_type(base, Tensor)
        acts = self.source.hidden(state)
        return acts if self.downstream.stream == "mlp_act" else self.source.written(acts)

    def linearise(self, state: Tensor, base: Tensor | None) -> Point:
        """The path at given states (P, T, C), through which gradients can be pulled back."""
        return Point(self, state, base)

    @torch.no_grad()
    def check(self, tokens: Tensor) -> None:
        """Raise `UserError` if the path computes other activations than the model.

        Then the model has an option that this module does not support.
        """
        seen = activations(self.model, tokens, self.sites)
        position = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
        computed: list[Tensor] = []

        def read(x: Tensor) -> Tensor:
            computed.append(x)
            return x[:, 0]

        self.value(self.state(seen), self.base(seen), position, read)
        expected = seen[self.downstream][:, -1]
        error = float((computed[0] - expected).norm() / expected.norm().clamp_min(1e-12))
        if not error < 1e-3:
            raise UserError(
                f"{type(self.model).__name__}: its blocks do not compute {self.downstream} as "
                f"they are known here (relative error {error:.2g})"
            )


class Point:
    """A path at given states, with intermediate values that all targets of a prompt share.

    Args:
        path: The path.
        state: States (P, T, C).
        base: The base of each, (P, T, C), see `Path.base`.
    """

    def __init__(self, path: Path, state: Tensor, base: Tensor | None) -> None:
        self.path = path
        self.state = state
        self.base = base
        with torch.no_grad():
            h = path.enter(state, base)
            for block in path.middle:
                h = block.forward(h)
            self.attended: Attended | None = path.last.attend(h) if path.last else None

    def pull_back(self, prompt: Tensor, position: Tensor, read: Read) -> tuple[Tensor, Tensor]:
        """Numbers that are read at one position per row, and their gradients.

        Rows do not affect one another, so the gradient of their sum holds the gradient of each: one
        backward pass serves all.

        Args:
            prompt: Prompt of each row, (R,).
            position: Position of each row, (R,).
            read: Maps downstream activations (R, D) to numbers (R,).

        Returns:
            The numbers (R,), and their gradients in the states of the prompts, (R, T, C).
        """
        path = self.path
        if path.last is None or self.attended is None:
            return self._pull_back_within(prompt, position, read)
        leaf = self.attended.stream[prompt, position].clone().requires_grad_()
        value = read(path.last.inside(leaf, path.downstream.stream))
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        g = self.attended.pull_back(prompt, position, gradient)
        if path.middle or path.upstream.stream == "mlp_in":
            leaf = self.state[prompt].clone().requires_grad_()
            h = path.enter(leaf, None if self.base is None else self.base[prompt])
            for block in path.middle:
                h = block.forward(h)
            g = torch.autograd.grad(h, leaf, g)[0]
        return value.detach(), g

    def _pull_back_within(
        self, prompt: Tensor, position: Tensor, read: Read
    ) -> tuple[Tensor, Tensor]:
        """The same if both sites lie in one block, where no other position matters."""
        leaf = self.state[prompt, position].clone().requires_grad_()
        base = None if self.base is None else self.base[prompt, position]
        value = read(self.path._within(leaf, base))
        g = leaf.new_zeros(len(prompt), *self.state.shape[1:])
        rows = torch.arange(len(prompt), device=leaf.device)
        (g[rows, position],) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), g
