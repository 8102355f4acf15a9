"""Stateless maths shared by the variants: exact selection, sparse encoding and decoding with sparse gradients, auxiliary losses.

Shape letters: B rows, D d_in, O d_out, F d_sae, n active entries. A step of a sparse code costs the encoder product 2BDF plus terms in
n alone (spec: 2Bdm + 8Bkd instead of 12Bdm), because decoding and all gradients visit active entries only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

#: Codes with a smaller share of active entries than this are handled sparsely.
SPARSE_BELOW = 0.1
#: Entries of a matrix that are worked on while they are in the cache.
TILE = 1 << 21
#: Entries from which a first guess at a threshold is made.
SAMPLE = 1 << 18


@contextmanager
def fast_products() -> Iterator[None]:
    """Within the context, large float32 products on a CPU go through oneDNN where that computes the same in less time.

    The switch allows oneDNN to round to bf16; on processors without matrix units for it, oneDNN stays in float32 and is 2 to 2.4 times
    faster than the default library on AMD. Whether it stays in float32 is measured once, not assumed.
    """
    if not _onednn_keeps_float32():
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def _onednn_keeps_float32() -> bool:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or not hasattr(matmul, "fp32_precision") or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 128, generator=generator), torch.randn(128, 256, generator=generator)
    exact = a.double() @ b.double()
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        return float((a @ b - exact).norm() / exact.norm()) < 1e-6
    finally:
        matmul.fp32_precision = before


def product(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """``x weight^T + bias`` into ``out``, without a graph."""
    if x.device.type != "cpu":
        return torch.addmm(bias, x, weight.t(), out=out)
    with fast_products():
        return torch.mm(x, weight.t(), out=out).add_(bias)


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
        return torch.repeat_interleave(torch.arange(self.n_rows, device=self.col.device), self.crow.diff(), output_size=self.col.shape[0])

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
        order = torch.argsort(self.col, stable=True)
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
    def from_mask(mask: Tensor) -> Pattern:
        """From a (B, F) boolean mask."""
        return Pattern.from_flat(positions(mask), *mask.shape)


def positions(mask: Tensor) -> Tensor:
    """Where a contiguous ``mask`` is true, as ascending positions (n,) in the flattened tensor."""
    if mask.device.type != "cpu":
        return mask.view(-1).nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))  # a third of the time of torch's where few entries are true


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
    if size == 1:
        return _selected(pre, k)
    chunk = max(1, TILE // n_cols)
    flat = torch.cat([_candidates(part, k, size).add_(i * chunk * n_cols) for i, part in enumerate(pre.split(chunk))])
    row = torch.div(flat, n_cols, rounding_mode="floor")
    counts = torch.bincount(row, minlength=n_rows)
    width = int(counts.max())
    first = torch.arange(n_rows, device=pre.device) * width - (counts.cumsum(0) - counts)
    values = pre.view(-1).index_select(0, flat)
    narrow = torch.full((n_rows, width), -torch.inf, dtype=pre.dtype, device=pre.device)
    narrow.view(-1).index_copy_(0, torch.arange(flat.numel(), device=pre.device).add_(first.index_select(0, row)), values)
    least = kth_largest(narrow, k).squeeze(1) if width >= k else values.new_full((n_rows,), torch.nan)
    least = least.index_select(0, row)
    keep = values >= least
    if int(torch.count_nonzero(keep)) > n_rows * k:  # equal values at the edge of a row: the first of them stay
        ties = values == least
        excess = torch.bincount(row.masked_select(keep), minlength=n_rows) - k
        seen = ties.cumsum(0)
        behind = seen.index_select(0, counts.cumsum(0) - 1).index_select(0, row) - seen  # ties to the right of this entry in its row
        keep &= ~ties | (behind >= excess.index_select(0, row))
    flat = flat.masked_select(keep)
    if flat.numel() != n_rows * k:  # NaN, which is no smaller and no larger than anything
        return _selected(pre, k)
    pattern = Pattern(torch.arange(0, n_rows * k + 1, k, dtype=torch.int32, device=pre.device), torch.remainder(flat, n_cols).int(), n_cols)
    pattern.__dict__["flat"] = flat
    return pattern


def _candidates(pre: Tensor, k: int, size: int) -> Tensor:
    """Flat positions of the entries that may be among the k largest of their row."""
    groups = pre.shape[1] // size
    largest = pre[:, : groups * size].unflatten(1, (size, groups)).amax(1)
    return positions(pre >= kth_largest(largest, k))


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest entry of every row of (R, C), as (R, 1); NaN counts as larger than any number."""
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return values.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    place = values.shape[1] - k  # NumPy's partition is vectorised: a tenth of the time of torch's topk on a CPU
    return torch.from_numpy(np.partition(values.detach().numpy(), place, axis=1)[:, place : place + 1])


def _selected(values: Tensor, k: int) -> Pattern:
    """:func:`top_k` in the plain way, with every entry looked at."""
    top = values.topk(k, dim=1, sorted=False)
    least = top.values.amin(1, keepdim=True)
    mask = values > least
    ties = values == least
    missing = k - mask.sum(1)
    mask |= ties if torch.equal(ties.sum(1), missing) else ties & (ties.cumsum(1) <= missing[:, None])
    flat = positions(mask)
    if len(flat) == len(values) * k:
        return Pattern.from_flat(flat, *values.shape)
    # NaN compares with nothing; the loss will name it
    crow = torch.arange(0, len(values) * k + 1, k, dtype=torch.int32, device=values.device)
    return Pattern(crow, top.indices.sort(1).values.view(-1).int(), values.shape[1])


def batch_top_k(pre: Tensor, n: int, guess: float | None = None) -> tuple[Pattern, float]:
    """The n largest positive entries of the whole matrix (fewer if fewer are positive), and the smallest value kept.

    ``guess``, the smallest value kept in the last step, spares a selection over all of (B, F): entries above a little less than it are
    compressed first. The result does not depend on it; among equal values the first in memory order win.
    """
    flat_pre = pre.view(-1)
    if guess is None and flat_pre.numel() > SAMPLE:
        sample = flat_pre[:: flat_pre.numel() // SAMPLE | 1]  # an odd stride visits all columns
        guess = float(sample.kthvalue(max(len(sample) - round(len(sample) * n / flat_pre.numel()), 1)).values)
    for low in [0.9 * guess, 0.5 * guess, 0.0] if guess and guess > 0 else [0.0]:
        flat = positions(flat_pre > low)
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


def _csr_matmul(crow: Tensor, col: Tensor, values: Tensor, n_cols: int, dense: Tensor) -> Tensor:
    """Sparse (rows, n_cols) times dense (n_cols, d)."""
    if values.is_cuda and _has_sparse_blas(values):  # on a CPU bags of rows take a third of the sparse product's time
        return torch.sparse_csr_tensor(crow, col, values, (crow.shape[0] - 1, n_cols), check_invariants=False) @ dense
    return F.embedding_bag(col, dense, crow[:-1], per_sample_weights=values, mode="sum")


def _has_sparse_blas(t: Tensor) -> bool:
    return t.dtype == torch.float32 and (t.is_cuda or (t.device.type == "cpu" and torch.backends.mkl.is_available()))


def weight_gradient(pattern: Pattern, values: Tensor, dense: Tensor) -> Tensor:
    """``C^T dense`` (F, d) for the sparse code C: the gradient of a weight from active entries only."""
    crow, row, order = pattern.transposed
    return _csr_matmul(crow, row, values.index_select(0, order), pattern.n_rows, dense)


def entry_products(pattern: Pattern, left: Tensor, right: Tensor) -> Tensor:
    """``left[row] . right[col]`` for every active entry, (n,); left (B, d), right (F, d)."""
    if _has_sparse_blas(left):
        zeros = torch.sparse_csr_tensor(
            pattern.crow, pattern.col, left.new_zeros(pattern.col.shape[0]), (pattern.n_rows, pattern.n_cols), check_invariants=False
        )
        return torch.sparse.sampled_addmm(zeros, left, right.t(), beta=0.0).values()
    out = [(left[r] * right[c]).sum(1) for r, c in zip(pattern.row.split(1 << 14), pattern.col.split(1 << 14), strict=True)]
    return torch.cat(out) if out else left.new_zeros(0)


class _Entries(torch.autograd.Function):
    """Pre-activations at the active entries, with gradients for weight, bias and input from those entries only."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, pre: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pattern = pattern
        return pattern.at(pre)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        p: Pattern = ctx.pattern
        grad_x = _csr_matmul(p.crow, p.col, grad, p.n_cols, weight) if ctx.needs_input_grad[0] else None
        grad_w = weight_gradient(p, grad, x) if ctx.needs_input_grad[1] else None
        grad_b = torch.bincount(p.col, weights=grad, minlength=p.n_cols).to(grad.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_b, None, None


class _Masked(torch.autograd.Function):
    """The dense twin of :class:`_Entries`: pre-activations where ``mask`` holds, zero elsewhere; reuses the product already made."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, pre: Tensor, mask: Tensor) -> Tensor:
        mask = mask.to(pre.dtype)
        ctx.save_for_backward(x, weight, mask)
        return _where(mask, pre)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, mask = ctx.saved_tensors
        grad = _where(mask, grad)
        with fast_products():
            grad_x = grad @ weight if ctx.needs_input_grad[0] else None
            grad_w = grad.t() @ x if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, grad.sum(0) if ctx.needs_input_grad[2] else None, None, None


class _Where(torch.autograd.Function):
    """``values`` where ``mask`` (0.0 or 1.0) holds, zero elsewhere."""

    @staticmethod
    def forward(ctx, values: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return _where(mask, values)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _where(ctx.saved_tensors[0], grad), None


def _where(mask: Tensor, values: Tensor) -> Tensor:
    """``torch.where(mask, values, 0)`` for a mask of floats: the backward pass of ReLU is this, and ten times faster on a CPU."""
    return torch.ops.aten.threshold_backward(values, mask, 0.5)


class _Decode(torch.autograd.Function):
    """``sum_j z_j W_dec[j]`` over the active entries."""

    @staticmethod
    def forward(ctx, values: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.pattern = pattern
        return _csr_matmul(pattern.crow, pattern.col, values, pattern.n_cols, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        values, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_values = entry_products(ctx.pattern, grad, weight) if ctx.needs_input_grad[0] else None
        grad_w = weight_gradient(ctx.pattern, values, grad) if ctx.needs_input_grad[1] else None
        return grad_values, grad_w, None


class _DenseDecode(torch.autograd.Function):
    """``C W_dec`` for a dense code; all three products on the fast path."""

    @staticmethod
    def forward(ctx, values: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, weight)
        with fast_products():
            return values @ weight

    @staticmethod
    def backward(ctx, grad: Tensor):
        values, weight = ctx.saved_tensors
        with fast_products():
            grad_values = grad @ weight.t() if ctx.needs_input_grad[0] else None
            return grad_values, values.t() @ grad if ctx.needs_input_grad[1] else None


def entries(x: Tensor, weight: Tensor, bias: Tensor, pre: Tensor, support: Pattern | Tensor) -> Tensor:
    """Differentiable ``x W^T + bias`` at ``support``: (n,) for a pattern, (B, F) with zeros outside for a mask (booleans, or 0.0 and 1.0).

    ``pre`` is the same product, already made without a graph; it is read here and may be overwritten afterwards.
    """
    return _Entries.apply(x, weight, bias, pre, support) if isinstance(support, Pattern) else _Masked.apply(x, weight, bias, pre, support)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` (B, F) where ``mask`` (B, F) holds (booleans, or 0.0 and 1.0), zero elsewhere; differentiable in ``values``."""
    return _Where.apply(values, mask.to(values.dtype))


def decode(values: Tensor, pattern: Pattern | None, weight: Tensor) -> Tensor:
    """``C W_dec`` (B, O) for the code C given densely (``pattern`` None) or by its active entries."""
    return _DenseDecode.apply(values, weight) if pattern is None else _Decode.apply(values, weight, pattern)


def squared_error(recon: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of the squared distance: ``mean_B ||y - yhat||^2`` (sum over d; the project's loss scale)."""
    return (recon - target).square().sum() / target.shape[0]


def aux_k(x: Tensor, residual: Tensor, w_enc: Tensor, bias: Tensor, w_dec: Tensor, k: int) -> Tensor:
    """AuxK (Gao et al. 2024): how well the dead latents' ``k`` largest pre-activations explain what the live ones left over.

    ``||e - ehat||^2 / ||e - mean e||^2`` with e the detached ``residual``, no bias on either side, and leaky pre-activations (slope 0.1
    below zero), so that latents which are negative everywhere still get a gradient. The weights are the dead rows only.
    """
    e = residual.detach()
    pre = F.linear(x, w_enc, bias)
    if k < pre.shape[1]:
        pattern = top_k(pre.detach(), k)
        ehat = decode(F.leaky_relu(pattern.at(pre), 0.1), pattern, w_dec)
    else:
        ehat = F.leaky_relu(pre, 0.1) @ w_dec
    return (e - ehat).square().sum() / (e - e.mean(0)).square().sum().clamp_min(1e-12)


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """Weiszfeld's point with the least summed distance to the rows of x (N, D); a row that is hit exactly does no harm."""
    y = x.mean(0)
    for _ in range(iterations):
        w = 1 / (x - y).norm(dim=1).clamp_min(1e-8)
        new = (w[:, None] * x).sum(0) / w.sum()
        if (new - y).norm() < tolerance:
            return new
        y = new
    return y


def unit_rows(weight: Tensor) -> Tensor:
    """Rows scaled to length 1."""
    return weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-8)


def remove_radial(grad: Tensor, weight: Tensor) -> None:
    """Take the part of ``grad`` along each row of ``weight`` (unit or not) out, in place: what is left only turns the row."""
    scale = (grad * weight).sum(1, keepdim=True) / weight.square().sum(1, keepdim=True).clamp_min(1e-12)
    grad.addcmul_(scale, weight, value=-1)
