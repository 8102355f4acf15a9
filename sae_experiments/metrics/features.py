"""What the feature browser shows of every latent: contexts, histogram of values, following characters, logit effect, partners, stability."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import NOT_FINITE, Text, nulls, read_text, sparse_codes
from sae_experiments.metrics.text.contexts import contexts_of, quantile_rows, top_rows
from sae_experiments.models.hooks import Site, as_sites, blocks_of, capture
from sae_experiments.models.layouts import layout_of_model, matrix
from sae_experiments.saes.base import SAE
from sae_experiments.sampling import spread

INFO = [
    MetricInfo(
        name="feature_next_bits",
        title="foresight",
        formula="mean over alive latents of KL(next character where it fires || next character anywhere), less the bias of counting",
        unit="bit",
        better="none",
        shown=False,
    ),
]


def measure(
    bench: Bench, *, rows: int | None, latents: int | None, contexts: int, samples: int, before: int, after: int, bins: int, characters: int,
    partners: int, pair_rows: int, windows: int,
) -> Measured:  # fmt: skip
    """One dict a latent for ``features/<report>_<seed>.json``; of more than ``latents`` latents that fire, so many evenly spaced ones.

    ``latent density max mean histogram`` (counts of non-zero |z| in ``bins`` equal bins up to max); with text ``top`` and ``samples`` (contexts:
    strongest first, one a window; and even quantiles of |z|), ``next`` ([character, share, share over its share anywhere] where it fires, by its
    part of the KL divergence); with a language model ``promotes`` and ``suppresses`` ([character, logits], see :func:`logit_effect`); ``partners``
    ([latent, phi] of firing on the first ``pair_rows`` rows); with replicas ``stability`` (largest cosine of its decoder row with one of the
    replica's, mean over replicas). Latents that never fire have ``latent`` and ``density`` 0 only.
    """
    codes = sparse_codes(bench, rows)
    if codes is None:
        return nulls(INFO, NOT_FINITE)
    text = read_text(bench, rows)
    codes = codes if text is None else codes[: len(text.chars)]
    z = codes.tocsc()
    z.eliminate_zeros()
    fires = np.diff(z.indptr)
    alive = np.flatnonzero(fires)
    if not len(alive):
        return nulls(INFO, "no latent fires")
    picked = alive if latents is None else alive[np.unique(np.linspace(0, len(alive) - 1, min(latents, len(alive))).round().astype(int))]
    picked = np.union1d(picked, [j for j in bench.extras.get("latents", ()) if fires[j]]).astype(np.int64)  # those a study asks for
    found = {int(j): _statistics(int(j), z, bins) for j in picked}
    for j, phi in zip(picked.tolist(), pairs_of(z[:, picked], picked, pair_rows, partners), strict=True):
        found[j]["partners"] = phi
    bits = None
    if text is not None:
        _add_contexts(found, z, text, contexts, samples, before, after)
        following, bits = followers(z, text, characters)
        for j in found:
            found[j]["next"] = following[j]
    effect = logit_effect(bench, np.array([found[j]["max"] if j in found else 0.0 for j in range(z.shape[1])]), windows)
    for j in found if effect is not None else ():
        order = np.argsort(-effect[j], kind="stable")
        for name, ids in (("promotes", order[:characters]), ("suppresses", order[::-1][:characters])):
            found[j][name] = [[bench.spell(i), _digits(effect[j, i])] for i in ids.tolist()]
    for j, cosine in zip(found, stability(bench.sae, bench.replicas, np.array(list(found))), strict=False):
        found[j]["stability"] = cosine
    dead = [{"latent": j, "density": 0.0} for j in np.flatnonzero(fires == 0).tolist()]
    value = None if bits is None else float(bits[alive].mean())
    why = {} if bits is not None else {"feature_next_bits": "there is no text"}
    return Measured({"feature_next_bits": value}, {} if bits is None else {"feature_next_bits": bits}, why, features=[*found.values(), *dead])


def _statistics(j: int, z: sparse.csc_matrix, bins: int) -> dict[str, Any]:
    values = np.abs(z.data[z.indptr[j] : z.indptr[j + 1]])
    top = float(values.max())
    counts = np.histogram(values, bins, (0, top))[0]
    about = {"density": _digits(len(values) / z.shape[0]), "max": _digits(top), "mean": _digits(float(values.mean()))}
    return {"latent": j, **about, "histogram": counts.tolist()}


def _add_contexts(found: dict[int, dict[str, Any]], z: sparse.csc_matrix, text: Text, top: int, samples: int, before: int, after: int) -> None:
    column = np.zeros(z.shape[0], z.dtype)
    for j, feature in found.items():
        part = slice(z.indptr[j], z.indptr[j + 1])
        column[z.indices[part]] = z.data[part]
        strength = np.abs(column)
        feature["top"] = contexts_of(text, column, top_rows(text, strength, top), before, after)
        feature["samples"] = contexts_of(text, column, quantile_rows(strength, samples), before, after)
        column[z.indices[part]] = 0


def followers(z: sparse.csc_matrix, text: Text, n: int) -> tuple[list[list[list[Any]]], np.ndarray]:
    """For each latent the ``n`` characters that follow it most tellingly, [character, share p, p / q], and KL(p || q) in bits (m,), which is
    corrected for the bias of counts, (K - 1) / (2 n ln 2) with K characters seen, and NaN where the latent never fires.
    """
    points, ids = np.unique(text.following, return_inverse=True)
    one_hot = sparse.csr_matrix((np.ones(len(ids)), (np.arange(len(ids)), ids)), shape=(len(ids), len(points)))
    on = sparse.csc_matrix((np.ones(len(z.data)), z.indices, z.indptr), shape=z.shape)
    counts = (on.T @ one_hot).toarray()
    total = counts.sum(1, keepdims=True)
    p, q = counts / np.maximum(total, 1), np.bincount(ids) / len(ids)
    ratio = p / q
    parts = np.where(p > 0, p * np.log2(np.where(p > 0, ratio, 1)), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        bias = ((counts > 0).sum(1) - 1) / (2 * total[:, 0] * np.log(2))
        bits = np.where(total[:, 0] > 0, np.maximum(parts.sum(1) - bias, 0), np.nan)
    best = np.argsort(-parts, axis=1, kind="stable")[:, :n]
    return [[[chr(points[i]), _digits(p[j, i]), _digits(ratio[j, i])] for i in row if parts[j, i] > 0] for j, row in enumerate(best.tolist())], bits


def pairs_of(z: sparse.csc_matrix, names: np.ndarray, rows: int, n: int) -> list[list[list[Any]]]:
    """For each column its ``n`` partners of largest |phi| of firing on the first ``rows`` rows, as [name, phi]."""
    part = z.tocsr()[:rows]
    on = sparse.csr_matrix((np.ones(len(part.data), np.float32), part.indices, part.indptr), shape=part.shape)
    total, m = on.shape
    if on.nnz > 0.08 * total * m:  # a matrix product costs less than counting pairs
        dense = on.toarray()
        both = (dense.T @ dense).astype(np.float64)
    else:
        both = (on.T @ on).toarray().astype(np.float64)
    count = both.diagonal().copy()
    scale = np.sqrt(count * (total - count))
    scale = scale[:, None] * scale
    phi = np.divide(total * both - count[:, None] * count, scale, out=np.zeros_like(both), where=scale > 0)
    np.fill_diagonal(phi, 0)
    order = np.argsort(-np.abs(phi), axis=1, kind="stable")[:, : min(n, m - 1)]
    return [[[int(names[i]), _digits(phi[j, i])] for i in row if phi[j, i]] for j, row in enumerate(order.tolist())]


@torch.no_grad()
def logit_effect(bench: Bench, strength: np.ndarray, windows: int) -> np.ndarray | None:
    """What each latent at its ``strength`` (F,) adds to the logits on the direct path, (F, V), less the mean over characters.

    ``W_U (gamma * (d - mean d)) / sigma`` with d what the decoder adds to the residual stream and sigma the mean standard deviation that the
    final layer norm divides by over ``windows`` held-out windows; what later blocks make of d is left out. None without a language model, or
    where the SAE does not write to the residual stream (directly or through the output matrix of an MLP).
    """
    lm, sites = bench.lm, as_sites(bench.write) if bench.write is not None else ()
    if lm is None or lm.model is None or bench.held_out is None or not sites or sites[-1].stream == "mlp_in":
        return None
    site, model = sites[-1], lm.model
    layout, head, blocks = layout_of_model(model), model.get_output_embeddings().weight, blocks_of(model)
    norm, starts = model.get_submodule(layout.norm), bench.held_out.starts
    tokens = lm.tokens(starts[spread(len(starts), windows)])[0].to(bench.device)
    with capture(model, [Site("resid", len(blocks))]) as seen:
        model(input_ids=tokens, use_cache=False)
    sigma = next(iter(seen.values())).float().var(-1, correction=0).add(norm.eps).sqrt().mean()
    through = matrix(blocks[site.layer - 1].get_submodule(layout.down)).float() if site.stream == "mlp_act" else None
    gamma, unembed, parts = norm.weight.float(), head.float(), []
    eye = torch.diag(torch.as_tensor(strength, dtype=torch.float32, device=bench.device))
    base = bench.sae.decode(torch.zeros_like(eye[:1]))
    for rows in eye.split(1024):
        d = (bench.sae.decode(rows) - base)[:, -_width(through, unembed) :].float()
        d = d if through is None else d @ through
        logits = ((d - d.mean(1, keepdim=True)) * gamma) @ unembed.T / sigma
        parts.append((logits - logits.mean(1, keepdim=True)).cpu())
    found = torch.cat(parts).numpy()
    return found if np.isfinite(found).all() else None


def _width(through: Tensor | None, unembed: Tensor) -> int:
    return unembed.shape[1] if through is None else through.shape[0]


def stability(sae: SAE, replicas: tuple[SAE, ...], latents: np.ndarray) -> list[float]:
    """For each of ``latents`` the largest cosine of its decoder row with one of a replica's, mean over replicas; [] without replicas."""
    rows = _unit(sae)[latents]
    return [_digits(v) for v in torch.stack([(rows @ _unit(r).T).max(1).values for r in replicas]).mean(0).tolist()] if replicas else []


def _unit(sae: SAE) -> Tensor:
    return torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=1)


def _digits(value: float) -> float:
    return float(f"{value:.3g}")
