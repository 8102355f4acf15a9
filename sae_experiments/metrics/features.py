"""Data of the feature browser: contexts, values, next characters and partners of each latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from sae_experiments.files import rounded
from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.metrics.codes import NO_TEXT, NOT_FINITE, Text, nulls, read_text, sparse_codes
from sae_experiments.metrics.text.contexts import contexts_of, quantile_rows, top_rows
from sae_experiments.models.hooks import Site, activations, blocks_of
from sae_experiments.models.layouts import (
    Layout,
    final_norm,
    layout_of_model,
    matrix,
    unembedding,
)
from sae_experiments.saes.base import SAE
from sae_experiments.sampling import evenly_spaced, spread

INFO = [
    MetricInfo(
        name="feature_next_bits",
        title="foresight",
        formula=(
            "mean over alive latents of KL(next character where it fires || next character "
            "anywhere), less the bias of counting"
        ),
        unit="bit",
        better="none",
        shown=False,
    ),
]
#: Joint firings are counted by a dense matrix product if more than this share of codes is active.
DENSE_ABOVE = 0.08
#: Tokens above which the largest are not found by sorting all.
MANY = 4096
#: Entries of a matrix of latents by tokens that are computed at a time.
MOST_ENTRIES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the metric."""

    rows: int | None
    """Number of held-out rows, from the first on; None for all."""
    latents: int | None
    """Number of latents stored, evenly spaced among those that fire; None for all."""
    contexts: int
    """Strongest contexts per latent, at most one per window."""
    samples: int
    """Contexts per latent at even quantiles of all its strengths."""
    before: int
    """Characters of a context before the firing."""
    after: int
    """Characters of a context after the firing."""
    bins: int
    """Bins of the histogram of values."""
    characters: int
    """Characters listed per latent that it promotes, suppresses, or that follow it."""
    partners: int
    """Latents listed per latent that fire together with it."""
    pair_rows: int
    """Rows on which joint firing is counted."""
    windows: int
    """Windows over which the scale of the last layer norm is averaged."""


def measure(ctx: EvalContext, **options: Any) -> Measured:
    """Describe latents for `features/<report>_<seed>.json`, one dict per latent.

    Every dict has `latent` and `density`; latents that never fire have nothing else. The others,
    of which some are stored, have

    - `max`, `mean`, `histogram`: of non-zero |z|; counts in equal bins from 0 to the maximum.
    - `partners`: `[latent, phi]` of firing together, largest |phi| first.
    - `top`, `samples` (with text): contexts, the strongest first, and at quantiles of |z|.
    - `next` (with text): `[character, share, lift]` of the characters that follow, by their part
      of the KL divergence; the lift is the share over the share anywhere.
    - `promotes`, `suppresses` (with a language model): `[character, logits]`; see `logit_effect`.
    - `stability` (with replicas): see `stability`.

    Args:
        ctx: Evaluation context; `extras["latents"]` are latents that a study wants stored too.
        **options: Fields of `Options`.
    """
    opts = Options(**options)
    codes = sparse_codes(ctx, opts.rows)
    if codes is None:
        return nulls(INFO, NOT_FINITE)
    text = read_text(ctx, opts.rows, tokens=True)
    z = sparse.csc_matrix(codes if text is None else codes[: len(text.chars)])
    z.eliminate_zeros()
    fires = np.diff(z.indptr)
    alive = np.flatnonzero(fires)
    if not len(alive):
        return nulls(INFO, "no latent fires")
    wanted = [latent for latent in ctx.extras.get("latents", ()) if fires[latent]]
    stored = np.union1d(evenly_spaced(alive, opts.latents), wanted).astype(np.int64)
    features = {latent: _statistics(latent, z, opts.bins) for latent in stored.tolist()}
    partners = pairs_of(z[:, stored], stored, opts.pair_rows, opts.partners)
    for feature, pairs in zip(features.values(), partners, strict=True):
        feature["partners"] = pairs
    bits = None if text is None else _add_text(features, z, text, opts)
    _add_logit_effect(features, ctx, opts)
    for feature, cosine in zip(
        features.values(), stability(ctx.sae, ctx.replicas, stored), strict=False
    ):
        feature["stability"] = cosine
    dead = [{"latent": latent, "density": 0.0} for latent in np.flatnonzero(fires == 0).tolist()]
    described = [*features.values(), *dead]
    arrays = {"feature_max": np.asarray(abs(z).max(axis=0).todense(), np.float32).ravel()}
    if bits is None:
        return nulls(INFO, NO_TEXT)._replace(features=described, arrays=arrays)
    mean_bits = float(bits[alive].mean())
    arrays["feature_next_bits"] = bits
    return Measured({"feature_next_bits": mean_bits}, arrays, features=described)


def _statistics(latent: int, z: sparse.csc_matrix, bins: int) -> dict[str, Any]:
    """Density and distribution of |z| of one latent, from codes (N, F)."""
    values = np.abs(z.data[z.indptr[latent] : z.indptr[latent + 1]])
    largest = float(values.max())
    return {
        "latent": latent,
        "density": rounded(len(values) / z.get_shape()[0], 3),
        "max": rounded(largest, 3),
        "mean": rounded(float(values.mean()), 3),
        "histogram": np.histogram(values, bins, (0, largest))[0].tolist(),
    }


def _add_text(
    features: dict[int, dict[str, Any]], z: sparse.csc_matrix, text: Text, opts: Options
) -> np.ndarray:
    """Add contexts and next characters to `features`; returns the bits of `followers`."""
    column = np.zeros(len(text.chars), z.dtype)
    for latent, feature in features.items():
        part = slice(z.indptr[latent], z.indptr[latent + 1])
        column[z.indices[part]] = z.data[part]
        strength = np.abs(column)
        top = top_rows(text, strength, opts.contexts)
        samples = quantile_rows(strength, opts.samples)
        feature["top"] = contexts_of(text, column, top, opts.before, opts.after)
        feature["samples"] = contexts_of(text, column, samples, opts.before, opts.after)
        column[z.indices[part]] = 0
    following, bits = followers(z, text, opts.characters)
    for latent, feature in features.items():
        feature["next"] = following[latent]
    return bits


def _add_logit_effect(features: dict[int, dict[str, Any]], ctx: EvalContext, opts: Options) -> None:
    """Add the characters whose logits each of `features` raises and lowers most, at its maximum."""
    path = _direct_path(ctx, opts.windows)
    if path is None:
        return
    rows = list(features.items())
    step = max(1, min(1024, MOST_ENTRIES // max(ctx.vocabulary, 1)))
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        acts = torch.zeros(len(part), ctx.sae.d_sae, device=ctx.device)
        for i, (latent, feature) in enumerate(part):
            acts[i, latent] = feature["max"]
        effect = path(acts)
        if effect is None:
            return
        for logits, (_, feature) in zip(effect, part, strict=True):
            best, worst = (_largest(sign * logits, opts.characters) for sign in (1, -1))
            feature["promotes"] = [[ctx.spell(i), rounded(logits[i], 3)] for i in best]
            feature["suppresses"] = [[ctx.spell(i), rounded(logits[i], 3)] for i in worst]


def _largest(values: np.ndarray, n: int) -> list[int]:
    """Places of the `n` largest of the values (V,), largest first."""
    if len(values) <= MANY:
        return np.argsort(-values, kind="stable")[:n].tolist()
    some = np.argpartition(-values, n)[:n]
    return some[np.argsort(-values[some], kind="stable")].tolist()


def followers(z: sparse.csc_matrix, text: Text, n: int) -> tuple[list[list[list[Any]]], np.ndarray]:
    """Characters that follow each latent.

    With p the distribution of the next character where the latent fires, q anywhere, and K
    different characters in n_j firings, the information in bits is

        KL(p || q) - (K - 1) / (2 n_j ln 2)

    where the second term corrects the bias of estimating p from counts; at least 0.

    Args:
        z: Codes without stored zeros, (N, F).
        text: Text of the rows.
        n: Number of characters listed per latent.

    Returns:
        For each latent `[character, p, p / q]` of the characters with the largest (positive) terms
        of KL(p || q), and the bits (F,), NaN for a latent that never fires.
    """
    points, ids = np.unique(text.following, return_inverse=True)
    entries = np.ones(len(ids)), (np.arange(len(ids)), ids)
    one_hot = sparse.csr_matrix(entries, shape=(len(ids), len(points)))
    on = sparse.csc_matrix((np.ones(len(z.data)), z.indices, z.indptr), shape=z.get_shape())
    together = sparse.csr_matrix(on.T @ one_hot)
    q = np.bincount(ids) / len(ids)
    listed: list[list[list[Any]]] = []
    bits = []
    step = max(1, MOST_ENTRIES // len(points))
    for begin in range(0, z.get_shape()[1], step):
        counts = together[begin : begin + step].toarray()
        total = counts.sum(1, keepdims=True)
        p = counts / np.maximum(total, 1)
        lift = p / q
        terms = np.where(p > 0, p * np.log2(np.where(p > 0, lift, 1)), 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            bias = ((counts > 0).sum(1) - 1) / (2 * total[:, 0] * np.log(2))
            bits.append(np.where(total[:, 0] > 0, np.maximum(terms.sum(1) - bias, 0), np.nan))
        best = np.argsort(-terms, axis=1, kind="stable")[:, :n]
        for latent, row in enumerate(best.tolist()):
            shares = [(int(points[i]), p[latent, i], lift[latent, i]) for i in row]
            positive = [s for i, s in zip(row, shares, strict=True) if terms[latent, i] > 0]
            listed.append([[text.spell(s), rounded(a, 3), rounded(b, 3)] for s, a, b in positive])
    return listed, np.concatenate(bits)


def pairs_of(z: sparse.csc_matrix, names: np.ndarray, rows: int, n: int) -> list[list[list[Any]]]:
    """Partners of each latent by the phi coefficient of firing.

    Args:
        z: Codes of m latents, (N, m).
        names: Index of each of these latents, (m,).
        rows: Number of rows to count on, from the first on.
        n: Number of partners per latent.

    Returns:
        For each latent `[name, phi]` of its partners with phi other than 0, largest |phi| first.
    """
    part = z.tocsr()[:rows]
    fired = (np.ones(len(part.data), np.float32), part.indices, part.indptr)
    on = sparse.csr_matrix(fired, shape=part.shape)
    total, m = on.get_shape()
    if on.nnz > DENSE_ABOVE * total * m:
        dense = on.toarray()
        both = (dense.T @ dense).astype(np.float64)
    else:
        both = (on.T @ on).toarray().astype(np.float64)
    count = both.diagonal().copy()
    deviation = np.sqrt(count * (total - count))
    scale = deviation[:, None] * deviation
    covariance = total * both - count[:, None] * count
    phi = np.divide(covariance, scale, out=np.zeros_like(both), where=scale > 0)
    np.fill_diagonal(phi, 0)
    order = np.argsort(-np.abs(phi), axis=1, kind="stable")[:, : min(n, m - 1)]
    partners = []
    for latent, row in enumerate(order.tolist()):
        correlated = [i for i in row if phi[latent, i]]
        partners.append([[int(names[i]), rounded(phi[latent, i], 3)] for i in correlated])
    return partners


@torch.no_grad()
def logit_effect(ctx: EvalContext, strength: np.ndarray, windows: int) -> np.ndarray | None:
    """Logits that each latent adds on the direct path to the output, less their mean.

        W_U (gamma * (d - mean d)) / sigma

    with d what the decoder adds to the residual stream, gamma the gain of the final norm, and sigma
    the mean of what that norm divides by. RMSNorm does not subtract the mean of d. The blocks after
    the SAE's site are left out.

    Args:
        ctx: Evaluation context.
        strength: Value of each latent, (F,).
        windows: Number of held-out windows over which sigma is averaged.

    Returns:
        Logits (F, V); None without a language model, if the SAE does not write to the residual
        stream (directly or through the output matrix of an MLP), or if a logit is not finite.
    """
    path = _direct_path(ctx, windows)
    if path is None:
        return None
    one_each = torch.diag(torch.as_tensor(strength, dtype=torch.float32, device=ctx.device))
    parts = [path(acts) for acts in one_each.split(1024)]
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def _direct_path(ctx: EvalContext, windows: int) -> Callable[[Tensor], np.ndarray | None] | None:
    """The map from codes (n, F) to logits (n, V) of `logit_effect`."""
    lm = ctx.lm
    store = ctx.held_out
    if lm is None or lm.model is None or store is None or not ctx.write_sites:
        return None
    site = ctx.write_sites[-1]
    model = lm.model
    layout = layout_of_model(model)
    if not _adds_to_stream(layout, site):
        return None
    blocks = blocks_of(model)
    norm = final_norm(model)
    tokens = lm.tokens(store.starts[spread(len(store.starts), windows)])[0].to(ctx.device)
    last = Site("resid", len(blocks))
    with torch.no_grad():
        stream = activations(model, tokens, [last])[last].float()
    variance = stream.var(-1, correction=0) if norm.centred else stream.square().mean(-1)
    sigma = variance.add(norm.eps).sqrt().mean()
    unembed = unembedding(model).get_parameter("weight").float()
    mlp_out = None
    if site.stream == "mlp_act":
        mlp_out = matrix(blocks[site.layer - 1].get_submodule(layout.mlp_act)).float()
    # Of an SAE over several sites, the last part of the output belongs to the last site.
    width = unembed.shape[1] if mlp_out is None else mlp_out.shape[0]

    @torch.no_grad()
    def path(acts: Tensor) -> np.ndarray | None:
        base = ctx.sae.decode(torch.zeros_like(acts[:1]))
        d = (ctx.sae.decode(acts) - base)[:, -width:].float()
        if mlp_out is not None:
            d = d @ mlp_out
        if norm.centred:
            d = d - d.mean(1, keepdim=True)
        logits = (d * norm.gain) @ unembed.T / sigma
        effect = (logits - logits.mean(1, keepdim=True)).cpu().numpy()
        return effect if np.isfinite(effect).all() else None

    return path


def _adds_to_stream(layout: Layout, site: Site) -> bool:
    """True if the site writes to the residual stream, directly or through one matrix."""
    if site.stream == "mlp_act":
        return layout.mlp_out == layout.mlp_act  # no norm between the matrix and the stream
    return site.stream != "mlp_in"


def stability(sae: SAE, replicas: tuple[SAE, ...], latents: np.ndarray) -> list[float]:
    """Largest cosine of each latent's decoder row with one of a replica's, mean over replicas.

    Args:
        sae: The SAE.
        replicas: The same SAE fitted with other seeds.
        latents: Latents of interest, (n,).

    Returns:
        n cosines; empty without replicas.
    """
    if not replicas:
        return []
    rows = _unit_decoder(sae)[latents]
    largest = [(rows @ _unit_decoder(replica).T).max(1).values for replica in replicas]
    return [rounded(cosine, 3) for cosine in torch.stack(largest).mean(0).tolist()]


def _unit_decoder(sae: SAE) -> Tensor:
    return F.normalize(sae.W_dec.detach().float(), dim=1)
