"""Which entries of a code are active: exact selection per row and per batch, and where the chosen ones lie."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

#: Entries of a matrix that are worked on while they are in the cache.
TILE = 1 << 21
#: Entries from which a first guess at a threshold is made.
SAMPLE = 1 << 18


class Pattern:
    """Positions of the active entries of a (B, F) matrix, row by row (CSR): ``crow`` (B+1,) and ``col`` (n,), both int32."""

    def __init__(self, crow: Tensor, col: Tensor, n_cols: int) -> None:
        self.crow, self.col, self.n_cols = crow, col, n_cols

    @property
    def n_rows(self) -> int:
        return self.crow.shape[0] - 1

    @cached_property
    def row(self) -> Tensor:
        """Row of every entry, (n,) int64."""
        return torch.repeat_interleave(
            torch.arange(self.n_rows, device=self.col.device),
            self.crow.diff(),
            output_size=self.col.shape[0],
        )

    @cached_property
    def flat(self) -> Tensor:
        """Position ``row * F + col`` of every entry, (n,) int64."""
        return self.row * self.n_cols + self.col

    def at(self, dense: Tensor) -> Tensor:
        """The entries of a contiguous (B, F) matrix at these positions, (n,)."""
        return dense.view(-1).index_select(0, self.flat)

    @cached_property
    def counts(self) -> Tensor:
        """Active entries of every column, (F,) int64."""
        return torch.bincount(self.col, minlength=self.n_cols)

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(crow, row, order)`` of the transposed matrix: entry i of it is entry ``order[i]`` here."""
        order = _stable_order(self.col, self.n_cols)
        crow = torch.zeros(self.n_cols + 1, dtype=torch.int32, device=self.col.device)
        crow[1:] = self.counts.cumsum(0)
        return crow, self.row.index_select(0, order).int(), order

    def dense(self, values: Tensor) -> Tensor:
        """The (B, F) matrix with ``values`` at the active entries."""
        out = values.new_zeros(self.n_rows, self.n_cols)
        out.view(-1)[self.flat] = values
        return out

    @staticmethod
    def from_flat(flat: Tensor, n_rows: int, n_cols: int) -> Pattern:
        """From sorted flat positions ``row * F + col``."""
        row = torch.div(flat, n_cols, rounding_mode="floor")
        crow = torch.zeros(n_rows + 1, dtype=torch.int32, device=flat.device)
        crow[1:] = torch.bincount(row, minlength=n_rows).cumsum(0)
        pattern = Pattern(crow, (flat - row * n_cols).int(), n_cols)
        pattern.__dict__ |= {"row": row, "flat": flat}
        return pattern

    @staticmethod
    def stacked(parts: Sequence[Pattern]) -> Pattern:
        """The pattern of matrices put on top of each other."""
        ends = torch.tensor(
            [0, *(p.col.shape[0] for p in parts)], dtype=torch.int32, device=parts[0].crow.device
        ).cumsum(0, dtype=torch.int32)
        crow = torch.cat(
            [ends[:1], *(p.crow[1:] + end for p, end in zip(parts, ends, strict=False))]
        )
        return Pattern(crow, torch.cat([p.col for p in parts]), parts[0].n_cols)

    @staticmethod
    def from_mask(mask: Tensor) -> Pattern:
        """From a (B, F) boolean mask."""
        return Pattern.from_flat(positions(mask), *mask.shape)


def _stable_order(col: Tensor, n_cols: int) -> Tensor:
    """The stable sorting order of column numbers below ``n_cols``."""
    if col.device.type != "cpu" or n_cols > 1 << 16:
        return torch.argsort(col, stable=True)
    return torch.from_numpy(
        np.argsort(col.numpy().astype(np.uint16), kind="stable")
    )  # by digits: 1.7 to 17 times as fast


def positions(mask: Tensor) -> Tensor:
    """Where a contiguous ``mask`` is true, as ascending positions (n,) in the flattened tensor."""
    if mask.device.type != "cpu":
        return mask.view(-1).nonzero().squeeze(1)
    return torch.from_numpy(
        np.flatnonzero(mask.numpy())
    )  # a third of the time of torch's where few entries are true


def top_k(pre: Tensor, k: int) -> Pattern:
    """The k largest entries of every row of (B, F); among equal values the first columns win.

    The columns are cut into groups and each group's largest entry is found, which is one cheap pass. The k-th largest of those is a lower bound of
    the k-th largest entry, because k groups hold an entry that is no smaller; hardly more than k entries of a row lie above it, whatever the rows look
    like, and only among them is there anything to select.
    """
    n_rows, n_cols = pre.shape
    size = 1
    while n_cols // (2 * size) >= 4 * k:
        size *= 2
    if size == 1 or not n_rows:
        return _selected(pre, k)
    chunk = max(1, TILE // n_cols)
    flat = torch.cat(
        [
            _candidates(part, k, size).add_(i * chunk * n_cols)
            for i, part in enumerate(pre.split(chunk))
        ]
    )
    row = torch.div(flat, n_cols, rounding_mode="floor")
    counts = torch.bincount(row, minlength=n_rows)
    width = int(counts.max())
    first = torch.arange(n_rows, device=pre.device) * width - (counts.cumsum(0) - counts)
    values = pre.view(-1).index_select(0, flat)
    narrow = torch.full((n_rows, width), -torch.inf, dtype=pre.dtype, device=pre.device)
    narrow.view(-1).index_copy_(
        0, torch.arange(flat.numel(), device=pre.device).add_(first.index_select(0, row)), values
    )
    least = (
        kth_largest(narrow, k).squeeze(1) if width >= k else values.new_full((n_rows,), torch.nan)
    )
    least = least.index_select(0, row)
    keep = values >= least
    if (
        int(torch.count_nonzero(keep)) > n_rows * k
    ):  # equal values at the edge of a row: the first of them stay
        ties = values == least
        excess = torch.bincount(row.masked_select(keep), minlength=n_rows) - k
        seen = ties.cumsum(0)
        behind = (
            seen.index_select(0, counts.cumsum(0) - 1).index_select(0, row) - seen
        )  # ties to the right of this entry in its row
        keep &= ~ties | (behind >= excess.index_select(0, row))
    flat = flat.masked_select(keep)
    if flat.numel() != n_rows * k:  # NaN, which is no smaller and no larger than anything
        return _selected(pre, k)
    pattern = Pattern(
        torch.arange(0, n_rows * k + 1, k, dtype=torch.int32, device=pre.device),
        torch.remainder(flat, n_cols).int(),
        n_cols,
    )
    pattern.__dict__["flat"] = flat
    return pattern


def _candidates(pre: Tensor, k: int, size: int) -> Tensor:
    """Flat positions of the entries that may be among the k largest of their row."""
    groups = pre.shape[1] // size
    largest = pre[:, : groups * size].unflatten(1, (size, groups)).amax(1)
    least = kth_largest(largest, k)
    if not _numpy_knows(pre):
        return positions(pre >= least)
    return torch.from_numpy(
        np.flatnonzero(pre.numpy() >= least.numpy())
    )  # NumPy compares in two thirds of torch's time, as above


def _numpy_knows(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)


def _above(values: Tensor, low: float) -> Tensor:
    """Positions in a flat tensor of what is larger than ``low``."""
    return (
        torch.from_numpy(np.flatnonzero(values.numpy() > low))
        if _numpy_knows(values)
        else positions(values > low)
    )


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest entry of every row of (R, C), as (R, 1); NaN counts as larger than any number."""
    if not _numpy_knows(values):
        return values.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    place = (
        values.shape[1] - k
    )  # NumPy's partition is vectorised: a tenth of the time of torch's topk on a CPU
    return torch.from_numpy(
        np.partition(values.detach().numpy(), place, axis=1)[:, place : place + 1]
    )


def _selected(values: Tensor, k: int) -> Pattern:
    """:func:`top_k` in the plain way, with every entry looked at."""
    return Pattern.from_mask(top_mask(values, k))


def top_mask(values: Tensor, k: int) -> Tensor:
    """Where the k largest entries of every row of (B, F) are, as booleans; among equal values the first columns win."""
    least, wanted = kth_largest(values, k), len(values) * k
    mask = values >= least
    if int(torch.count_nonzero(mask)) == wanted:
        return mask
    mask, ties = values > least, values == least
    mask |= ties & (ties.cumsum(1) <= (k - mask.sum(1))[:, None])
    if int(torch.count_nonzero(mask)) == wanted:
        return mask
    # NaN compares with nothing; the loss will name it
    return torch.zeros_like(mask).scatter_(1, values.topk(k, dim=1, sorted=False).indices, True)


def batch_top_k(pre: Tensor, n: int, guess: float | None = None) -> tuple[Pattern, float]:
    """The n largest positive entries of the whole matrix (fewer if fewer are positive), and the smallest value kept.

    ``guess``, the smallest value kept in the last step, spares a selection over all of (B, F): entries above a little less than it are
    compressed first. The result does not depend on it; among equal values the first in memory order win.
    """
    flat_pre = pre.view(-1)
    if guess is None and flat_pre.numel() > SAMPLE:
        sample = flat_pre[:: flat_pre.numel() // SAMPLE | 1]  # an odd stride visits all columns
        guess = float(
            sample.kthvalue(max(len(sample) - round(len(sample) * n / flat_pre.numel()), 1)).values
        )
    for low in [0.9 * guess, 0.5 * guess, 0.0] if guess and guess > 0 else [0.0]:
        flat = _above(flat_pre, low)
        if flat.numel() >= n or low == 0.0:
            break
    values = flat_pre.index_select(0, flat)
    if flat.numel() <= n:
        return Pattern.from_flat(flat, *pre.shape), float(values.min()) if flat.numel() else 0.0
    least = kth_largest(values[None], n)[0, 0]
    keep = values > least
    ties = (values == least).nonzero().squeeze(1)
    keep[ties[: n - int(torch.count_nonzero(keep))]] = True
    return Pattern.from_flat(flat.masked_select(keep), *pre.shape), float(least)
