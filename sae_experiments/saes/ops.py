"""Stateless maths shared by the variants: sparse encoding and decoding with sparse gradients, auxiliary losses.

Shape letters: B rows, D d_in, O d_out, F d_sae, n active entries. A step of a sparse code costs the encoder product 2BDF plus terms in
n alone (spec: 2Bdm + 8Bkd instead of 12Bdm), because decoding and all gradients visit active entries only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_experiments.saes.selection import TILE, Pattern, top_k, top_mask

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
    if (
        matmul is None
        or not hasattr(matmul, "fp32_precision")
        or not torch.backends.mkldnn.is_available()
    ):
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
    """``x weight^T + bias`` into ``out``, without a graph. With a ``weight`` in bfloat16, x is rounded to it as well, and so is the product."""
    if weight.dtype != x.dtype:
        rows = max(TILE // len(weight), 1) if x.device.type == "cpu" else len(x)
        for part, room in zip(x.split(rows), out.split(rows), strict=True):
            room.copy_(torch.mm(part.to(weight.dtype), weight.t())).add_(bias)
        return out
    if x.device.type != "cpu":
        return torch.addmm(bias, x, weight.t(), out=out)
    with fast_products():
        return torch.mm(x, weight.t(), out=out).add_(bias)


def _csr_matmul(crow: Tensor, col: Tensor, values: Tensor, n_cols: int, dense: Tensor) -> Tensor:
    """Sparse (rows, n_cols) times dense (n_cols, d)."""
    if values.is_cuda and _has_sparse_blas(
        values
    ):  # on a CPU bags of rows take a third of its time
        return (
            torch.sparse_csr_tensor(
                crow, col, values, (crow.shape[0] - 1, n_cols), check_invariants=False
            )
            @ dense
        )
    return F.embedding_bag(col, dense, crow[:-1], per_sample_weights=values, mode="sum")


def _has_sparse_blas(t: Tensor) -> bool:
    return t.dtype == torch.float32 and (
        t.is_cuda or (t.device.type == "cpu" and torch.backends.mkl.is_available())
    )


def weight_gradient(pattern: Pattern, values: Tensor, dense: Tensor) -> Tensor:
    """``C^T dense`` (F, d) for the sparse code C: the gradient of a weight from active entries only."""
    crow, row, order = pattern.transposed
    return _csr_matmul(crow, row, values.index_select(0, order), pattern.n_rows, dense)


def entry_products(pattern: Pattern, left: Tensor, right: Tensor) -> Tensor:
    """``left[row] . right[col]`` for every active entry, (n,); left (B, d), right (F, d)."""
    if _has_sparse_blas(left):
        zeros = torch.sparse_csr_tensor(
            pattern.crow,
            pattern.col,
            left.new_zeros(pattern.col.shape[0]),
            (pattern.n_rows, pattern.n_cols),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(zeros, left, right.t(), beta=0.0).values()
    out = [
        (left[r] * right[c]).sum(1)
        for r, c in zip(pattern.row.split(1 << 14), pattern.col.split(1 << 14), strict=True)
    ]
    return torch.cat(out) if out else left.new_zeros(0)


class _Entries(torch.autograd.Function):
    """Pre-activations at the active entries, with gradients for weight, bias and input from those entries only."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, pre: Tensor, pattern: Pattern
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pattern = pattern
        return pattern.at(pre) if pre.ndim == 2 else pre.view_as(pre)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        p: Pattern = ctx.pattern
        grad_x = (
            _csr_matmul(p.crow, p.col, grad, p.n_cols, weight) if ctx.needs_input_grad[0] else None
        )
        grad_w = weight_gradient(p, grad, x) if ctx.needs_input_grad[1] else None
        grad_b = (
            torch.bincount(p.col, weights=grad, minlength=p.n_cols).to(grad.dtype)
            if ctx.needs_input_grad[2]
            else None
        )
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


def entries(
    x: Tensor, weight: Tensor, bias: Tensor, pre: Tensor, support: Pattern | Tensor
) -> Tensor:
    """Differentiable ``x W^T + bias`` at ``support``: (n,) for a pattern, (B, F) with zeros outside for a mask (booleans, or 0.0 and 1.0).

    ``pre`` is the same product, already made without a graph (for a pattern its entries (n,) will do); it is read here and may be overwritten
    afterwards.
    """
    return (
        _Entries.apply(x, weight, bias, pre, support)
        if isinstance(support, Pattern)
        else _Masked.apply(x, weight, bias, pre, support)
    )


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` (B, F) where ``mask`` (B, F) holds (booleans, or 0.0 and 1.0), zero elsewhere; differentiable in ``values``."""
    return _Where.apply(values, mask.to(values.dtype))


def decode(values: Tensor, pattern: Pattern | None, weight: Tensor) -> Tensor:
    """``C W_dec`` (B, O) for the code C given densely (``pattern`` None) or by its active entries."""
    return (
        _DenseDecode.apply(values, weight)
        if pattern is None
        else _Decode.apply(values, weight, pattern)
    )


def squared_error(recon: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of the squared distance: ``mean_B ||y - yhat||^2`` (sum over d; the project's loss scale)."""
    return (recon - target).square().sum() / target.shape[0]


class _PrefixSums(torch.autograd.Function):
    """``out_g = sum_{h <= g} parts_h``; backwards without the three temporaries of its size that cumsum's takes."""

    @staticmethod
    def forward(ctx, parts: Tensor) -> Tensor:
        return parts.cumsum(1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.clone()
        for g in range(grad.shape[1] - 2, -1, -1):
            grad[:, g] += grad[:, g + 1]
        return grad


def prefix_sums(parts: Tensor) -> Tensor:
    """Running sums of (B, G, O) over G."""
    return _PrefixSums.apply(parts)


class _LevelErrors(torch.autograd.Function):
    """Squared distances of levels (B, G, O) to one target (B, O), (G,): keeps no difference for the way back."""

    @staticmethod
    def forward(ctx, levels: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(levels, target)
        return torch.stack([(level - target).square().sum() for level in levels.unbind(1)])

    @staticmethod
    def backward(ctx, grad: Tensor):
        levels, target = ctx.saved_tensors
        return (levels - target[:, None]).mul_(2 * grad[:, None]), None


def level_errors(levels: Tensor, target: Tensor) -> Tensor:
    """:func:`squared_error` of each of the reconstructions (B, G, O) of one target (B, O), (G,); differentiable in the reconstructions."""
    return _LevelErrors.apply(levels, target) / target.shape[0]


def aux_k(
    x: Tensor, residual: Tensor, w_enc: Tensor, bias: Tensor, w_dec: Tensor, k: int
) -> Tensor:
    """AuxK (Gao et al. 2024): how well the dead latents' ``k`` largest pre-activations explain what the live ones left over.

    ``||e - ehat||^2 / ||e - mean e||^2`` with e the detached ``residual``, no bias on either side, and leaky pre-activations (slope 0.1
    below zero), so that latents which are negative everywhere still get a gradient. The weights are the dead rows only.
    """
    e, x = residual.detach(), x.detach()
    pre = product(x, w_enc.detach(), bias.detach(), out=x.new_empty(len(x), len(w_enc)))
    if k < SPARSE_BELOW * pre.shape[1]:
        pattern = top_k(pre, k)
        ehat = decode(F.leaky_relu(entries(x, w_enc, bias, pre, pattern), 0.1), pattern, w_dec)
    else:
        mask = top_mask(pre, k) if k < pre.shape[1] else torch.ones_like(pre)
        ehat = decode(F.leaky_relu(entries(x, w_enc, bias, pre, mask), 0.1), None, w_dec)
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
    for g, w in zip(
        grad.split(1024), weight.split(1024), strict=True
    ):  # no temporary of the weight's size
        g.addcmul_(
            (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True).clamp_min(1e-12),
            w,
            value=-1,
        )
