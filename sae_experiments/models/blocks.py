"""Interface of transformer blocks that are taken apart for circuits.

Shape letters: R rows, P prompts, T positions, C width of the residual stream, D width of a site,
M neurons of the MLP.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.models.hooks import Site
from sae_experiments.models.norms import Norm

#: Order of the sites within a block; the residual stream after a block is its end.
ORDER = {"mlp_in": 0, "mlp_act": 1, "mlp_out": 2, "resid": 3}


class Attended(ABC):
    """Attention at every position of P prompts."""

    stream: Tensor
    """Output of the attention plus the stream before it, (P, T, C)."""

    @abstractmethod
    def pull_back(self, prompt: Tensor, position: Tensor, g: Tensor) -> Tensor:
        """Gradients at the block's input: the backward pass of `Block.attend_at`.

        Args:
            prompt: Prompt of each row, (R,).
            position: Position of each row, (R,).
            g: Gradients at the stream after attention, (R, C).

        Returns:
            Gradients (R, T, C).
        """


class Block(ABC):
    """One block: `r = h + attention(norm_1(h))`, `h' = r + mlp(norm_2(r))`."""

    #: Tensors of the size of a prompt's state that pulling back through attention takes.
    pull_back_copies: int
    norm_2_module: nn.Module
    norm_2: Norm

    @abstractmethod
    def attend(self, h: Tensor) -> Attended:
        """Attention at every position of a stream (P, T, C)."""

    @abstractmethod
    def attend_at(self, h: Tensor, position: Tensor) -> Tensor:
        """The stream after attention at one position per row, differentiable.

        Args:
            h: The stream before the block, (R, T, C).
            position: Position of each row, (R,).

        Returns:
            The stream (R, C).
        """

    @abstractmethod
    def hidden(self, n: Tensor) -> Tensor:
        """The MLP's activations (..., M) from its input (..., C)."""

    @abstractmethod
    def written(self, acts: Tensor) -> Tensor:
        """The MLP's output (..., C) from its activations (..., M)."""

    @property
    @abstractmethod
    def w_out(self) -> Tensor:
        """The MLP's output matrix (M, C)."""

    @abstractmethod
    def to_neurons(self, rows: Tensor, x: Tensor | None) -> Tensor:
        """Directions (n, C) at the MLP's input as directions of its activations (n, M).

        Args:
            rows: The directions.
            x: Inputs (..., C) over which the slopes of neurons are averaged. None: the weights
                alone.
        """

    @abstractmethod
    def from_neurons(self, rows: Tensor, x: Tensor | None) -> Tensor:
        """Directions (n, M) that read activations as directions (n, C) that read the input."""

    def mlp(self, n: Tensor) -> Tensor:
        """The MLP's output (..., C) from its input (..., C)."""
        return self.written(self.hidden(n))

    def forward(self, h: Tensor) -> Tensor:
        """The stream after the block (R, T, C) from the one before it."""
        r = self.attend(h).stream
        return r + self.mlp(self.norm_2_module(r))

    def inside(self, r: Tensor, stream: str) -> Tensor:
        """The block's site `stream` (..., D), from the stream after attention (..., C)."""
        n = self.norm_2_module(r)
        if stream == "mlp_in":
            return n
        acts = self.hidden(n)
        if stream == "mlp_act":
            return acts
        out = self.written(acts)
        return out if stream == "mlp_out" else r + out


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
