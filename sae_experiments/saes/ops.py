"""Stateless maths shared by the variants: sparse encoding and decoding, auxiliary losses.

Shape letters: B rows, D `d_in`, O `d_out`, F `d_sae`, G nested parts of a code, n active entries.

A training step of a sparse code costs the encoder's product, 2BDF operations, plus terms in n
alone, because decoding and all gradients visit active entries only. With k active latents per row
and width D that is `2BDF + 8BkD` in place of `12BDF`.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_experiments.resources import cpu_has_bf16
from sae_experiments.saes.pattern import Pattern, bags
from sae_experiments.saes.selection import TILE, top_k, top_mask
from sae_experiments.saes.static import StaticPattern

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

#: Codes with a smaller share of active entries than this are handled sparsely.
SPARSE_BELOW = 0.1


#: Precisions of the encoder's matrix product in training.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Entries of an encoder matrix from which bfloat16 pays (docs/speed.md).
BF16_FROM = 1 << 19


def bf16_pays(weight: Tensor) -> bool:
    """True if a product with this matrix is faster in bfloat16 by more than rounding costs."""
    return weight.device.type == "cpu" and weight.numel() >= BF16_FROM and cpu_has_bf16()


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Compute large float32 products on a CPU with oneDNN where it is as exact and faster.

    The switch allows oneDNN to round to bfloat16. On processors without matrix units for that type
    it stays in float32, and is 2 to 2.4 times faster than the default library on AMD. A
    measurement, made once, decides if it stays in float32.
    """
    if not _onednn_keeps_float32():
        yield
        return
    # PyTorch makes this attribute when it is imported, where type checkers do not see it.
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def tensor_cores(precision: str) -> Iterator[None]:
    """Let a CUDA device multiply float32 matrices in TF32, unless `precision` is fp32.

    Products then have three digits. They decide which latents are active and make the gradients of
    dense codes; the values of sparse codes are computed anew in full precision.
    """
    if not torch.cuda.is_available():
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee" if precision == "fp32" else "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def rounds(weight: Tensor) -> bool:
    """True if `tensor_cores` rounds products on the device of this matrix."""
    return weight.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextmanager
def default_matmul() -> Iterator[None]:
    """Within `fast_matmul`, compute products as outside of it.

    For language models: with oneDNN, attention over short windows takes 2.5 times as long.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or getattr(matmul, "fp32_precision", "none") == "none":
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "none"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def _onednn_keeps_float32() -> bool:
    """Multiply two matrices with the switch on; True if the error is that of float32."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or not hasattr(matmul, "fp32_precision"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(256, 128, generator=generator)
    b = torch.randn(128, 256, generator=generator)
    exact = a.double() @ b.double()
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        return float((a @ b - exact).norm() / exact.norm()) < 1e-6
    finally:
        matmul.fp32_precision = before


def encoder_matmul(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """Compute `x weight^T + bias` without a graph.

    With a `weight` in bfloat16, x and the product are rounded to that type as well.

    Args:
        x: Rows (B, D).
        weight: (F, D), in the type of x or in bfloat16.
        bias: (F,).
        out: Matrix (B, F) that receives the result.

    Returns:
        `out`.
    """
    if weight.dtype != x.dtype:
        rows = max(TILE // len(weight), 1) if x.device.type == "cpu" else len(x)
        for x_part, out_part in zip(x.split(rows), out.split(rows), strict=True):
            out_part.copy_(torch.mm(x_part.to(weight.dtype), weight.t())).add_(bias)
        return out
    if x.device.type != "cpu":
        return torch.addmm(bias, x, weight.t(), out=out)
    with fast_matmul():
        return torch.mm(x, weight.t(), out=out).add_(bias)


def _csr_matmul(crow: Tensor, col: Tensor, values: Tensor, n_cols: int, dense: Tensor) -> Tensor:
    """Product (rows, d) of a sparse matrix (rows, n_cols) and a dense one (n_cols, d)."""
    # On a CPU, embedding_bag takes a third of the time of a sparse product.
    if values.is_cuda and _has_sparse_blas(values):
        shape = (crow.shape[0] - 1, n_cols)
        matrix = torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)
        return matrix @ dense
    return bags(crow, col, values, dense)


def _has_sparse_blas(t: Tensor) -> bool:
    """True if a library for sparse products covers the tensor's device and type."""
    if t.dtype != torch.float32:
        return False
    return t.is_cuda or (t.device.type == "cpu" and torch.backends.mkl.is_available())


def _times(pattern: Pattern, values: Tensor, dense: Tensor) -> Tensor:
    """Product (B, d) of a sparse code with `values` (n,) and a dense matrix (F, d)."""
    if isinstance(pattern, StaticPattern):
        return pattern.times(values, dense)
    return _csr_matmul(pattern.crow, pattern.col, values, pattern.n_cols, dense)


def _column_sums(pattern: Pattern, values: Tensor) -> Tensor:
    """Sum (F,) of the entries (n,) of every column."""
    if isinstance(pattern, StaticPattern):
        return pattern.column_sums(values)
    sums = torch.bincount(pattern.col, weights=values, minlength=pattern.n_cols)
    return sums.to(values.dtype)


def weight_gradient(pattern: Pattern, values: Tensor, dense: Tensor) -> Tensor:
    """`C^T dense` (F, d) for a sparse code C: the gradient of a weight, from active entries only.

    Args:
        pattern: Positions of the active entries of C (B, F).
        values: Their values (n,).
        dense: (B, d).
    """
    if isinstance(pattern, StaticPattern):
        return pattern.transposed_times(values, dense)
    crow, row, order = pattern.transposed
    return _csr_matmul(crow, row, values.index_select(0, order), pattern.n_rows, dense)


def entry_products(pattern: Pattern, left: Tensor, right: Tensor) -> Tensor:
    """Inner product `left[row] . right[col]` of every active entry, (n,).

    Args:
        pattern: Positions of the active entries of a matrix (B, F).
        left: (B, d).
        right: (F, d).
    """
    if isinstance(pattern, StaticPattern):
        return pattern.products(left, right)
    if _has_sparse_blas(left):
        zeros = torch.sparse_csr_tensor(
            pattern.crow,
            pattern.col,
            left.new_zeros(pattern.col.shape[0]),
            (pattern.n_rows, pattern.n_cols),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(zeros, left, right.t(), beta=0.0).values()
    chunks = zip(pattern.row.split(1 << 14), pattern.col.split(1 << 14), strict=True)
    products = [(left[row] * right[col]).sum(1) for row, col in chunks]
    return torch.cat(products) if products else left.new_zeros(0)


@torch.no_grad()
def exact_entries(pattern: Pattern, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x W^T + bias` at the active entries (n,), in full precision and for these entries alone.

    Args:
        pattern: Positions of the active entries of a matrix (B, F).
        x: Rows (B, D).
        weight: (F, D).
        bias: (F,).
    """
    return entry_products(pattern, x, weight) + bias.index_select(0, pattern.col)


class _Entries(torch.autograd.Function):
    """Pre-activations of the active entries, whose gradients visit these entries only."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, pre: Tensor, pattern: Pattern
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pattern = pattern
        return pattern.gather(pre) if pre.ndim == 2 else pre.view_as(pre)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        x, weight = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = _times(pattern, grad, weight)
        if ctx.needs_input_grad[1]:
            grad_w = weight_gradient(pattern, grad, x)
        if ctx.needs_input_grad[2]:
            grad_b = _column_sums(pattern, grad)
        return grad_x, grad_w, grad_b, None, None


class _Masked(torch.autograd.Function):
    """Dense counterpart of `_Entries`: pre-activations where `mask` holds, zero elsewhere.

    The forward pass reuses a product that has been computed already.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, pre: Tensor, mask: Tensor) -> Tensor:
        mask = mask.to(pre.dtype)
        ctx.save_for_backward(x, weight, mask)
        return _where(mask, pre)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        x, weight, mask = ctx.saved_tensors
        grad = _where(mask, grad)
        with fast_matmul():
            grad_x = grad @ weight if ctx.needs_input_grad[0] else None
            grad_w = grad.t() @ x if ctx.needs_input_grad[1] else None
        grad_b = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_b, None, None


class _Where(torch.autograd.Function):
    """`values` where `mask` is 1.0, zero where it is 0.0."""

    @staticmethod
    def forward(ctx, values: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return _where(mask, values)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        return _where(ctx.saved_tensors[0], grad), None


def _where(mask: Tensor, values: Tensor) -> Tensor:
    """`torch.where(mask, values, 0)` for a mask of 0.0 and 1.0.

    ReLU's backward pass computes this, and is ten times faster than `torch.where` on a CPU.
    """
    return torch.ops.aten.threshold_backward(values, mask, 0.5)


class _Decode(torch.autograd.Function):
    """`sum_j z_j W_dec[j]` over the active entries of each row."""

    @staticmethod
    def forward(ctx, values: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.pattern = pattern
        return _times(pattern, values, weight)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        values, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_values = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_values = entry_products(ctx.pattern, grad, weight)
        if ctx.needs_input_grad[1]:
            grad_w = weight_gradient(ctx.pattern, values, grad)
        return grad_values, grad_w, None


class _DenseDecode(torch.autograd.Function):
    """`C W_dec` for a dense code C; all three products use `fast_matmul`."""

    @staticmethod
    def forward(ctx, values: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, weight)
        with fast_matmul():
            return values @ weight

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        values, weight = ctx.saved_tensors
        with fast_matmul():
            grad_values = grad @ weight.t() if ctx.needs_input_grad[0] else None
            grad_w = values.t() @ grad if ctx.needs_input_grad[1] else None
        return grad_values, grad_w


def entries(
    x: Tensor, weight: Tensor, bias: Tensor, pre: Tensor, support: Pattern | Tensor
) -> Tensor:
    """Differentiable `x W^T + bias` at the active entries.

    Args:
        x: Rows (B, D).
        weight: (F, D).
        bias: (F,).
        pre: The same product, computed before without a graph: (B, F), or with a pattern its
            active entries (n,). It is read here and may be overwritten afterwards.
        support: A pattern, or a mask (B, F) of booleans or of 0.0 and 1.0.

    Returns:
        (n,) for a pattern; (B, F) with zeros outside the support for a mask.
    """
    function = _Entries if isinstance(support, Pattern) else _Masked
    return function.apply(x, weight, bias, pre, support)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` (B, F) where `mask` (B, F) holds, zero elsewhere; differentiable in `values`.

    The mask consists of booleans, or of 0.0 and 1.0.
    """
    return _Where.apply(values, mask.to(values.dtype))


def decode(values: Tensor, pattern: Pattern | None, weight: Tensor) -> Tensor:
    """Decode a code C to `C W_dec` (B, O); differentiable.

    Args:
        values: The code, dense (B, F), or its active entries (n,).
        pattern: Positions of the active entries; None for a dense code.
        weight: `W_dec` (F, O).
    """
    if pattern is None:
        return _DenseDecode.apply(values, weight)
    return _Decode.apply(values, weight, pattern)


def total(terms: Iterable[Tensor]) -> Tensor:
    """Sum of one or more tensors of the same shape, added in order."""
    return reduce(operator.add, terms)


def squared_error(recon: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of the squared distance, `mean_B ||y - yhat||^2`.

    It is a sum over the width, not a mean: all losses of the project are on this scale.
    """
    return (recon - target).square().sum() / target.shape[0]


class _PrefixSums(torch.autograd.Function):
    """`out_g = sum_{h <= g} parts_h`.

    The backward pass avoids the three temporary tensors of this size that `cumsum` takes.
    """

    @staticmethod
    def forward(ctx, parts: Tensor) -> Tensor:
        return parts.cumsum(1)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        grad = grad.clone()
        for g in range(grad.shape[1] - 2, -1, -1):
            grad[:, g] += grad[:, g + 1]
        return grad


def prefix_sums(parts: Tensor) -> Tensor:
    """Cumulative sums of `parts` (B, G, O) over G; differentiable."""
    return _PrefixSums.apply(parts)


class _LevelErrors(torch.autograd.Function):
    """Squared distances (G,) of levels (B, G, O) to one target (B, O).

    No differences are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, levels: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(levels, target)
        return torch.stack([(level - target).square().sum() for level in levels.unbind(1)])

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        levels, target = ctx.saved_tensors
        return (levels - target[:, None]).mul_(2 * grad[:, None]), None


def level_errors(levels: Tensor, target: Tensor) -> Tensor:
    """`squared_error` of each reconstruction of one target; differentiable in the reconstructions.

    Args:
        levels: Reconstructions (B, G, O).
        target: (B, O).

    Returns:
        Errors (G,).
    """
    return _LevelErrors.apply(levels, target) / target.shape[0]


def unexplained(e: Tensor, ehat: Tensor) -> Tensor:
    """`||e - ehat||^2 / ||e - mean e||^2`: share of rows (B, O) that reconstructions miss."""
    return (e - ehat).square().sum() / (e - e.mean(0)).square().sum().clamp_min(1e-12)


def aux_k(
    x: Tensor, residual: Tensor, w_enc: Tensor, bias: Tensor, w_dec: Tensor, k: int
) -> Tensor:
    """AuxK (Gao et al. 2024, arXiv 2406.04093): share of the residual that dead latents miss.

    `||e - ehat||^2 / ||e - mean e||^2`, where e is the detached residual and ehat its
    reconstruction from the `k` largest pre-activations of dead latents, without a decoder bias.
    Pre-activations are leaky (slope 0.1 below zero), so that latents whose pre-activations are
    negative everywhere still get a gradient.

    Args:
        x: Inputs (B, D).
        residual: Targets minus reconstructions (B, O).
        w_enc: Encoder rows of the dead latents (F_dead, D).
        bias: Their encoder biases (F_dead,).
        w_dec: Their decoder rows (F_dead, O).
        k: Dead latents used per row.
    """
    e = residual.detach()
    x = x.detach()
    pre = encoder_matmul(x, w_enc.detach(), bias.detach(), out=x.new_empty(len(x), len(w_enc)))
    if k < SPARSE_BELOW * pre.shape[1]:
        pattern = top_k(pre, k)
        active_pre = entries(x, w_enc, bias, pre, pattern)
    else:
        pattern = None
        mask = top_mask(pre, k) if k < pre.shape[1] else torch.ones_like(pre)
        active_pre = entries(x, w_enc, bias, pre, mask)
    ehat = decode(F.leaky_relu(active_pre, 0.1), pattern, w_dec)
    return unexplained(e, ehat)


def aux_k_masked(
    x: Tensor, residual: Tensor, w_enc: Tensor, bias: Tensor, w_dec: Tensor, k: int, dead: Tensor
) -> Tensor:
    """`aux_k` without a look at which latents are dead, for `static.shapes()`.

    Products are dense: with half as many entries per row as the rows are wide, reading the rows of
    their latents would take longer.

    Args:
        x: Inputs (B, D).
        residual: Targets minus reconstructions (B, O).
        w_enc: Encoder rows (F, D) of all latents.
        bias: Their encoder biases (F,).
        w_dec: Their decoder rows (F, O).
        k: Dead latents used per row.
        dead: Boolean (F,); with no dead latents the result is 0.
    """
    e = residual.detach()
    x = x.detach()
    pre = encoder_matmul(x, w_enc.detach(), bias.detach(), out=x.new_empty(len(x), len(w_enc)))
    mask = top_mask(pre.masked_fill_(~dead, -torch.inf), min(k, len(w_enc))) & dead
    mask = mask.to(pre.dtype)
    acts = masked(F.leaky_relu(entries(x, w_enc, bias, pre, mask), 0.1), mask)
    ehat = decode(acts, None, w_dec)
    return unexplained(e, ehat) * dead.any()


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """Point (D,) with the smallest sum of distances to the rows, by Weiszfeld's algorithm.

    An iterate that coincides with a row does no harm.

    Args:
        x: Rows (N, D).
        iterations: Maximum number of iterations.
        tolerance: Length of an update, in units of x, below which the iteration stops.
    """
    y = x.mean(0)
    for _ in range(iterations):
        weights = 1 / (x - y).norm(dim=1).clamp_min(1e-8)
        new = (weights[:, None] * x).sum(0) / weights.sum()
        if (new - y).norm() < tolerance:
            return new
        y = new
    return y


def unit_rows(weight: Tensor) -> Tensor:
    """Rows (R, d) scaled to length 1; rows of zeros stay zero."""
    return weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-12)


def remove_radial(grad: Tensor, weight: Tensor) -> None:
    """Remove the component of each row of `grad` along that row of `weight`, in place.

    The rest of the gradient only turns the row. Both are (R, d); rows may have any length.
    """
    # Chunks of rows avoid a temporary tensor of the weight's size.
    for g, w in zip(grad.split(1024), weight.split(1024), strict=True):
        squared_norm = w.square().sum(1, keepdim=True).clamp_min(1e-12)
        g.addcmul_((g * w).sum(1, keepdim=True) / squared_norm, w, value=-1)
