"""Data types that SAEs take and return: batches, codes, units; a decorator for rows of any shape.

Shape letters: B rows, D `d_in`, O `d_out`, F `d_sae`, G nested parts of a code, n active entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_experiments.errors import of_type
from sae_experiments.saes.pattern import Pattern

#: Float32 has seven digits: values that vary by less, relative to their size, are constant.
RESOLUTION = 1e-7


class Batch(NamedTuple):
    """Rows of one training step."""

    x: Tensor
    """Input of the encoder, (B, D)."""
    y: Tensor
    """Target of the decoder, (B, O); x itself for an autoencoder."""
    alt: Tensor | None = None
    """Second view of the same rows, for a variant that asks for one."""
    downstream: Downstream | None = None
    """The rest of the language model, for a variant whose loss goes through it."""


class Downstream(NamedTuple):
    """The rest of a language model on the windows of a batch."""

    effect: Callable[[Tensor, Tensor], dict[str, Tensor]]
    """Measures from `tokens` and a reconstruction (R, O) of all R positions, in raw units. The same
    object in every batch: a recorded step cannot call another one."""
    tokens: Tensor
    """Token ids of the windows, R in all."""
    units: Units | None = None
    """Units of reconstructions that `of` is given; None: raw ones."""
    raw: Tensor | None = None
    """Activations (R, O) of all positions; None if the batch has them all."""
    kept: Tensor | None = None
    """Positions that the reconstruction replaces: those of the rows of the batch, (B,) int64, or a
    mask (R,) if the batch has R rows. The others keep their activations."""
    recordable: bool = True
    """Whether `effect` can be part of a CUDA graph."""

    def of(self, recon: Tensor) -> dict[str, Tensor]:
        """Effect of a reconstruction (B, O) of the rows of the batch."""
        if self.units is not None:
            recon = self.units.undo(recon)
        if self.raw is not None and self.kept is not None:
            if self.kept.dtype == torch.bool:
                recon = torch.where(self.kept[:, None], recon, self.raw)
            else:
                recon = self.raw.index_copy(0, self.kept, recon)
        return self.effect(self.tokens, recon)


class Codes:
    """A code, dense or sparse. Unpacks to `values, pattern`.

    Args:
        values: (B, F) for a dense code, the values (n,) of the active entries for a sparse one.
        pattern: Positions of the active entries; None for a dense code.
        fires: `fires`, if it is known already.
    """

    def __init__(
        self, values: Tensor, pattern: Pattern | None = None, fires: Tensor | None = None
    ) -> None:
        self.values = values
        self.pattern = pattern
        if fires is not None:
            self.__dict__["fires"] = fires

    def __iter__(self) -> Iterator[Any]:
        return iter((self.values, self.pattern))

    @cached_property
    def fires(self) -> Tensor:
        """Number of rows of the batch in which each latent is active, (F,)."""
        if self.pattern is None:
            # A sum of bytes: PyTorch would widen booleans to 64 bits first.
            return (self.values != 0).view(torch.uint8).sum(0, dtype=torch.int32)
        return self.pattern.counts_where(self.values != 0)

    @property
    def n_rows(self) -> int:
        """Number of rows B."""
        return self.values.shape[0] if self.pattern is None else self.pattern.n_rows

    @property
    def l0(self) -> float:
        """Mean number of active latents per row."""
        return int(self.fires.sum()) / self.n_rows

    @property
    def l0_on_device(self) -> Tensor:
        """Mean number of active latents per row, a scalar in float64 that nobody waits for."""
        return self.fires.sum().double() / self.n_rows

    def detach(self) -> Codes:
        """The same code without its graph."""
        return Codes(self.values.detach(), self.pattern, self.__dict__.get("fires"))

    def dense(self) -> Tensor:
        """The code as a (B, F) matrix."""
        return self.values if self.pattern is None else self.pattern.dense(self.values)


class DenseForm(NamedTuple):
    """Rule by which a dense code follows from pre-activations a (B, F), with parameters (F,).

    - `relu`: `z = ReLU(a)`; counted is z.
    - `jump`: `z = a 1[a > scale]`; counted is `1[a > scale]`, with `saes.jumprelu`'s estimates of
      the gradient.
    - `gated`: gate `ReLU(a)`, and `z = 1[a > 0] ReLU(scale (a - shift) + bias)`; counted is the
      gate.
    """

    name: str
    """`relu`, `jump` or `gated`."""
    scale: Tensor | None = None
    shift: Tensor | None = None
    bias: Tensor | None = None
    width: float = 1.0
    """Width of the window of `jump`."""
    through: bool = False
    """Whether the gradient of `jump` passes through to a within the window."""


class Forward(NamedTuple):
    """One training forward pass."""

    batch: Batch
    """The rows."""
    pre: Tensor | None
    """Pre-activations (B, F) without a graph, valid until the next pass, which overwrites them.
    None where they were never computed at once."""
    codes: Codes
    """The code."""
    recon: Tensor
    """Reconstruction (B, O)."""
    active_pre: Tensor
    """Pre-activations of the active entries, laid out as the values of the code; they carry the
    graph to the encoder."""
    levels: Tensor | None = None
    """Reconstructions (B, G, O) from nested parts of the code, the last one from all of it; None
    for a variant without nested parts."""
    mask: Tensor | None = None
    """Support (B, F) of a dense code, as 0.0 and 1.0. Outside it `active_pre` is 0, which is not a
    pre-activation. None where the code is sparse, or `counted` is there."""
    counted: Tensor | None = None
    """Sum over the batch of what the penalty counts (see `DenseForm`), a differentiable scalar.
    None where it was not computed with the code."""

    @property
    def nested(self) -> Tensor:
        """The field `levels`, for a variant that has nested parts."""
        return of_type(self.levels, Tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """State of training that a loss may depend on."""

    phase: str
    """Name of the training phase."""
    progress: Any
    """Share of the phase that is done, 0 to 1: a number, or a scalar tensor within
    `static.shapes()`."""
    dead: Tensor
    """Latents that have not been active for long, (F,) boolean."""
    generator: torch.Generator
    """The only source of randomness of a loss."""
    some_dead: bool | None = None
    """Whether latents are dead, as far as is known without asking the device. None: ask."""
    over: bool | None = None
    """Whether training has stopped early, decided likewise. None: ask the SAE."""

    @property
    def any_dead(self) -> bool:
        """True if terms for dead latents are needed; `dead` may still be empty."""
        return bool(self.dead.any()) if self.some_dead is None else self.some_dead


class Units(NamedTuple):
    """The units an SAE is trained in, `scale (x - centre)`.

    The scale is constant within a block of the input (a site of a crosscoder).
    """

    centre: Tensor
    """(D,), in the units of the data."""
    scale: Tensor
    """(D,)."""

    def apply(self, x: Tensor) -> Tensor:
        """Convert rows (N, D) to these units."""
        return (x - self.centre).mul_(self.scale)

    def undo(self, x: Tensor) -> Tensor:
        """Convert rows (N, D) in these units back to their own."""
        return x / self.scale + self.centre

    def inverse(self) -> Units:
        """The units whose `apply` is the `undo` of these."""
        centre = self.centre.double()
        scale = self.scale.double()
        return Units(-centre * scale, 1 / scale)


class Inference(NamedTuple):
    """A trained SAE as a plain encoder and decoder of a known architecture."""

    architecture: str
    """Name of the architecture, as SAELens has it."""
    tensors: dict[str, Tensor]
    """Weights under SAELens' names and in its orientation."""
    config: dict[str, Any]
    """Settings of the architecture, under SAELens' keys."""


def by_rows(width: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a method of rows (N, W) take any number of leading dimensions, or none.

    Rows of another type (NumPy, half precision) are converted to that of the SAE's weights.

    Args:
        width: Name of the SAE's attribute that holds W.
    """

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def with_any_shape(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            x = self.as_rows(x, width)
            if x.ndim == 2:
                return method(self, x, *args, **kwargs)
            out = method(self, x.reshape(-1, x.shape[-1]), *args, **kwargs)
            return None if out is None else out.reshape(*x.shape[:-1], out.shape[-1])

        return with_any_shape

    return wrap
