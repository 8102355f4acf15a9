"""Rate and distortion of a code: bits per character against the rise of the model's loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_experiments.metrics.base import EvalContext, LMSplice, logits_of
from sae_experiments.models.hooks import Prefix, Site, capture, joined, prefix_of, spliced
from sae_experiments.sampling import evenly_spaced

#: Maps codes (B, F) to reconstructions (B, O).
Decode = Callable[[sparse.csr_matrix], Tensor]


class Rated(NamedTuple):
    """One transmitted version of a code, with its rate and distortion."""

    keep: float
    """Share of each row's entries that is sent."""
    step: float
    """Bin width of the quantiser in root mean squares of the latent."""
    bits: float
    """Bits per row."""
    ce: float
    """Rise of the cross-entropy in bits per character."""


class Window(NamedTuple):
    """Windows of held-out text, with the undisturbed model's loss on them."""

    lm: LMSplice
    """The language model."""
    site: Site
    """The activation that the SAE reconstructs."""
    rows: np.ndarray
    """Positions of their rows among the test rows, (W T,)."""
    x: Tensor
    """Token ids, (W, T)."""
    targets: Tensor
    """Next token ids, (W, T)."""
    clean: Tensor
    """Loss in nats at all positions but the first, (W, T - 1)."""
    replaced: Tensor
    """Rows that the reconstruction replaces, (W, T): the ordinary ones."""
    prefix: Prefix
    """Undisturbed passes as far as the site."""


@torch.no_grad()
def windows_of(ctx: EvalContext, test: np.ndarray, n: int, batch: int) -> Window | None:
    """Choose windows all of whose rows are test rows.

    Args:
        ctx: Evaluation context.
        test: Mask of the test rows among the evaluated rows, (N,).
        n: Number of windows at most, evenly spaced.
        batch: Windows per forward pass.

    Returns:
        The windows, or None if there is no language model, no single site or no whole window.
    """
    lm = ctx.lm
    store = ctx.held_out
    if lm is None or lm.model is None or store is None or not isinstance(ctx.write, Site):
        return None
    length = store.length
    n_windows = len(test) // length
    whole = np.flatnonzero(test[: n_windows * length].reshape(n_windows, length).all(1))
    if not len(whole):
        return None
    picked = evenly_spaced(whole, n)
    x, y = (ids.to(ctx.device) for ids in lm.tokens(store.starts[picked]))
    position_among_test = np.cumsum(test) - 1
    rows = position_among_test[(picked[:, None] * length + np.arange(length)).reshape(-1)]
    batch = ctx.windows_per_pass(batch)
    clean = []
    replaced = []
    prefixes = []
    for ids, targets in zip(x.split(batch), y.split(batch), strict=True):
        passes = prefix_of(lm.model, [ctx.write])
        with capture(lm.model, ctx.read_sites) as seen, passes as of_pass:
            clean.append(_nats(lm, ids, targets))
        ordinary = ctx.replaced(torch.cat([seen[s].flatten(0, 1) for s in ctx.read_sites], 1))
        if ordinary is None:
            ordinary = torch.ones(ids.numel(), dtype=torch.bool, device=ids.device)
        replaced.append(ordinary.view(ids.shape))
        prefixes.append(of_pass[-1])
    prefix = joined(prefixes)
    return Window(lm, ctx.write, rows, x, y, torch.cat(clean), torch.cat(replaced), prefix)


def _nats(lm: LMSplice, x: Tensor, y: Tensor) -> Tensor:
    """Loss in nats at all positions but the first, (W, T - 1)."""
    logits = logits_of(lm.model, x)[:, 1:].float()
    return -logits.log_softmax(-1).gather(2, y[:, 1:, None]).squeeze(2)


class Direct(NamedTuple):
    """Part of n rows' reconstructions that bypasses the code."""

    added: Tensor
    """Part that is added, (n, O)."""
    scale: Tensor | None
    """Factor of the decoded code, (n, 1); None for 1."""

    def scaled(self, recon: Tensor, rows: slice | np.ndarray) -> Tensor:
        """Decoded codes (B, O) of some of the rows times their factors."""
        return recon if self.scale is None else recon * self.scale[rows].to(recon)

    def with_direct(self, recon: Tensor, rows: slice | np.ndarray) -> Tensor:
        """Reconstructions from the decoded codes (B, O) of some of the rows."""
        return self.scaled(recon, rows) + self.added[rows].to(recon)


@torch.no_grad()
def rise(
    ctx: EvalContext,
    window: Window,
    code: sparse.csr_matrix,
    decode: Decode,
    direct: Direct | None,
    batch: int,
) -> float:
    """Mean rise of the cross-entropy with a code's reconstruction in place of the activation.

    Outlier rows that the fit left out stay as they are.

    Args:
        ctx: Evaluation context.
        window: Windows to evaluate.
        code: Codes of the test rows, (n, F).
        decode: Decoder of the codes.
        direct: Part of the n rows' reconstructions that bypasses the code; None if there is none.
        batch: Windows per forward pass.

    Returns:
        Bits per character.
    """
    length = window.x.shape[1]
    batch = ctx.windows_per_pass(batch)
    total = 0.0
    for begin in range(0, len(window.x), batch):
        rows = window.rows[begin * length : (begin + batch) * length]
        recon = decode(code[rows])
        if direct is not None:
            recon = direct.with_direct(recon, rows)
        recon = recon.view(-1, length, recon.shape[1])
        part = slice(begin, begin + batch)
        splice = {window.site: recon}
        replaced = window.replaced[part].flatten()
        with spliced(window.lm.model, splice, replaced, window.prefix.part(part)):
            nats = _nats(window.lm, window.x[part], window.targets[part])
        total += float((nats - window.clean[part]).double().sum())
    return total / window.clean.numel() / math.log(2)


@torch.no_grad()
def effect_sizes(codes: sparse.csr_matrix, decode: Decode) -> np.ndarray:
    """Distance that each latent moves the reconstruction per unit of its value.

    Measured at the root mean square of the latent's active values.

    Args:
        codes: Codes (N, F).
        decode: Decoder of the codes.

    Returns:
        Distances (F,).
    """
    counts = np.maximum(np.diff(codes.tocsc().indptr), 1)
    squares = np.asarray(codes.multiply(codes).sum(0)).ravel()
    size = np.sqrt(squares / counts).astype(np.float32)
    n_latents = len(size)
    base = decode(sparse.csr_matrix((1, n_latents), dtype=np.float32))
    one_each = sparse.diags(size).tocsr()
    effects = []
    for begin in range(0, n_latents, 1024):
        moved = decode(one_each[begin : begin + 1024]) - base
        effects.append(moved.norm(dim=1).cpu().numpy())
    return np.concatenate(effects) / np.maximum(size, 1e-12)


def strongest(
    codes: sparse.csr_matrix, share: float, effect: np.ndarray, rows: int = 4096
) -> sparse.csr_matrix:
    """Keep only the entries of each row that move the reconstruction most.

    Args:
        codes: Codes (N, F).
        share: Share of each row's entries to keep, by |value| times effect; at least one entry of
            a row that has any.
        effect: Effect per unit of each latent's value, (F,).
        rows: Rows processed at a time.
    """
    if share >= 1:
        return codes
    parts = []
    n_rows = len(codes.indptr) - 1
    for begin in range(0, n_rows, rows):
        part = codes[begin : begin + rows].tocsr(copy=True)
        size = np.abs(part.data) * effect[part.indices]
        counts = np.diff(part.indptr)
        row = np.repeat(np.arange(part.shape[0]), counts)
        order = np.lexsort((-size, row))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order)) - np.repeat(part.indptr[:-1], counts)
        part.data[rank >= np.ceil(share * counts)[row]] = 0
        part.eliminate_zeros()
        parts.append(part)
    return sparse.csr_matrix(sparse.vstack(parts))


def bits_at(points: Sequence[Rated], limit: float) -> float | None:
    """Lowest rate at which the cross-entropy rises by no more than `limit`.

    Interpolates between neighbouring points of the frontier, linearly in the logarithm of the rise.

    Args:
        points: Rates and distortions that were tried.
        limit: Rise of the cross-entropy in bits per character.

    Returns:
        Bits per row; None if no point comes that close, or if all do (the rate is then below every
        one that was tried).
    """
    frontier: list[Rated] = []
    for point in sorted(points, key=lambda p: (p.bits, p.ce)):
        if not frontier or point.ce < frontier[-1].ce:
            frontier.append(point)
    inside = [i for i, point in enumerate(frontier) if point.ce <= limit]
    if not inside or inside[0] == 0:
        return None
    far = frontier[inside[0] - 1]
    near = frontier[inside[0]]
    log_far = math.log(max(far.ce, 1e-6))
    log_near = math.log(max(near.ce, 1e-6))
    log_limit = math.log(max(limit, 1e-6))
    share = (log_far - log_limit) / max(log_far - log_near, 1e-12)
    return far.bits + min(max(share, 0.0), 1.0) * (near.bits - far.bits)
