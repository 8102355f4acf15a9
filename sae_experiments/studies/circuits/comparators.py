"""What attribution is compared with: cosines of weights, co-activation; and which downstream latents answer to one character n-gram.

Shape letters: F, G upstream and downstream latents, C width of the residual stream, N held-out rows, T positions of a window, L lags.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from sae_experiments.studies.circuits.attribution import Circuit, Prompts
from sae_experiments.studies.circuits.blocks import Block


class Weights(NamedTuple):
    """Unit directions in the residual stream: what upstream latents write (F, C) and what downstream latents read (G, C); rows of zeros where
    there is none. Their products are cosines."""

    writes: Tensor
    reads: Tensor


@torch.no_grad()
def weight_directions(circuit: Circuit, prompts: Prompts, *, gated: bool) -> Weights | None:
    """The weights-only comparator: the decoder direction carried through the upstream output matrix, and the encoder direction carried back
    through the downstream input matrix with the layer norm folded in (its scale times the direction, less the mean it takes out).

    ``gated``: every neuron of an MLP on the way also counts with its mean slope on ``prompts`` (always so where a direction has to pass
    the non-linearity: upstream ``mlp_in``, downstream ``mlp_out``). None where both sites lie in one MLP, past the residual stream.
    """
    path = circuit.path
    if path.last is None:
        return None
    writes = circuit.directions
    if path.upstream.stream == "mlp_in":
        writes = (
            writes @ path.source.w_in * mean_slope(path.source, prompts.state)
        ) @ path.source.w_out
    reads, stream, block = circuit.downstream.W_enc.detach(), path.downstream.stream, path.last
    if stream == "mlp_out":
        reads = reads @ block.w_out.t()
    if stream in ("mlp_act", "mlp_out"):
        if gated or stream == "mlp_out":
            seen = path.linearise(prompts.state, prompts.base).attended.stream
            reads = reads * mean_slope(block, block.ln_2(seen))
        reads = reads @ block.w_in.t()
    if stream != "resid":
        reads = reads * block.ln_2.weight
        reads = reads - reads.mean(1, keepdim=True)
    return Weights(F.normalize(writes, dim=1), F.normalize(reads, dim=1))


def mean_slope(block: Block, x: Tensor) -> Tensor:
    """Mean derivative of the MLP's non-linearity for each neuron (M,) over inputs of the MLP (..., C)."""
    with torch.enable_grad():
        pre = block.mlp.c_fc(x).detach().requires_grad_()
        return torch.autograd.grad(block.mlp.act(pre).sum(), pre)[0].flatten(0, -2).mean(0)


def coactivation(
    up: sparse.csr_matrix, down: sparse.csr_matrix, latents: np.ndarray, length: int, lags: int
) -> np.ndarray:
    """Phi of firing, (len(latents), lags, F): downstream latent at a position and upstream latent ``lag`` positions before, in one window.

    ``up`` (N, F), ``down`` (N, G): codes of the same rows, in windows of ``length``. 0 where one of them never (or always) fires.
    """
    a, b = firing(up), firing(down)[:, latents].tocsr()
    found = np.zeros((len(latents), lags, a.shape[1]), np.float32)
    offset = np.arange(a.shape[0]) % length
    for lag in range(min(lags, length)):
        later = np.flatnonzero(offset >= lag)
        x, y = a[later - lag], b[later]
        n, p, q = len(later), np.asarray(x.sum(0)).ravel(), np.asarray(y.sum(0)).ravel()[:, None]
        both = (y.T @ x).toarray()
        scale = np.sqrt(p * (n - p) * q * (n - q))
        found[:, lag] = np.divide(n * both - p * q, scale, out=np.zeros_like(both), where=scale > 0)
    return found


def firing(codes: sparse.csr_matrix) -> sparse.csr_matrix:
    """Ones where a code is not zero."""
    return sparse.csr_matrix(
        ((codes.data != 0).astype(np.float64), codes.indices, codes.indptr), shape=codes.shape
    )


class Specific(NamedTuple):
    """A latent and the n-gram it answers to: its ids, the F1 of firing where the text ends in it, how often the latent fires there."""

    latent: int
    gram: tuple[int, ...]
    f1: float
    fires: int


class Grams:
    """The n-grams that end at every row of a text: ``ids`` (N,) in windows of ``length``, which an n-gram does not reach over."""

    def __init__(self, ids: np.ndarray, length: int, order: int) -> None:
        self.rows = np.flatnonzero(np.arange(len(ids)) % length >= order - 1)
        grams = np.stack([ids[self.rows - lag] for lag in reversed(range(order))], 1)
        self.kinds, gram = np.unique(grams, axis=0, return_inverse=True)
        gram = gram.reshape(-1)
        self.counts = np.bincount(gram, minlength=len(self.kinds))
        ones = np.ones(len(self.rows))
        self.one_hot = sparse.csr_matrix(
            (ones, (gram, np.arange(len(self.rows)))), shape=(len(self.kinds), len(self.rows))
        )

    def scores(self, on: sparse.csr_matrix) -> sparse.csc_matrix:
        """F1 of firing (``on``: (N, F)) and ending in an n-gram, (n-grams, F)."""
        fires = np.asarray(on.sum(0)).ravel()
        both = (self.one_hot @ on[self.rows]).tocoo()
        f1 = 2 * both.data / (self.counts[both.row] + fires[both.col])
        return sparse.csc_matrix((f1, (both.row, both.col)), shape=both.shape)

    def scored(self, on: sparse.csr_matrix, found: Sequence[Specific]) -> list[Specific]:
        """The same latents and n-grams with their F1 on this text, which may be another than the one they were found on."""
        scores, fires = self.scores(on).tocsr(), np.asarray(on.sum(0)).ravel()
        number = {tuple(kind): i for i, kind in enumerate(self.kinds.tolist())}
        at = [number.get(s.gram) for s in found]
        return [
            s._replace(
                f1=0.0 if i is None else float(scores[i, s.latent]), fires=int(fires[s.latent])
            )
            for s, i in zip(found, at, strict=True)
        ]

    def best(self, on: sparse.csr_matrix) -> list[Specific | None]:
        """For every latent its best n-gram (None where it never fires)."""
        scores, fires = self.scores(on), np.asarray(on.sum(0)).ravel()
        found: list[Specific | None] = []
        for j, (begin, end) in enumerate(zip(scores.indptr[:-1], scores.indptr[1:], strict=True)):
            at = begin + int(scores.data[begin:end].argmax()) if end > begin else -1
            gram = tuple(self.kinds[scores.indices[at]].tolist())
            found.append(
                Specific(j, gram, float(scores.data[at]), int(fires[j])) if at >= 0 else None
            )
        return found


def most_specific(on: sparse.csr_matrix, grams: Grams, *, n: int, min_fires: int) -> list[Specific]:
    """The ``n`` latents with the best F1 for one n-gram, no two for the same one, of those that fire ``least`` times. ``on``: ones (N, F)."""
    candidates = sorted(
        (s for s in grams.best(on) if s is not None and s.fires >= min_fires),
        key=lambda s: (-s.f1, s.latent),
    )
    taken: dict[tuple[int, ...], Specific] = {}
    for s in candidates:
        taken.setdefault(s.gram, s)
    return list(taken.values())[:n]
