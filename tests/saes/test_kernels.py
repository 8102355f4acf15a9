"""The Triton kernels, in Triton's interpreter on a CPU, against dense products and autograd."""

from __future__ import annotations

import collections
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_experiments.saes import fused, ops, static
from sae_experiments.saes.base import Batch
from sae_experiments.saes.jumprelu import _Heaviside, _Jump
from sae_experiments.saes.static import StaticPattern
from sae_experiments.saes.types import DenseForm
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


def gradients(*case: str, n_rows: int = 32) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss and gradients of one step within `static.shapes()` with dead latents, and firings."""
    sae = make(*case).train()
    dead = torch.arange(sae.d_sae) < 5
    with static.shapes():
        loss = sae.loss(batch_of(n_rows), step(sae, dead=dead))
    loss.total.backward()
    grads = {key: p.grad for key, p in sae.named_parameters() if p.grad is not None}
    return loss.total.detach(), grads, loss.extra.codes.fires


@pytest.mark.parametrize("form", ["relu", "jump", "through", "gated"])
@pytest.mark.parametrize("size", [(5, 7), (16, 130), (300, 5), (513, 129)])
def test_dense_codes_and_their_gradients_are_those_of_autograd(
    kernels: ModuleType, form: str, size: tuple[int, int]
) -> None:
    n_rows, n_cols = size
    torch.manual_seed(n_rows)
    x, weight = torch.randn(n_rows, 6), torch.randn(n_cols, 6)
    bias, scale, shift, more = torch.randn(4, n_cols)
    scale = scale.abs() + 0.1
    bias[0], bias[-1] = -100.0, 100.0  # never fires, and always does
    leaves = [t.requires_grad_() for t in (x, weight, bias, scale, shift, more)]
    pre = (x @ weight.t() + bias).detach()
    width = 0.4
    of = {
        "relu": DenseForm("relu"),
        "jump": DenseForm("jump", scale, width=width),
        "through": DenseForm("jump", scale, width=width, through=True),
        "gated": DenseForm("gated", scale, shift, more),
    }[form]
    outs = torch.randn(3, n_rows, n_cols)
    codes, gate, counted = fused.dense_code(x, weight, bias, pre, of)
    loss = (codes.values * outs[0]).sum() + 3 * counted
    if form == "gated":
        loss = loss + (gate * outs[1]).sum()
    loss.backward()

    exact = [t.detach().double().requires_grad_() for t in leaves]
    a = exact[0] @ exact[1].t() + exact[2]
    right_gate = torch.relu(a)
    if form == "relu":
        z, right = right_gate, right_gate.sum()
    elif form == "gated":
        z = torch.relu(exact[3] * (a - exact[4]) + exact[5]) * (a > 0)
        right = right_gate.sum()
    else:
        z = _Jump.apply(a, exact[3].expand_as(a), width, form == "through")
        right = _Heaviside.apply(a, exact[3].expand_as(a), width).sum()
    expected = (z * outs[0]).sum() + 3 * right
    if form == "gated":
        expected = expected + (right_gate * outs[1]).sum()
    expected.backward()
    assert torch.equal(codes.fires.long(), (z != 0).sum(0))
    pairs = [(codes.values, z), (counted, right)]
    pairs += [(a.grad, b.grad) for a, b in zip(leaves, exact, strict=True) if b.grad is not None]
    assert len(pairs) == {"relu": 5, "gated": 8}.get(form, 6)
    for found, wanted in pairs:
        assert (found - wanted).norm() <= 2e-6 * wanted.norm()


#: SAEs with dense codes whose steps are two passes of the kernels.
DENSE = [
    ("standard",),
    ("tied",),
    ("p_anneal",),
    ("crosscoder",),
    ("jumprelu",),
    ("jumprelu", "sae.model.form=tanh"),
    ("gated",),
]


@pytest.mark.parametrize("name", ["standard", "tied", "jumprelu", "gated"])
def test_a_step_of_a_dense_code_has_no_other_pass_over_it(
    name: str, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device without data, and with kernels that do nothing."""
    n_rows = 64

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            large = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            if any(t.numel() == n_rows * sae.d_sae for t in large):
                seen[func.overloadpacket.__name__] += 1
            return out

    def code(pre: Tensor, form: DenseForm) -> tuple[Tensor, ...]:
        gate = pre if form.name == "gated" else pre[:0]
        return pre + 0, gate + 0, pre[0, 0] + 0, pre[0].int()

    def gradient(pre: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return pre, pre[0], pre[0], pre[0]

    monkeypatch.setattr(kernels, "dense_code", code)
    monkeypatch.setattr(kernels, "dense_gradient", gradient)
    sae, seen = make(name).to("meta").train(), collections.Counter[str]()
    x = torch.empty(n_rows, sae.d_in, device="meta")
    scalar = torch.empty((), dtype=torch.float64, device="meta")
    now = replace(step(sae), progress=scalar, some_dead=False)
    with static.shapes(), Passes():
        loss = sae.loss(Batch(x, x), now)
        loss.total.backward()
        sae.after_update(loss.extra, now)
    views = {"t", "detach", "slice", "select", "alias"}
    passes = {name: n for name, n in seen.items() if name not in views}
    # Stand-ins for the kernels copy the code and the gate, which has two products of its own.
    n_gates = int(name == "gated")
    products = {"mm": 4 + 2 * n_gates, "addmm": 1}
    assert passes == {"new_empty": 1, "add": 1 + n_gates, **products}


@pytest.mark.parametrize("case", DENSE, ids=" ".join)
def test_a_step_of_a_dense_code_with_kernels_is_one_without(
    case: tuple[str, ...], kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    plain = kernels.dense_gradient
    monkeypatch.setattr(
        kernels, "dense_gradient", lambda *args: (calls.append(len(args[0])), plain(*args))[1]
    )
    loss, grads, fires = gradients(*case, n_rows=300)
    assert calls == [300]
    monkeypatch.setattr(static, "INTERPRETER", False)
    expected, right, counts = gradients(*case, n_rows=300)
    assert torch.equal(fires.long(), counts.long())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert grads.keys() == right.keys()
    for key, value in right.items():
        torch.testing.assert_close(grads[key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka", "cross_layer_transcoder"])
def test_a_step_with_kernels_is_one_without(
    name: str, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    plain = kernels.weighted_rows
    monkeypatch.setattr(
        kernels, "weighted_rows", lambda *args: (calls.append(len(args[0])), plain(*args))[1]
    )
    loss, grads, _ = gradients(name)
    assert calls
    monkeypatch.setattr(static, "INTERPRETER", False)
    expected, right, _ = gradients(name)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for key, value in right.items():
        torch.testing.assert_close(grads[key], value, rtol=1e-4, atol=1e-6, msg=key)
