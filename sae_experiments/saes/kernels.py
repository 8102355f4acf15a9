"""Triton kernels of sparse and dense codes, for `saes.static` and `saes.fused`.

Every program writes rows of its own and adds in a fixed order, so that equal inputs give equal
bits. Triton's interpreter runs them on a CPU, slowly (`static.INTERPRETER`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_experiments.saes.types import DenseForm

#: Entries that a program reads at once.
ENTRIES = tl.constexpr(16)
#: Columns of the dense matrix that a program covers.
COLUMNS = 128
#: Entries of a piece of a segment.
PIECE = 64
#: Rows of a dense code whose sums one program adds up.
CHUNK = 256
#: Rows and columns of it that a program reads at once.
TILE = (16, 128)

#: `triton.jit` for a function that kernels call; its own annotation says that it never returns.
_inlined = cast(Callable[[Any], Any], triton.jit)


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


@_inlined
def _of_columns(scale, shift, bias, columns, inside, FORM: tl.constexpr):
    """The parameters of a form that it has; 0 for the others."""
    s = tl.zeros_like(columns).to(tl.float32)
    t = s
    b = s
    if FORM != "relu":
        s = tl.load(scale + columns, mask=inside, other=0.0)
    if FORM == "gated":
        t = tl.load(shift + columns, mask=inside, other=0.0)
        b = tl.load(bias + columns, mask=inside, other=0.0)
    return s, t, b


@_inlined
def _tile(first, columns, n_rows, n_cols, ROWS: tl.constexpr):
    """Places of some rows and columns of a matrix, and which of them exist."""
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    here = (row < n_rows)[:, None] & (columns < n_cols)[None, :]
    return here, row[:, None] * n_cols + columns[None, :]


@triton.jit
def _code(  # noqa: PLR0913 (pointers and sizes)
    pre,
    scale,
    shift,
    bias,
    values,
    gate,
    counted,
    fires,
    n_rows,
    n_cols,
    FORM: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Code of a chunk of rows, with sums over the chunk. See `dense_code`."""
    chunk = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n_cols
    s, t, b = _of_columns(scale, shift, bias, columns, inside, FORM)
    total = tl.zeros((COLUMNS,), tl.float32)
    n_active = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, CHUNK, ROWS):
        here, place = _tile(chunk * CHUNK + first, columns, n_rows, n_cols, ROWS)
        a = tl.load(pre + place, mask=here, other=-1.0)
        if FORM == "relu":
            z = tl.where(here & (a > 0), a, 0.0)
            total += tl.sum(z, 0)
        elif FORM == "jump":
            on = here & (a > s[None, :])
            z = tl.where(on, a, 0.0)
            total += tl.sum(on.to(tl.float32), 0)
        else:
            on = here & (a > 0)
            g = tl.where(on, a, 0.0)
            z = tl.where(on, tl.maximum(s[None, :] * (a - t[None, :]) + b[None, :], 0.0), 0.0)
            tl.store(gate + place, g, mask=here)
            total += tl.sum(g, 0)
        tl.store(values + place, z, mask=here)
        n_active += tl.sum((z != 0).to(tl.int32), 0)
    part = chunk * n_cols + columns
    tl.store(counted + part, total, mask=inside)
    tl.store(fires + part, n_active, mask=inside)


@triton.jit
def _code_gradient(  # noqa: PLR0913 (pointers and sizes)
    pre,
    scale,
    shift,
    bias,
    grad_values,
    grad_gate,
    grad_counted,
    grad_pre,
    sums,
    n_rows,
    n_cols,
    half_width,
    FORM: tl.constexpr,
    THROUGH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of a chunk of pre-activations, with sums over the chunk. See `dense_gradient`."""
    chunk = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n_cols
    of_sum = tl.load(grad_counted)
    s, t, b = _of_columns(scale, shift, bias, columns, inside, FORM)
    of_pre = tl.zeros((COLUMNS,), tl.float32)
    of_scale = tl.zeros((COLUMNS,), tl.float32)
    of_bias = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, CHUNK, ROWS):
        here, place = _tile(chunk * CHUNK + first, columns, n_rows, n_cols, ROWS)
        a = tl.load(pre + place, mask=here, other=-1.0)
        grad = tl.load(grad_values + place, mask=here, other=0.0)
        if FORM == "relu":
            d = tl.where(here & (a > 0), grad + of_sum, 0.0)
        elif FORM == "jump":
            passes = here & (a > s[None, :])
            near = here & (tl.abs(a - s[None, :]) < half_width)
            if THROUGH:
                d = tl.where(passes | near, grad, 0.0)
            else:
                d = tl.where(passes, grad, 0.0)
            # dz/dtheta is -theta/eps in the window, and that of the step -1/eps.
            slope = -(grad * s[None, :] + of_sum) / (2 * half_width)
            of_scale += tl.sum(tl.where(near, slope, 0.0), 0)
        else:
            on = here & (a > 0)
            m = s[None, :] * (a - t[None, :]) + b[None, :]
            dm = tl.where(on & (m > 0), grad, 0.0)
            more = tl.load(grad_gate + place, mask=here, other=0.0)
            d = dm * s[None, :] + tl.where(on, more + of_sum, 0.0)
            of_scale += tl.sum(dm * (a - t[None, :]), 0)
            of_bias += tl.sum(dm, 0)
        tl.store(grad_pre + place, d, mask=here)
        of_pre += tl.sum(d, 0)
    n_sums = tl.num_programs(1) * n_cols
    part = chunk * n_cols + columns
    tl.store(sums + part, of_pre, mask=inside)
    tl.store(sums + n_sums + part, of_scale, mask=inside)
    tl.store(sums + 2 * n_sums + part, of_bias, mask=inside)


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


def dense_code(pre: Tensor, form: DenseForm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A dense code in one pass over the pre-activations.

    Args:
        pre: (B, F).
        form: How the code follows from them.

    Returns:
        The code z (B, F); the gate (B, F), empty but for `gated`; the sum of what is counted, a
        scalar; and the number of rows in which z is not 0, (F,) int32.
    """
    n_rows, n_cols = pre.shape
    values = torch.empty_like(pre)
    gate = torch.empty_like(pre) if form.name == "gated" else pre.new_empty(0)
    n_chunks = -(-n_rows // CHUNK)
    counted = pre.new_empty(n_chunks, n_cols)
    fires = torch.empty(n_chunks, n_cols, dtype=torch.int32, device=pre.device)
    scale, shift, bias = _parameters(pre, form)
    rows, columns = TILE
    grid = (triton.cdiv(n_cols, columns), n_chunks)
    launch: Any = _code[grid]
    launch(
        pre,
        scale,
        shift,
        bias,
        values,
        gate,
        counted,
        fires,
        n_rows,
        n_cols,
        form.name,
        CHUNK,
        rows,
        columns,
    )
    return values, gate, counted.sum(), fires.sum(0, dtype=torch.int32)


def _parameters(pre: Tensor, form: DenseForm) -> list[Tensor]:
    """Parameters of a form; in place of one that it lacks, something that is not read."""
    parameters = (form.scale, form.shift, form.bias)
    return [pre if p is None else p.contiguous() for p in parameters]


def dense_gradient(
    pre: Tensor, form: DenseForm, grad_values: Tensor, grad_gate: Tensor, grad_counted: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `dense_code`, in one pass.

    Args:
        pre: (B, F).
        form: How the code follows from them.
        grad_values: (B, F).
        grad_gate: (B, F) for `gated`.
        grad_counted: Scalar.

    Returns:
        Gradients of `pre` (B, F), of the sum of its rows (F,), and of `scale` and `bias` (F,). That
        of `shift` is `-scale` times that of `bias`.
    """
    n_rows, n_cols = pre.shape
    grad_values = grad_values.contiguous()
    n_chunks = -(-n_rows // CHUNK)
    grad_pre = torch.empty_like(pre)  # autograd may still need that of the values
    sums = pre.new_empty(3, n_chunks, n_cols)
    scale, shift, bias = _parameters(pre, form)
    rows, columns = TILE
    grid = (triton.cdiv(n_cols, columns), n_chunks)
    launch: Any = _code_gradient[grid]
    launch(
        pre,
        scale,
        shift,
        bias,
        grad_values,
        grad_gate.contiguous(),
        grad_counted,
        grad_pre,
        sums,
        n_rows,
        n_cols,
        form.width / 2,
        form.name,
        form.through,
        CHUNK,
        rows,
        columns,
    )
    of_pre, of_scale, of_bias = sums.sum(1)
    return grad_pre, of_pre, of_scale, of_bias
