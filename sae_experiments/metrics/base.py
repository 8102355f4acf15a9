"""Evaluation context of the metrics (`EvalContext`) and the form of their results (`Measured`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from sae_experiments.metric_info import MetricInfo
from sae_experiments.models.hooks import Site, Sites, as_sites
from sae_experiments.models.layouts import CausalLM
from sae_experiments.models.store import Store
from sae_experiments.models.tokens import spelled
from sae_experiments.quality_warnings import Warned
from sae_experiments.saes.base import SAE
from sae_experiments.saes.ops import default_matmul
from sae_experiments.saes.outliers import SAMPLE, Region

__all__ = ["EvalContext", "LMSplice", "Measured", "Metric", "MetricInfo", "Rows"]


#: Logits of one forward pass: a bound on the memory for models with many tokens.
MOST_LOGITS = 1 << 25


class Rows(NamedTuple):
    """Consecutive held-out rows with their codes and reconstructions, all float32."""

    x: Tensor
    """Inputs of the SAE, (B, D)."""
    y: Tensor
    """Targets of the SAE, (B, O)."""
    acts: Tensor
    """Dense codes in inference mode, (B, F)."""
    recon: Tensor
    """Reconstructions, (B, O)."""


class Measured(NamedTuple):
    """Result of one metric on one SAE."""

    scalars: dict[str, float | None]
    """Values for `final_info.json` by metric name; None if undefined (see `why_null`)."""
    arrays: dict[str, np.ndarray] = {}
    """Arrays for plots by name."""
    why_null: dict[str, str] = {}
    """The reason for each scalar that is None."""
    noise: dict[str, float] = {}
    """Standard errors over resampled text; see `metrics.noise`."""
    features: list[dict[str, Any]] | None = None
    """One JSON-serialisable dict per latent, for the feature browser."""
    warnings: tuple[Warned, ...] = ()
    """Results that are worse than they look."""


Metric = Callable[["EvalContext"], Measured]


#: Numbers in the widest array of a chunk of held-out rows.
CHUNK_NUMBERS = 2**24


class LMSplice(NamedTuple):
    """The language model into which reconstructions are spliced, and its held-out text."""

    model: CausalLM
    """The language model."""
    site: Site | Sites
    """Site at which the reconstruction replaces the activation."""
    tokens: Callable[[np.ndarray], tuple[Tensor, Tensor]]
    """Maps window starts (n,) to token ids and next token ids, (n, T) each."""


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """A trained SAE with the held-out data on which metrics evaluate it.

    Metrics read this and change nothing, except for values that they cache in `extras`.

    Metrics evaluate the first n held-out rows as a sample of all of them, so these rows must be
    a sample for any n (`studies.stores.Stores` orders its windows accordingly).
    """

    sae: SAE
    """The SAE under evaluation."""
    device: torch.device
    """Device on which rows are encoded."""
    read: Site | Sites | None = None
    """Site that the SAE reads; None without a language model."""
    write: Site | Sites | None = None
    """The activation that the SAE reconstructs; None without a language model."""
    held_out: Store | None = None
    """Activations of the validation split; None without a language model (then `x` is given)."""
    x: Tensor | None = None
    """Inputs (N, D) if there is no store."""
    y: Tensor | None = None
    """Targets (N, O) if there is no store; None if the SAE reconstructs its input."""
    lm: LMSplice | None = None
    """The language model, if any."""
    symbols: Sequence[str] = ()
    """The character of every token id, if tokens are characters."""
    pieces: Sequence[str] = ()
    """The text of every token id, if tokens are longer than characters."""
    outliers: str = "leave_out"
    """Handling of outlier rows in the fit, `fit.outliers`: what it left out is not replaced."""
    replicas: tuple[SAE, ...] = ()
    """The same SAE fitted to the same activations with other seeds."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Values of some studies (`"truth"`, `"latents"`), and values that metrics share."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids; 0 without text."""
        return len(self.symbols or self.pieces)

    @property
    def reads_tokens(self) -> bool:
        """True if tokens are longer than characters."""
        return not self.symbols and bool(self.pieces)

    def windows_per_pass(self, asked: int) -> int:
        """Windows per forward pass: as many as asked for, but at most `MOST_LOGITS` logits."""
        length = 1 if self.held_out is None else self.held_out.length
        return max(1, min(asked, MOST_LOGITS // (length * max(self.vocabulary, 1))))

    @property
    def n_rows(self) -> int:
        """Number of held-out rows."""
        return len(cast("Tensor", self.x)) if self.held_out is None else self.held_out.n_rows

    @property
    def read_sites(self) -> Sites:
        """Sites that the SAE reads, concatenated; empty without a language model."""
        return () if self.read is None else as_sites(self.read)

    @property
    def write_sites(self) -> Sites:
        """Sites that the SAE reconstructs, concatenated; empty without a language model."""
        return () if self.write is None else as_sites(self.write)

    def n_used(self, rows: int | None) -> int:
        """Number of held-out rows that a metric evaluates if `rows` are asked for (None: all).

        At least one window of text, the least that contexts, documents and splices exist for.
        """
        least = 1 if self.held_out is None else self.held_out.length
        return min(max(rows or self.n_rows, least), self.n_rows)

    @property
    def reconstructs_input(self) -> bool:
        """True if the targets are the inputs, false for a transcoder."""
        return self.y is None if self.held_out is None else self.write == self.read

    def inputs(self, rows: slice) -> Tensor:
        """Inputs of some held-out rows, (n, D), on the device that stores them."""
        if self.held_out is None:
            return cast("Tensor", self.x)[rows]
        return self.held_out.rows(self.read_sites, rows)

    def targets(self, rows: slice) -> Tensor:
        """Targets of some held-out rows, (n, O), on the device that stores them."""
        if self.reconstructs_input:
            return self.inputs(rows)
        if self.held_out is None:
            return cast("Tensor", self.y)[rows]
        return self.held_out.rows(self.write_sites, rows)

    def replaced(self, inputs: Tensor) -> Tensor | None:
        """Rows (n,) among inputs (n, D) that a splice replaces: the ordinary ones.

        None if all are.
        """
        if self.outliers == "keep":
            return None
        ordinary = self.region.contains(inputs.float())
        return None if bool(ordinary.all()) else ordinary

    @property
    def region(self) -> Region:
        """Region of the ordinary inputs, from the first held-out rows."""
        if "region" not in self.extras:
            sample = self.inputs(slice(0, SAMPLE)).to(self.device)
            self.extras["region"] = Region.of(sample, max(len(self.read_sites), 1))
        return self.extras["region"]

    def spell(self, i: int) -> str:
        """Text of token id `i`, or `<i>` if it has none (a token that is part of a character)."""
        return spelled(self.symbols or self.pieces, i)

    @torch.no_grad()
    def encoded(
        self, limit: int | None = None, size: int = 4096
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Encode held-out rows in order.

        Args:
            limit: Number of rows, from the first on; None for all.
            size: Rows per chunk at most; fewer if rows or codes are wide, see `CHUNK_NUMBERS`.

        Yields:
            Inputs (B, D) and their codes (B, F) in inference mode, one chunk after the other.
        """
        self.sae.eval()
        size = min(
            size, max(1, CHUNK_NUMBERS // max(self.sae.d_in, self.sae.d_out, self.sae.d_sae))
        )
        n = self.n_used(limit)
        for begin in range(0, n, size):
            x = self.inputs(slice(begin, min(begin + size, n))).to(self.device)
            yield x, self.sae.encode(x).float()

    @torch.no_grad()
    def chunks(self, limit: int | None = None, size: int = 4096) -> Iterator[Rows]:
        """Encode and reconstruct held-out rows in order, as `encoded` does."""
        begin = 0
        for x, acts in self.encoded(limit, size):
            part = slice(begin, begin + len(x))
            y = x if self.reconstructs_input else self.targets(part).to(self.device)
            yield Rows(x, y, acts, self.sae.reconstruct(x, acts).float())
            begin += len(x)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) of a language model for token ids (B, T)."""
    with default_matmul():
        return model(input_ids=tokens, use_cache=False).logits


def next_log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities (B, T - 1, V), float32, of the next token at all positions but the first.

    Args:
        logits: Logits (B, T, V) of windows.
    """
    return logits[:, 1:].float().log_softmax(-1)
