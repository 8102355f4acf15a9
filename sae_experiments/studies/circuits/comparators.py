"""Comparators of attribution, and n-grams that predict the firing of latents.

The comparators are cosines of weights and co-activation.

Shape letters: F, G upstream and downstream latents, C width of the residual stream, M neurons, N
held-out rows, T positions of a window, L lags.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from sae_experiments.errors import of_type
from sae_experiments.models.blocks import Attended
from sae_experiments.studies.circuits.attribution import Circuit, Prompts


class CircuitWeights(NamedTuple):
    """Unit directions in the residual stream, whose products are cosines.

    Rows of zeros stand for latents without a direction.
    """

    writes: Tensor
    """Directions that upstream latents write, (F, C)."""
    reads: Tensor
    """Directions that downstream latents read, (G, C)."""


@torch.no_grad()
def weight_directions(circuit: Circuit, prompts: Prompts, *, gated: bool) -> CircuitWeights | None:
    """Directions of the weights alone.

    The decoder direction is carried through the upstream output matrix. The encoder direction is
    carried back through the downstream input matrix, with the layer norm folded in: it is scaled by
    the norm's weight, and its mean is subtracted.

    Args:
        circuit: The two SAEs.
        prompts: The prompts.
        gated: Weigh each neuron of an MLP on the way by its mean slope on the prompts. This is
            always done where a direction has to pass the non-linearity (upstream `mlp_in`,
            downstream `mlp_out`).

    Returns:
        The directions; None if both sites lie in one MLP, past the residual stream.
    """
    path = circuit.path
    if path.last is None:
        return None
    writes = circuit.directions
    if path.upstream.stream == "mlp_in":
        writes = path.source.to_neurons(writes, prompts.state) @ path.source.w_out
    reads = circuit.downstream.W_enc.detach()
    stream, block = path.downstream.stream, path.last
    if stream == "mlp_out":
        reads = reads @ block.w_out.t()
    if stream in ("mlp_act", "mlp_out"):
        inputs = None
        if gated or stream == "mlp_out":
            at = path.linearise(prompts.state, prompts.base)
            attended = of_type(at.attended, Attended)  # there is a last block
            inputs = block.inside(attended.stream, "mlp_in")
        reads = block.from_neurons(reads, inputs)
    if stream != "resid":
        reads = block.norm_2.pull_back(reads.new_ones(()), reads)
    return CircuitWeights(F.normalize(writes, dim=1), F.normalize(reads, dim=1))


def coactivation(
    up: sparse.csr_matrix, down: sparse.csr_matrix, latents: np.ndarray, length: int, lags: int
) -> np.ndarray:
    """Phi coefficients of firing of downstream latents, and of upstream ones some positions back.

    Args:
        up: Codes of the upstream SAE, (N, F).
        down: Codes of the downstream SAE on the same rows, (N, G).
        latents: Downstream latents, (m,).
        length: Rows per window; pairs lie within one window.
        lags: Number L of lags.

    Returns:
        Coefficients (m, L, F); 0 where one of the latents never or always fires.
    """
    a, b = firing(up), firing(down)[:, latents].tocsr()
    n_rows, n_latents = a.get_shape()
    phi = np.zeros((len(latents), lags, n_latents), np.float32)
    offset = np.arange(n_rows) % length
    for lag in range(min(lags, length)):
        later = np.flatnonzero(offset >= lag)
        x, y = a[later - lag], b[later]
        n = len(later)
        p = np.asarray(x.sum(0)).ravel()
        q = np.asarray(y.sum(0)).ravel()[:, None]
        both = (y.T @ x).toarray()
        scale = np.sqrt(p * (n - p) * q * (n - q))
        phi[:, lag] = np.divide(n * both - p * q, scale, out=np.zeros_like(both), where=scale > 0)
    return phi


def firing(codes: sparse.csr_matrix) -> sparse.csr_matrix:
    """Matrix with ones at the nonzero entries of codes."""
    ones = (codes.data != 0).astype(np.float64)
    return sparse.csr_matrix((ones, codes.indices, codes.indptr), shape=codes.shape)


class Specific(NamedTuple):
    """A latent with the n-gram that predicts its firing best."""

    latent: int
    gram: tuple[int, ...]
    """Ids of the n-gram."""
    f1: float
    """F1 of firing where the text ends in the n-gram."""
    fires: int
    """Number of firings."""


class Grams:
    """The n-grams that end at the rows of a text, each within one window.

    Args:
        ids: Ids of the text, (N,).
        length: Rows per window.
        order: Length of the n-grams.
    """

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
        """F1 (n-grams, F) of firing, `on` (N, F), and of ending in an n-gram."""
        fires = np.asarray(on.sum(0)).ravel()
        both = (self.one_hot @ on[self.rows]).tocoo()
        f1 = 2 * both.data / (self.counts[both.row] + fires[both.col])
        return sparse.csc_matrix((f1, (both.row, both.col)), shape=both.shape)

    def scored(self, on: sparse.csr_matrix, specific: Sequence[Specific]) -> list[Specific]:
        """Update F1 and firings of latents and their n-grams to this text.

        Args:
            on: Firing on this text, (N, F).
            specific: Latents and n-grams, which may have been chosen on another text.
        """
        scores = self.scores(on).tocsr()
        fires = np.asarray(on.sum(0)).ravel()
        number = {tuple(kind): i for i, kind in enumerate(self.kinds.tolist())}
        scored = []
        for s in specific:
            i = number.get(s.gram)
            f1 = 0.0 if i is None else float(scores[i, s.latent])
            scored.append(s._replace(f1=f1, fires=int(fires[s.latent])))
        return scored

    def best(self, on: sparse.csr_matrix) -> list[Specific | None]:
        """The best n-gram of each latent; None for a latent that never fires."""
        scores = self.scores(on)
        fires = np.asarray(on.sum(0)).ravel()
        best: list[Specific | None] = []
        for j, (begin, end) in enumerate(zip(scores.indptr[:-1], scores.indptr[1:], strict=True)):
            if end == begin:
                best.append(None)
                continue
            at = begin + int(scores.data[begin:end].argmax())
            gram = tuple(self.kinds[scores.indices[at]].tolist())
            best.append(Specific(j, gram, float(scores.data[at]), int(fires[j])))
        return best


def most_specific(on: sparse.csr_matrix, grams: Grams, *, n: int, min_fires: int) -> list[Specific]:
    """The latents with the best F1 for an n-gram, at most one latent per n-gram.

    Args:
        on: Firing, as ones (N, F).
        grams: The n-grams of the text.
        n: Number of latents.
        min_fires: Firings that a latent needs.
    """
    candidates = sorted(
        (s for s in grams.best(on) if s is not None and s.fires >= min_fires),
        key=lambda s: (-s.f1, s.latent),
    )
    taken: dict[tuple[int, ...], Specific] = {}
    for s in candidates:
        taken.setdefault(s.gram, s)
    return list(taken.values())[:n]
