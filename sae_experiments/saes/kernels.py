"""Triton kernels of sparse codes, for `saes.static`.

Every program writes rows of its own and adds in a fixed order, so that equal inputs give equal
bits. Triton's interpreter runs them on a CPU, slowly (`static.INTERPRETER`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Entries that a program reads at once.
ENTRIES = tl.constexpr(16)
#: Columns of the dense matrix that a program covers.
COLUMNS = 128
#: Entries of a piece of a segment.
PIECE = 64


@triton.jit
def _weighted_rows(
    begins,
    ends,
    col,
    values,
    dense,
    out,
    width,
    COLUMNS: tl.constexpr,
):
    """`out[i] = sum_e values[e] dense[col[e]]` over the entries e of segment i."""
    segment = tl.program_id(0).to(tl.int64)
    begin = tl.load(begins + segment)
    end = tl.load(ends + segment)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        here = entry < end
        row = tl.load(col + entry, mask=here, other=0).to(tl.int64)
        value = tl.load(values + entry, mask=here, other=0.0)
        part = tl.load(
            dense + row[:, None] * width + columns[None, :],
            mask=here[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(value[:, None] * part, 0)
    tl.store(out + segment * width + columns, total, mask=inside)


@triton.jit
def _entry_products(
    row,
    col,
    left,
    right,
    out,
    n,
    width,
    COLUMNS: tl.constexpr,
):
    """`out[e] = left[row[e]] . right[col[e]]`."""
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    here = entry < n
    i = tl.load(row + entry, mask=here, other=0).to(tl.int64)
    j = tl.load(col + entry, mask=here, other=0).to(tl.int64)
    total = tl.zeros((ENTRIES,), tl.float32)
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = here[:, None] & (columns < width)[None, :]
        a = tl.load(left + i[:, None] * width + columns[None, :], mask=mask, other=0.0)
        b = tl.load(right + j[:, None] * width + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(a * b, 1)
    tl.store(out + entry, total, mask=here)


def weighted_rows(
    begins: Tensor, ends: Tensor, col: Tensor, values: Tensor, dense: Tensor
) -> Tensor:
    """Weighted sums of rows of a matrix, `sum_e values[e] dense[col[e]]` for every segment.

    Args:
        begins: First entry of every segment, (S,).
        ends: End of every segment, (S,); a segment that ends where it begins, or before, is empty.
        col: Row of `dense` of every entry, (n,).
        values: Weight of every entry, (n,).
        dense: (R, d).

    Returns:
        (S, d).
    """
    dense = dense.contiguous()
    width = dense.shape[1]
    out = dense.new_empty(len(begins), width)
    columns = min(COLUMNS, triton.next_power_of_2(width))
    grid = (len(begins), triton.cdiv(width, columns))
    if len(begins):
        _weighted_rows[grid](begins, ends, col, values.contiguous(), dense, out, width, columns)
    return out


def pieces(crow: Tensor, n: int) -> tuple[Tensor, ...]:
    """Cut segments into pieces of at most `PIECE` entries.

    A program that went through a long segment alone would make all others wait.

    Args:
        crow: Start of every segment, and the end of the last one, (S + 1,).
        n: Number of entries.

    Returns:
        First entry and end of every piece (P,), with P = S + n / PIECE whatever the segments are;
        first piece and end of every segment (S,).
    """
    crow = crow.long()
    n_segments = len(crow) - 1
    n_pieces = torch.div(crow.diff() + PIECE - 1, PIECE, rounding_mode="floor")
    ends = n_pieces.cumsum(0)
    begins = ends - n_pieces
    piece = torch.arange(n_segments + n // PIECE, device=crow.device)
    # Pieces that no segment needs are empty ones behind the last segment.
    segment = torch.searchsorted(ends, piece, right=True).clamp_(max=n_segments - 1)
    first = crow.index_select(0, segment) + PIECE * (piece - begins.index_select(0, segment))
    last = torch.minimum(first + PIECE, crow.index_select(0, segment + 1))
    return first, last, begins, ends


def weighted_segments(
    cut: tuple[Tensor, ...], col: Tensor, values: Tensor, dense: Tensor
) -> Tensor:
    """`weighted_rows` of segments of any length: sums of their pieces, added in order.

    Args:
        cut: The segments as `pieces` gives them.
        col: Row of `dense` of every entry, (n,).
        values: Weight of every entry, (n,).
        dense: (R, d).

    Returns:
        (S, d).
    """
    first, last, begins, ends = cut
    parts = weighted_rows(first, last, col, values, dense)
    piece = torch.arange(len(first), device=first.device)
    return weighted_rows(begins, ends, piece, values.new_ones(len(first)), parts)


def entry_products(row: Tensor, col: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Inner product `left[row] . right[col]` of every entry.

    Args:
        row: (n,).
        col: (n,).
        left: (R, d).
        right: (S, d).

    Returns:
        (n,).
    """
    left, right = left.contiguous(), right.contiguous()
    n, width = len(row), left.shape[1]
    out = left.new_empty(n)
    columns = min(COLUMNS, triton.next_power_of_2(width))
    if n:
        _entry_products[(triton.cdiv(n, ENTRIES.value),)](
            row, col, left, right, out, n, width, columns
        )
    return out
