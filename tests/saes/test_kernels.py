"""The Triton kernels, in Triton's interpreter on a CPU, against dense products and autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_experiments.saes import ops, static
from sae_experiments.saes.static import StaticPattern
from support.saes import batch as batch_of
from support.saes import make, step

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels, which run on a CPU as well."""
    monkeypatch.setattr(static, "INTERPRETER", True)
    return static._kernels()


#: Rows, latents, width and how entries are chosen. Widths are no powers of two.
SIZES = [(5, 7, 3), (16, 40, 24), (9, 130, 130), (200, 6, 5)]


def pattern(kind: str, n_rows: int, n_cols: int) -> StaticPattern:
    """A hard pattern: latents that never fire, that always do, and entries that do not count."""
    torch.manual_seed(n_rows)
    pre = torch.randn(n_rows, n_cols)
    pre[:, 0] = -10  # never fires
    pre[:, -1] = 10  # always does, in a segment as long as the batch
    if kind == "rows":
        return static.top_k(pre, min(4, n_cols))
    if kind == "batch":
        return static.batch_top_k(pre, 2 * n_rows)
    pre[n_rows // 2 :] = -1.0  # rows without any active latent, and too few positive entries
    pre[: n_rows // 2, 1:-1] = -1.0
    return static.batch_top_k(pre, 2 * n_rows)


@pytest.mark.parametrize("kind", ["rows", "batch", "few"])
@pytest.mark.parametrize("size", SIZES)
def test_products_and_gradients_are_those_of_dense_autograd(
    kernels: ModuleType, size: tuple[int, int, int], kind: str
) -> None:
    n_rows, n_cols, width = size
    chosen = pattern(kind, n_rows, n_cols)
    x, w_enc, w_dec = (torch.randn(n, width) for n in (n_rows, n_cols, n_cols))
    bias = torch.randn(n_cols)
    out = torch.randn(n_rows, width)
    leaves = [t.clone().requires_grad_() for t in (x, w_enc, bias, w_dec)]
    pre = x @ w_enc.t() + bias
    entries = ops.entries(*leaves[:3], pre, chosen)
    recon = ops.decode(chosen.weighted(torch.relu(entries)), chosen, leaves[3])
    (recon * out).sum().backward()

    dense = [t.double().requires_grad_() for t in (x, w_enc, bias, w_dec)]
    ones = torch.ones(len(chosen.col), dtype=torch.float64)
    mask = chosen.dense(chosen.weighted(ones))
    code = torch.relu(dense[0] @ dense[1].t() + dense[2]) * mask
    expected = code @ dense[3]
    (expected * out).sum().backward()
    pairs = [(recon, expected)]
    pairs += [(a.grad, b.grad) for a, b in zip(leaves, dense, strict=True)]
    for found, right in pairs:
        assert (found - right).norm() <= 1e-6 * right.norm()


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
def test_long_segments_are_cut_into_pieces_that_cover_each_entry_once(
    kernels: ModuleType, length: int
) -> None:
    lengths = torch.tensor([0, length, 3, 0, 64, 130, 0])
    crow = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    n = int(crow[-1])
    first, last, begins, ends = kernels.pieces(crow, n)
    assert len(first) == len(lengths) + n // kernels.PIECE
    covered = []
    for segment, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        seen = [range(int(first[i]), int(last[i])) for i in range(begin, end)]
        assert all(len(piece) <= kernels.PIECE for piece in seen)
        assert [e for piece in seen for e in piece] == list(range(*crow[segment : segment + 2]))
        covered += seen
    assert all(int(last[i]) <= int(first[i]) for i in range(int(ends[-1]), len(first)))
    values, dense = torch.randn(n), torch.randn(n, 5)
    found = kernels.weighted_segments((first, last, begins, ends), torch.arange(n), values, dense)
    expected = torch.stack(
        [part.sum(0) for part in (values[:, None] * dense).split(lengths.tolist())]
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def gradients(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step within `static.shapes()`, with dead latents."""
    sae = make(name).train()
    dead = torch.arange(sae.d_sae) < 5
    with static.shapes():
        loss = sae.loss(batch_of(32), step(sae, dead=dead))
    loss.total.backward()
    grads = {key: p.grad for key, p in sae.named_parameters() if p.grad is not None}
    return loss.total.detach(), grads


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka", "cross_layer_transcoder"])
def test_a_step_with_kernels_is_one_without(
    name: str, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    plain = kernels.weighted_rows
    monkeypatch.setattr(
        kernels, "weighted_rows", lambda *args: (calls.append(len(args[0])), plain(*args))[1]
    )
    loss, grads = gradients(name)
    assert calls
    monkeypatch.setattr(static, "INTERPRETER", False)
    expected, right = gradients(name)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for key, value in right.items():
        torch.testing.assert_close(grads[key], value, rtol=1e-4, atol=1e-6, msg=key)
