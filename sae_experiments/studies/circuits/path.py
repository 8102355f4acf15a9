"""The part of a language model between two sites: run for changed activations, and pulled back from one unit at one position a row.

Shape letters: P prompts, R rows (one target or one changed prompt each), T positions, C width of the residual stream, D of a site.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.models.hooks import Site, activations, blocks_of
from sae_experiments.studies.circuits.blocks import Attended, Block, blocks_between, check_order

#: What reads the downstream activations (R, D) and gives one number a row, (R,): a unit's pre-activation.
Read = Callable[[Tensor], Tensor]


class Path:
    """From ``upstream`` to ``downstream``. A *state* is what upstream latents are added to, (P, T, C).

    It is the residual stream after the upstream block where the way there is linear (``resid``, ``mlp_out``, ``mlp_act``, whose decoder rows
    are carried through the output matrix: :meth:`carried`), and the site itself for ``mlp_in``. Everything before a state is constant.
    """

    def __init__(self, model: nn.Module, upstream: Site, downstream: Site) -> None:
        check_order(upstream, downstream)
        self.model, self.upstream, self.downstream = model, upstream, downstream
        *self.middle, self.last = [*blocks_between(model, upstream, downstream)] or [None]
        self.source = Block(blocks_of(model)[upstream.layer - 1]) if upstream.layer else None
        self.stream = Site("resid", upstream.layer)

    @property
    def sites(self) -> list[Site]:
        """What must be known of a prompt."""
        return list(dict.fromkeys([self.upstream, self.stream, self.downstream]))

    @torch.no_grad()
    def carried(self, rows: Tensor) -> Tensor:
        """Directions at the upstream site (n, D) as directions of the state (n, C)."""
        return (
            rows @ self.source.w_out if self.upstream.stream == "mlp_act" and self.source else rows
        )

    def state(self, found: dict[Site, Tensor]) -> Tensor:
        """The state of prompts from their activations at :attr:`sites`."""
        return found[self.upstream if self.upstream.stream == "mlp_in" else self.stream]

    def moved(self, found: dict[Site, Tensor], x: Tensor) -> dict[Site, Tensor]:
        """The activations with ``x`` (P, T, D) at the upstream site, and what it does to the stream after its block."""
        was = found[self.upstream]
        change = (
            self.source.mlp(x) - self.source.mlp(was)
            if self.upstream.stream == "mlp_in"
            else self.carried(x - was)
        )
        return (
            found
            | {self.upstream: x}
            | ({} if self.upstream == self.stream else {self.stream: found[self.stream] + change})
        )

    def base(self, found: dict[Site, Tensor]) -> Tensor | None:
        """The stream (P, T, C) without the upstream MLP's output, where what the MLP writes must be told apart from the rest."""
        if self.upstream.stream == "mlp_in":
            return found[self.stream] - self.source.mlp(found[self.upstream])
        if self.last is None and self.downstream.stream == "mlp_out":
            return found[self.stream] - found[self.downstream]
        return None

    def enter(self, state: Tensor, base: Tensor | None) -> Tensor:
        """The residual stream after the upstream block."""
        return base + self.source.mlp(state) if self.upstream.stream == "mlp_in" else state

    def value(self, state: Tensor, base: Tensor | None, position: Tensor, read: Read) -> Tensor:
        """What ``read`` says of the downstream activations at ``position`` (R,) for changed states (R, T, C); differentiable."""
        if self.last is None:
            rows = torch.arange(len(state), device=state.device)
            return read(
                self._within(state[rows, position], None if base is None else base[rows, position])
            )
        h = self.enter(state, base)
        for block in self.middle:
            h = block.forward(h)
        return read(self.last.inside(self.last.attend_at(h, position), self.downstream.stream))

    def _within(self, state: Tensor, base: Tensor | None) -> Tensor:
        """Both sites in one block: there is nothing but the MLP between them, and no other position matters."""
        if self.downstream.stream == "resid":
            return self.enter(state, base)
        if (
            self.upstream.stream == "mlp_act"
        ):  # the state is the stream, of which the MLP's output is a part
            return state - base
        acts = self.source.mlp.act(self.source.mlp.c_fc(state))
        return acts if self.downstream.stream == "mlp_act" else self.source.mlp.c_proj(acts)

    def linearise(self, state: Tensor, base: Tensor | None) -> Point:
        """The path at states (P, T, C), ready to be pulled back through."""
        return Point(self, state, base)

    @torch.no_grad()
    def check(self, tokens: Tensor) -> None:
        """Raises :class:`UserError` if the path does not compute what the model does (an option of it that is not known here)."""
        found = activations(self.model, tokens, self.sites)
        position = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
        base = self.base(found)
        seen: list[Tensor] = []
        self.value(self.state(found), base, position, lambda x: seen.append(x) or x[:, 0])
        wanted = found[self.downstream][:, -1]
        error = float((seen[0] - wanted).norm() / wanted.norm().clamp_min(1e-12))
        if not error < 1e-3:
            raise UserError(
                f"{type(self.model).__name__} does not compute {self.downstream} as GPT-2 or GPT-Neo do (relative error {error:.2g})"
            )


class Point:
    """A path at given states (P, T, C): its intermediate values, computed once for all targets of a prompt."""

    def __init__(self, path: Path, state: Tensor, base: Tensor | None) -> None:
        self.path, self.state, self.base = path, state, base
        with torch.no_grad():
            h = path.enter(state, base)
            for block in path.middle:
                h = block.forward(h)
            self.attended: Attended | None = path.last.attend(h) if path.last else None

    def pull_back(self, prompt: Tensor, position: Tensor, read: Read) -> tuple[Tensor, Tensor]:
        """``read`` of the downstream activations at one (prompt, position) a row, (R,), and its gradients in the prompt's state, (R, T, C).

        Rows do not see one another, so the gradient of their sum holds each row's own: one backward pass serves all.
        """
        path = self.path
        if path.last is None or self.attended is None:
            leaf = self.state[prompt, position].clone().requires_grad_()
            value = read(
                path._within(leaf, None if self.base is None else self.base[prompt, position])
            )
            g = torch.zeros(
                len(prompt), *self.state.shape[1:], device=leaf.device, dtype=leaf.dtype
            )
            g[torch.arange(len(prompt), device=leaf.device), position] = torch.autograd.grad(
                value.sum(), leaf
            )[0]
            return value.detach(), g
        leaf = self.attended.stream[prompt, position].clone().requires_grad_()
        value = read(path.last.inside(leaf, path.downstream.stream))
        g = path.last.pull_back(
            self.attended, prompt, position, torch.autograd.grad(value.sum(), leaf)[0]
        )
        if path.middle or path.upstream.stream == "mlp_in":
            leaf = self.state[prompt].clone().requires_grad_()
            h = path.enter(leaf, None if self.base is None else self.base[prompt])
            for block in path.middle:
                h = block.forward(h)
            g = torch.autograd.grad(h, leaf, g)[0]
        return value.detach(), g
