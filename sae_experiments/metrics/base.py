"""What a metric may look at (:class:`Bench`) and what it gives back (:class:`Measured`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sae_experiments.metric_info import MetricInfo
from sae_experiments.models.hooks import Site, Sites
from sae_experiments.models.store import Store
from sae_experiments.quality_warnings import Warned
from sae_experiments.saes.base import SAE

__all__ = ["Bench", "Measured", "Metric", "MetricInfo", "Rows", "Spliced"]


class Rows(NamedTuple):
    """Held-out rows in order: input (B, D), target (B, O), dense inference codes (B, F), reconstruction (B, O), all float32."""

    x: Tensor
    y: Tensor
    acts: Tensor
    recon: Tensor


class Measured(NamedTuple):
    """Numbers for ``final_info.json`` (None where there is none, with the reason in ``why_null``) and arrays for plots."""

    scalars: dict[str, float | None]
    arrays: dict[str, np.ndarray] = {}
    why_null: dict[str, str] = {}
    noise: dict[str, float] = {}  # standard error over resampled text: 2 sqrt(2) of it is the least difference worth believing
    features: list[dict[str, Any]] | None = None  # one JSON-able dict a latent, for the feature browser
    warnings: tuple[Warned, ...] = ()  # what is worse than it looks


Metric = Callable[["Bench"], Measured]


class Spliced(NamedTuple):
    """The language model around the SAE: where its reconstruction goes and the held-out text."""

    model: nn.Module
    site: Site | Sites
    tokens: Callable[[np.ndarray], tuple[Tensor, Tensor]]  # window starts -> ids and next ids, (n, T) each


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A trained SAE and held-out data. Metrics only look; they share nothing but what is here.

    ``held_out`` is a store of the validation split, or ``x`` a plain (N, D) tensor where there is no language model. The first rows, however
    many, have to be a sample of all of them (the order in which :class:`..studies.stores.Stores` keeps its windows), for metrics take them as one.
    """

    sae: SAE
    device: torch.device
    read: Site | Sites | None = None
    write: Site | Sites | None = None
    held_out: Store | None = None
    x: Tensor | None = None
    y: Tensor | None = None
    lm: Spliced | None = None
    symbols: Sequence[str] = ()  # the character of every id, where there is text
    pieces: Sequence[str] = ()  # the text of every id, where ids are more than characters
    replicas: tuple[SAE, ...] = ()  # the same SAE fitted to the same activations from other seeds
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        """How many held-out rows there are."""
        return self.held_out.n_rows if self.held_out is not None else len(self.x)

    def spell(self, i: int) -> str:
        """The text of an id; ``<id>`` where it has none of its own (a part of a character)."""
        names = self.symbols or self.pieces
        piece = names[i] if i < len(names) else ""
        return piece if piece.strip("\N{REPLACEMENT CHARACTER}") else f"<{i}>"

    @torch.no_grad()
    def chunks(self, limit: int | None = None, size: int = 4096) -> Iterator[Rows]:
        """The first ``limit`` held-out rows (None: all), at most ``size`` at a time, with codes in inference mode."""
        self.sae.eval()
        n = min(limit or self.n_rows, self.n_rows)
        for begin in range(0, n, size):
            x, y = self._rows(slice(begin, min(begin + size, n)))
            acts = self.sae.encode(x)
            yield Rows(x, y, acts.float(), self.sae.reconstruct(x, acts).float())

    @torch.no_grad()
    def targets(self, n: int) -> Tensor:
        """What the SAE rebuilds in the first n held-out rows, (n, O)."""
        return self._rows(slice(0, n))[1]

    def _rows(self, part: slice) -> tuple[Tensor, Tensor]:
        if self.held_out is None:
            x = self.x[part].to(self.device)
            return x, x if self.y is None else self.y[part].to(self.device)
        x = self.held_out.rows(self.read, part).to(self.device)
        return x, x if self.write == self.read else self.held_out.rows(self.write, part).to(self.device)
