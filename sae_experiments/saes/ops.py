"""Stateless maths shared by the variants: exact selection, sparse encoding and decoding with sparse gradients, auxiliary losses.

Shape letters: B rows, D d_in, O d_out, F d_sae, n active entries. A step of a sparse code costs the encoder product 2BDF plus terms in
n alone (spec: 2Bdm + 8Bkd instead of 12Bdm), because decoding and all gradients visit active entries only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

#: Codes with a smaller share of active entries than this are handled sparsely.
SPARSE_BELOW = 0.1


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
        return Pattern.from_flat(mask.view(-1).nonzero().squeeze(1), *mask.shape)


def top_k(pre: Tensor, k: int) -> Pattern:
    """The k largest entries of every row of (B, F); among equal values the first columns win."""
    return guided_top_k(pre, k, None)[0]


def guided_top_k(pre: Tensor, k: int, guess: float | None) -> tuple[Pattern, float]:
    """:func:`top_k`, and a guess for the next call: a value that about nine rows in ten have k entries above.

    Entries above ``guess`` are compressed into a narrow matrix before selection; rows with fewer than k of them are selected from whole. The
    result does not depend on the guess.
    """
    n_rows, n_cols = pre.shape
    cols = torch.empty(n_rows, k, dtype=torch.int64, device=pre.device)
    least = torch.empty(n_rows, dtype=pre.dtype, device=pre.device)
    whole: Tensor | slice = slice(None)
    if guess is not None:
        flat = (pre.view(-1) > guess).nonzero().squeeze(1)
        pattern = Pattern.from_flat(flat, n_rows, n_cols)
        counts = pattern.crow.diff()
        enough = counts >= k
        width = int(counts.max()) if flat.numel() else 0
        if 4 * width <= 3 * n_cols and int(torch.count_nonzero(enough)) * 2 >= n_rows:
            place = torch.arange(flat.numel(), device=pre.device) - pattern.crow.index_select(0, pattern.row) + pattern.row * width
            narrow = torch.full((n_rows, width), -torch.inf, dtype=pre.dtype, device=pre.device)
            narrow.view(-1)[place] = pattern.at(pre)
            column = torch.zeros(n_rows * width, dtype=torch.int64, device=pre.device)
            column[place] = pattern.col.long()
            rows = enough.nonzero().squeeze(1)
            chosen, least[rows] = _select(narrow[rows], k)
            cols[rows] = column.view(n_rows, width)[rows].gather(1, chosen)
            whole = (~enough).nonzero().squeeze(1)
    if isinstance(whole, slice) or whole.numel():
        cols[whole], least[whole] = _select(pre[whole], k)
    crow = torch.arange(0, n_rows * k + 1, k, dtype=torch.int32, device=pre.device)
    nearly_all = least.kthvalue(max(n_rows // 10, 1)).values
    return Pattern(crow, cols.view(-1).int(), n_cols), float(nearly_all)


def _select(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns (R, k), ascending, of the k largest entries of every row of (R, W), ties to the first; and the least value kept (R,)."""
    top = values.topk(k, dim=1, sorted=False)
    least = top.values.amin(1)
    mask = values > least[:, None]
    ties = values == least[:, None]
    missing = k - torch.count_nonzero(mask, 1)
    mask |= ties if torch.equal(torch.count_nonzero(ties, 1), missing) else ties & (ties.cumsum(1) <= missing[:, None])
    found = mask.nonzero()
    if len(found) != len(values) * k:  # NaN compares with nothing; the loss will name it
        return top.indices.sort(1).values, least
    return found[:, 1].view(-1, k), least


def batch_top_k(pre: Tensor, n: int, guess: float | None = None) -> tuple[Pattern, float]:
    """The n largest positive entries of the whole matrix (fewer if fewer are positive), and the smallest value kept.

    ``guess``, the smallest value kept in the last step, spares a selection over all of (B, F): entries above a little less than it are
    compressed first. The result does not depend on it; among equal values the first in memory order win.
    """
    flat_pre = pre.view(-1)
    for low in [0.9 * guess, 0.5 * guess, 0.0] if guess else [0.0]:
        flat = (flat_pre > low).nonzero().squeeze(1)
        if flat.numel() >= n or low == 0.0:
            break
    values = flat_pre.index_select(0, flat)
    if flat.numel() <= n:
        return Pattern.from_flat(flat, *pre.shape), float(values.min()) if flat.numel() else 0.0
    least = values.topk(n, sorted=False).values.min()
    keep = values > least
    ties = (values == least).nonzero().squeeze(1)
    keep[ties[: n - int(torch.count_nonzero(keep))]] = True
    return Pattern.from_flat(flat.masked_select(keep), *pre.shape), float(least)


def _csr_matmul(crow: Tensor, col: Tensor, values: Tensor, n_cols: int, dense: Tensor) -> Tensor:
    """Sparse (rows, n_cols) times dense (n_cols, d)."""
    if _has_sparse_blas(values):
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
        ctx.save_for_backward(x, weight, mask)
        return pre.where(mask, 0.0)  # a product with the mask would widen it to floats first

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, mask = ctx.saved_tensors
        grad = grad.where(mask, 0.0)
        with fast_products():
            grad_x = grad @ weight if ctx.needs_input_grad[0] else None
            grad_w = grad.t() @ x if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, grad.sum(0) if ctx.needs_input_grad[2] else None, None, None


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
    """Differentiable ``x W^T + bias`` at ``support``: (n,) for a pattern, (B, F) with zeros outside for a mask.

    ``pre`` is the same product, already made without a graph; it is read here and may be overwritten afterwards.
    """
    return _Entries.apply(x, weight, bias, pre, support) if isinstance(support, Pattern) else _Masked.apply(x, weight, bias, pre, support)


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
