"""Rate and distortion of a code as the language model sees it: bits a character against the rise of its cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_experiments.metrics.base import Bench
from sae_experiments.models.hooks import patched

#: A code's values (rows of the windows looked at) to a reconstruction.
Decode = Callable[[Tensor], Tensor]


class Rated(NamedTuple):
    """A code as it is sent: ``keep`` of each row's entries, quantised with ``step``; bits a row, rise of the cross-entropy in bits a character."""

    keep: float
    step: float
    bits: float
    ce: float


class Window(NamedTuple):
    """What the language model reads and predicts in the windows looked at, and what it says undisturbed."""

    rows: np.ndarray  # among the test rows
    x: Tensor
    targets: Tensor
    clean: Tensor


@torch.no_grad()
def windows_of(bench: Bench, test: np.ndarray, n: int, batch: int) -> Window | None:
    """``n`` whole held-out windows among the test rows (a mask over all rows looked at); None without a language model, or a window."""
    lm, store = bench.lm, bench.held_out
    if lm is None or lm.model is None or store is None or not hasattr(bench.write, "stream") or len(test) < store.length:
        return None
    length = store.length
    whole = np.flatnonzero(test[: len(test) // length * length].reshape(-1, length).all(1))
    if not len(whole):
        return None
    picked = whole[np.unique(np.linspace(0, len(whole) - 1, min(n, len(whole))).round().astype(int))]
    x, y = (t.to(bench.device) for t in lm.tokens(store.starts[picked]))
    place = np.cumsum(test) - 1
    rows = place[(picked[:, None] * length + np.arange(length)).reshape(-1)]
    clean = torch.cat([_nats(bench, part, of) for part, of in zip(x.split(batch), y.split(batch), strict=True)])
    return Window(rows, x, y, clean)


def _nats(bench: Bench, x: Tensor, y: Tensor) -> Tensor:
    logits = bench.lm.model(input_ids=x, use_cache=False).logits[:, 1:].float()
    return -logits.log_softmax(-1).gather(2, y[:, 1:, None]).squeeze(2)


@torch.no_grad()
def rise(bench: Bench, window: Window, code: sparse.csr_matrix, decode: Decode, direct: np.ndarray | None, batch: int) -> float:
    """Mean rise of the cross-entropy, bits a character, with the decoded rows of ``code`` in place of the activations."""
    length, total = window.x.shape[1], 0.0
    for begin in range(0, len(window.x), batch):
        rows = window.rows[begin * length : (begin + batch) * length]
        recon = decode(torch.from_numpy(code[rows].toarray()).to(bench.device))
        if direct is not None:
            recon = recon + torch.from_numpy(direct[rows]).to(recon)
        part = slice(begin, begin + batch)
        new = recon.view(-1, length, recon.shape[1])
        with patched(bench.lm.model, bench.write, lambda a, new=new: new.to(a.dtype)):
            total += float((_nats(bench, window.x[part], window.targets[part]) - window.clean[part]).double().sum())
    return total / window.clean.numel() / math.log(2)


@torch.no_grad()
def effect_sizes(bench: Bench, codes: sparse.csr_matrix, decode: Decode) -> np.ndarray:
    """How far a latent moves the reconstruction per unit of its value (m,), at its root mean square over active rows."""
    counts = np.maximum(np.diff(codes.tocsc().indptr), 1)
    size = np.sqrt(np.asarray(codes.multiply(codes).sum(0)).ravel() / counts).astype(np.float32)
    base, found = decode(torch.zeros(1, codes.shape[1], device=bench.device)), []
    for begin in range(0, len(size), 1024):
        index = np.arange(begin, min(begin + 1024, len(size)))
        one = np.zeros((len(index), len(size)), np.float32)
        one[np.arange(len(index)), index] = size[index]
        found.append((decode(torch.from_numpy(one).to(bench.device)) - base).norm(dim=1).cpu().numpy())
    return np.concatenate(found) / np.maximum(size, 1e-12)


def strongest(codes: sparse.csr_matrix, share: float, effect: np.ndarray, rows: int = 4096) -> sparse.csr_matrix:
    """The code with only the ``share`` of each row's entries (at least one, where there is any) whose |value| times effect is largest."""
    if share >= 1:
        return codes
    parts = []
    for begin in range(0, codes.shape[0], rows):
        part = codes[begin : begin + rows].tocsr(copy=True)
        size, counts = np.abs(part.data) * effect[part.indices], np.diff(part.indptr)
        owner = np.repeat(np.arange(part.shape[0]), counts)
        order = np.lexsort((-size, owner))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order)) - np.repeat(part.indptr[:-1], counts)
        part.data[rank >= np.ceil(share * counts)[owner]] = 0
        part.eliminate_zeros()
        parts.append(part)
    return sparse.vstack(parts).tocsr()


def bits_at(points: Sequence[Rated], limit: float) -> float | None:
    """The least rate whose cross-entropy rises by no more than ``limit``: between points of the frontier, linear in the logarithm of the rise.

    None where no point comes that close, or all do (the rate is then below every one that was tried).
    """
    frontier: list[Rated] = []
    for point in sorted(points, key=lambda p: (p.bits, p.ce)):
        if not frontier or point.ce < frontier[-1].ce:
            frontier.append(point)
    inside = next((i for i, p in enumerate(frontier) if p.ce <= limit), None)
    if inside is None or inside == 0:
        return None
    far, near = frontier[inside - 1], frontier[inside]
    logs = [math.log(max(v, 1e-6)) for v in (far.ce, near.ce, limit)]
    share = (logs[0] - logs[2]) / max(logs[0] - logs[1], 1e-12)
    return far.bits + min(max(share, 0.0), 1.0) * (near.bits - far.bits)
