"""What SAEs are given and give back: batches, codes, units, and a way to read rows of any shape.

Shape letters: B rows, D d_in, O d_out, F d_sae, G nested parts of a code, n active entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_experiments.saes.selection import Pattern


class Batch(NamedTuple):
    """Rows for one step: ``x`` (B, D) is read by the encoder, ``y`` (B, O) rebuilt by the decoder (x itself for an autoencoder)."""

    x: Tensor
    y: Tensor
    alt: Tensor | None = None  # a second view of the same rows, where a variant asks for one
    downstream: Callable[[Tensor], dict[str, Tensor]] | None = (
        None  # what a reconstruction (B, O) does to the rest of the model
    )


class Codes:
    """A code: dense (B, F) with ``pattern`` None, or the values (n,) of the active entries of ``pattern``. Unpacks to these two."""

    def __init__(self, values: Tensor, pattern: Pattern | None = None) -> None:
        self.values, self.pattern = values, pattern

    def __iter__(self) -> Iterator[Any]:
        return iter((self.values, self.pattern))

    @cached_property
    def fires(self) -> Tensor:
        """How often each latent is active in the batch, (F,)."""
        if self.pattern is None:  # a sum of bytes: PyTorch widens booleans to 64 bits first
            return (self.values != 0).view(torch.uint8).sum(0, dtype=torch.int32)
        zero = (self.values == 0).nonzero().squeeze(1)
        counts = self.pattern.counts
        return (
            counts - torch.bincount(self.pattern.col[zero], minlength=self.pattern.n_cols)
            if zero.numel()
            else counts
        )

    @property
    def l0(self) -> float:
        """Mean number of active latents a row."""
        return int(self.fires.sum()) / (
            self.values.shape[0] if self.pattern is None else self.pattern.n_rows
        )

    def detach(self) -> Codes:
        """The same code without its graph."""
        return Codes(self.values.detach(), self.pattern)

    def dense(self) -> Tensor:
        """The code as a (B, F) matrix."""
        return self.values if self.pattern is None else self.pattern.dense(self.values)


class Forward(NamedTuple):
    """One training forward pass.

    ``pre`` is the (B, F) product without a graph: valid until the next pass, which overwrites it; None where it was never whole. ``at``
    holds the pre-activations where the support is, laid out as the code's values, and carries the graph to the encoder. ``levels``
    (B, G, O) are the reconstructions of nested parts of the code, the last of them whole, where a variant has such. ``mask`` (B, F) of 0.0
    and 1.0 is the support of a dense code: ``at`` is 0 outside it, which is no pre-activation. It is None where the code is sparse.
    """

    batch: Batch
    pre: Tensor | None
    codes: Codes
    recon: Tensor
    at: Tensor
    levels: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a loss may know about the moment: ``progress`` (0..1 within ``phase``), latents silent for long, and its only randomness."""

    phase: str
    progress: float
    dead: Tensor
    generator: torch.Generator


class Units(NamedTuple):
    """The units an SAE is trained in: ``scale (x - centre)``; both (D,).

    The scale is the same number throughout a block of the input (a site of a crosscoder).
    """

    centre: Tensor
    scale: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Rows (N, D) in these units."""
        return (x - self.centre).mul_(self.scale)

    def undo(self, x: Tensor) -> Tensor:
        """Rows (N, D) in these units, back in their own."""
        return x / self.scale + self.centre

    def inverse(self) -> Units:
        """The units, as seen from these, in which rows have their own values."""
        centre, scale = self.centre.double(), self.scale.double()
        return Units(-centre * scale, 1 / scale)


class Inference(NamedTuple):
    """What remains of an SAE when training is over: a plain encoder and decoder under a known architecture name."""

    architecture: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]


def by_rows(width: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method of rows (N, W) that takes any number of leading dimensions, (W,) included.

    Rows of another type (NumPy, half precision) are brought to that of the SAE's weights.

    Args:
        width: the SAE's attribute that holds W.
    """

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def taken(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            x = self.accepted(x, width)
            if x.ndim == 2:
                return method(self, x, *args, **kwargs)
            out = method(self, x.reshape(-1, x.shape[-1]), *args, **kwargs)
            return None if out is None else out.reshape(*x.shape[:-1], out.shape[-1])

        return taken

    return wrap
