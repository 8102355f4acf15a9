"""Patterns whose size does not depend on the data, for steps on a device.

A processor can look at a number and go on accordingly. On a GPU that would mean to wait until
everything queued before is done, and steps of different shapes cannot be recorded as a CUDA graph.
Within `shapes()` a training step therefore selects a fixed number of entries. Those that should not
count keep their place, with a value of 0. `selection` asks `on()`; SAEs do not know the difference.

Shape letters: B rows, D `d_in`, F columns (one per latent), n entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, cached_property
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_experiments.saes.pattern import Pattern, bags

_ON: ContextVar[bool] = ContextVar("static_shapes", default=False)
#: Entries whose products are computed together without Triton.
CHUNK = 1 << 14
#: Run the kernels on a CPU too, in Triton's interpreter. TRITON_INTERPRET=1 must have been set
#: before Triton was imported.
INTERPRETER = False


def on() -> bool:
    """True within `shapes()`."""
    return _ON.get()


@contextmanager
def shapes() -> Iterator[None]:
    """Make the functions of `selection` return patterns of a fixed size."""
    token = _ON.set(True)
    try:
        yield
    finally:
        _ON.reset(token)


@cache
def _kernels() -> ModuleType | None:
    """The Triton kernels; None where Triton is not installed."""
    try:
        from sae_experiments.saes import kernels
    except ImportError:
        return None
    return kernels


def kernels_for(t: Tensor) -> ModuleType | None:
    """The Triton kernels, if they run on the tensor's device."""
    kernels = _kernels()
    can_run = t.dtype == torch.float32 and (t.is_cuda or INTERPRETER)
    return kernels if can_run else None


class StaticPattern(Pattern):
    """A pattern with a fixed number of entries, the columns of a row in any order.

    All sums are in a fixed order, so that equal inputs give equal bits.

    Args:
        crow: Start of each row in `col`, and the end of the last one, (B + 1,) int32.
        col: Column of each entry, (n,) int32.
        n_cols: F.
        dropped: Entries that only fill the pattern up, (n,) boolean; None if there are none.
    """

    def __init__(
        self, crow: Tensor, col: Tensor, n_cols: int, dropped: Tensor | None = None
    ) -> None:
        super().__init__(crow, col, n_cols)
        self.dropped = dropped
        # Columns cut into short pieces, for both weight gradients.
        self._pieces: tuple[Tensor, ...] | None = None

    def like(self, crow: Tensor, col: Tensor) -> StaticPattern:
        return StaticPattern(crow, col, self.n_cols)

    def weighted(self, values: Tensor) -> Tensor:
        return values if self.dropped is None else values.masked_fill(self.dropped, 0)

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(crow, row, order)` of the transposed matrix, whose entry i is entry `order[i]` here."""
        col, order = torch.sort(self.col, stable=True)
        columns = torch.arange(self.n_cols + 1, dtype=col.dtype, device=col.device)
        crow = torch.searchsorted(col, columns, out_int32=True)
        return crow, self.row.index_select(0, order).int(), order

    @cached_property
    def counts(self) -> Tensor:
        """Number of entries of every column, (F,) int64."""
        return self.transposed[0].diff().long()

    def counts_where(self, chosen: Tensor) -> Tensor:
        crow, _, order = self.transposed
        before = F.pad(chosen.index_select(0, order).cumsum(0), (1, 0))
        return before.index_select(0, crow).diff()

    def dense(self, values: Tensor) -> Tensor:
        out = values.new_zeros(self.n_rows * self.n_cols)
        return out.index_copy(0, self.flat, values).view(self.n_rows, self.n_cols)

    def times(self, values: Tensor, dense: Tensor) -> Tensor:
        """Product (B, d) of the sparse matrix and a dense one.

        Args:
            values: Entries (n,).
            dense: (F, d).
        """
        kernels = kernels_for(dense)
        if kernels is None:
            return bags(self.crow, self.col, values, dense)
        return kernels.weighted_rows(self.crow[:-1], self.crow[1:], self.col, values, dense)

    def transposed_times(self, values: Tensor, dense: Tensor) -> Tensor:
        """Product (F, d) of the transposed sparse matrix and a dense one.

        Args:
            values: Entries (n,).
            dense: (B, d).
        """
        crow, row, order = self.transposed
        values = values.index_select(0, order)
        kernels = kernels_for(dense)
        if kernels is None:
            return bags(crow, row, values, dense)
        if self._pieces is None:  # a latent may be active in every row
            self._pieces = kernels.pieces(crow, self.col.shape[0])
        return kernels.weighted_segments(self._pieces, row, values, dense)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner product `left[row] . right[col]` of every entry, (n,).

        Args:
            left: (B, d).
            right: (F, d).
        """
        kernels = kernels_for(left)
        if kernels is not None:
            return kernels.entry_products(self.row, self.col, left, right)
        pairs = zip(self.row.split(CHUNK), self.col.split(CHUNK), strict=True)
        parts = [(left[row] * right[col]).sum(1) for row, col in pairs]
        return torch.cat(parts) if parts else left.new_zeros(0)

    def column_sums(self, values: Tensor) -> Tensor:
        """Sum (F,) of the entries (n,) of every column."""
        crow, _, order = self.transposed
        values = values.index_select(0, order)
        # Checking the offsets would wait for the device.
        return torch.segment_reduce(values, "sum", offsets=crow.long(), unsafe=True)

    @staticmethod
    def from_flat(
        flat: Tensor, n_rows: int, n_cols: int, dropped: Tensor | None = None
    ) -> StaticPattern:
        """Pattern of sorted flat positions `row * F + col` (n,)."""
        starts = torch.arange(n_rows + 1, device=flat.device) * n_cols
        crow = torch.searchsorted(flat, starts, out_int32=True)
        row = torch.div(flat, n_cols, rounding_mode="floor")
        pattern = StaticPattern(crow, (flat - row * n_cols).int(), n_cols, dropped)
        pattern.__dict__ |= {"row": row, "flat": flat}
        return pattern


def top_k(pre: Tensor, k: int) -> StaticPattern:
    """Select the k largest entries of every row of a matrix (B, F).

    Among equal values the device decides.
    """
    n_rows, n_cols = pre.shape
    col = pre.topk(k, dim=1, sorted=False).indices.int().view(-1)
    crow = torch.arange(0, n_rows * k + 1, k, dtype=torch.int32, device=pre.device)
    pattern = StaticPattern(crow, col, n_cols)
    row = torch.arange(n_rows, device=pre.device)
    pattern.__dict__["row"] = row[:, None].expand(n_rows, k).reshape(-1)
    return pattern


def top_mask(values: Tensor, k: int) -> Tensor:
    """Boolean mask (B, F) of the k largest entries of every row of `values` (B, F)."""
    found = values.topk(k, dim=1, sorted=False).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, found, True)


def batch_top_k(pre: Tensor, n: int, wanted: Tensor | None = None) -> StaticPattern:
    """Select the n largest entries of the whole matrix; those at or below 0 only fill it up.

    Args:
        pre: Matrix (B, F).
        n: Entries of the pattern.
        wanted: Number of the largest ones that count, a scalar on the device. None: all.
    """
    values, flat = pre.view(-1).topk(n, sorted=wanted is not None)
    dropped = values <= 0
    if wanted is not None:
        dropped |= torch.arange(n, device=pre.device) >= wanted
    flat, order = flat.sort()
    n_rows, n_cols = pre.shape
    return StaticPattern.from_flat(flat, n_rows, n_cols, dropped.index_select(0, order))
