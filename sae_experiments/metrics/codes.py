"""Inputs shared by several metrics: sparse codes, the text of the rows, a random dictionary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.saes.base import SAE
from sae_experiments.saes.pattern import Pattern
from sae_experiments.saes.types import Codes

NO_TEXT = "there is no text"
NO_CHARACTERS = "it is defined on characters, and the language model reads tokens"
NOT_FINITE = "the codes or activations are not finite"


class Text(NamedTuple):
    """Held-out text aligned with the activations: whole windows, one character or token per row."""

    chars: np.ndarray
    """Code point of the character of every row, or id of its token, (N,)."""
    following: np.ndarray
    """The same of the character or token after it, (N,)."""
    length: int
    """Rows per window."""
    breaks: np.ndarray
    """Rows at which the text does not continue from the row before; row 0 is one of them."""
    pieces: Sequence[str] = ()
    """Text of every token id; empty if rows are characters."""

    def spell(self, symbol: int) -> str:
        """Text of a character or token, given as in `chars`."""
        return self.pieces[symbol] if self.pieces else chr(symbol)

    def parts(self, begin: int, end: int) -> list[str]:
        """Texts of some consecutive rows."""
        return [self.spell(symbol) for symbol in self.chars[begin:end].tolist()]

    @property
    def offset(self) -> np.ndarray:
        """Position of every row in its window, (N,): the characters that the model saw before."""
        return np.arange(len(self.chars)) % self.length

    def blocks(self, windows: int) -> np.ndarray:
        """Document number of every row, (N,), with `windows` neighbouring windows per document."""
        return np.arange(len(self.chars)) // (self.length * windows)


def no_text(ctx: EvalContext) -> str:
    """Reason for the null results of a metric on characters when there is no text."""
    return NO_CHARACTERS if ctx.reads_tokens else NO_TEXT


def read_text(ctx: EvalContext, rows: int | None, *, tokens: bool = False) -> Text | None:
    """Text of the held-out rows.

    Args:
        ctx: Evaluation context.
        rows: Number of rows, from the first on, rounded down to whole windows; None for all.
        tokens: Whether the metric is also defined on tokens.

    Returns:
        The text, or None if there is no language model, or one over tokens that the metric is not
        defined on.
    """
    if ctx.lm is None or ctx.held_out is None or not ctx.vocabulary:
        return None
    if ctx.reads_tokens and not tokens:
        return None
    store = ctx.held_out
    windows = ctx.n_used(rows) // store.length
    starts = store.starts[:windows]
    ids, next_ids = ctx.lm.tokens(starts)
    # For tokens, the ids themselves.
    code_points = np.arange(ctx.vocabulary, dtype=np.uint32)
    if ctx.symbols:
        code_points = np.array([ord(symbol) for symbol in ctx.symbols], dtype=np.uint32)
    gaps = np.diff(starts, prepend=starts[0] - 1)
    return Text(
        chars=code_points[ids.cpu().numpy().reshape(-1)],
        following=code_points[next_ids.cpu().numpy().reshape(-1)],
        length=store.length,
        breaks=np.flatnonzero(gaps != store.length) * store.length,
        pieces=[ctx.spell(i) for i in range(ctx.vocabulary)] if ctx.reads_tokens else (),
    )


def sparse_codes(
    ctx: EvalContext, rows: int | None, sae: SAE | None = None
) -> sparse.csr_matrix | None:
    """Codes of held-out rows as a sparse matrix, computed once per ctx and number of rows.

    No latent counts as active in the outlier rows that the fit left out: they would be the
    strongest contexts of many latents, and say nothing about them.

    Args:
        ctx: Evaluation context.
        rows: Number of rows, from the first on; None for all.
        sae: Another SAE to encode the same rows with (not cached); None for the ctx's own.

    Returns:
        Codes (N, F) in float32, or None if one of them is not finite.
    """
    n = ctx.n_used(rows)
    if sae is not None:
        return _encode_sparse(replace(ctx, sae=sae), n)
    known = ctx.extras.setdefault("codes", {})
    longer = [rows for rows in known if rows >= n and known[rows] is not None]
    if n not in known:
        known[n] = known[longer[0]][:n] if longer else _encode_sparse(ctx, n)
    return known[n]


def _encode_sparse(ctx: EvalContext, n: int) -> sparse.csr_matrix | None:
    counts = [np.zeros(1, np.int64)]
    columns = []
    values = []
    for x, acts in ctx.encoded(n):
        ordinary = ctx.replaced(x)
        if ordinary is not None:
            acts = acts.masked_fill(~ordinary[:, None], 0)
        row, column = acts.nonzero().unbind(1)
        active = acts[row, column]
        if not torch.isfinite(active).all():
            return None
        counts.append(torch.bincount(row, minlength=len(acts)).cpu().numpy())
        columns.append(column.int().cpu().numpy())
        values.append(active.float().cpu().numpy())
    row_starts = np.concatenate(counts).cumsum()
    entries = np.concatenate(values), np.concatenate(columns), row_starts
    return sparse.csr_matrix(entries, shape=(n, ctx.sae.d_sae))


def decoded(sae: SAE, codes: sparse.csr_matrix) -> Tensor:
    """Reconstruction (n, O) of codes (n, F), without the part that bypasses the code."""
    parts = (codes.indptr, codes.indices, codes.data)
    crow, col, values = (torch.from_numpy(part).to(sae.b_dec.device) for part in parts)
    return sae.decode_codes(Codes(values, Pattern(crow.int(), col.int(), sae.d_sae)))


def ordinary_rows(ctx: EvalContext, n: int) -> np.ndarray:
    """Mask (n,) of the first held-out rows that the fit did not leave out as outliers.

    It is computed once per ctx and row.
    """
    known = ctx.extras.get("ordinary", np.ones(0, dtype=bool))
    parts = [known]
    for begin in range(len(known), n, 4096):
        inputs = ctx.inputs(slice(begin, min(begin + 4096, n))).to(ctx.device)
        mask = ctx.replaced(inputs)
        whole = np.ones(len(inputs), dtype=bool)
        parts.append(whole if mask is None else mask.cpu().numpy())
    ctx.extras["ordinary"] = np.concatenate(parts)
    return ctx.extras["ordinary"][:n]


def raw_rows(ctx: EvalContext, rows: int | None) -> np.ndarray:
    """Inputs of the encoder for the first `rows` held-out rows (None: all), (N, D) float32.

    Outlier rows that the fit left out are replaced by the median row, because a few of them would
    dominate any mean, spread or regression.
    """
    n = ctx.n_used(rows)
    inputs = ctx.inputs(slice(0, n)).cpu().numpy()
    ordinary = ordinary_rows(ctx, n)
    if ordinary.all():
        return inputs
    return np.where(ordinary[:, None], inputs, ctx.region.centre.cpu().numpy())


@torch.no_grad()
def random_sae(ctx: EvalContext, l0: float, *, rows: int, seed: int) -> SAE:
    """Build an untrained SAE of the same size as a reference.

    Its decoder rows are random unit vectors, its encoder is tied to them, and one threshold is
    calibrated for all latents.

    Args:
        ctx: Evaluation context with the SAE to match in size.
        l0: Mean number of active latents per row (capped at the number of latents).
        rows: Held-out rows on which the threshold is calibrated.
        seed: Seed of the random directions; the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = SAE(d_in=ctx.sae.d_in, d_sae=ctx.sae.d_sae, d_out=ctx.sae.d_out)
        sae = sae.to(ctx.device)
    x = torch.from_numpy(raw_rows(ctx, rows)).to(ctx.device)
    if sae.pre_bias:
        sae.b_dec.copy_(x.mean(0))
    sae.calibrate_threshold(x, min(l0, sae.d_sae))
    return sae.eval()


def nulls(infos: Iterable[MetricInfo], why: str) -> Measured:
    """Result in which every metric of `infos` is None for the same reason."""
    names = [info.name for info in infos]
    return Measured(dict.fromkeys(names), why_null=dict.fromkeys(names, why))
