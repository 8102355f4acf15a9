"""Heads that carry the edges of a graph.

Attention is linear while its weights are constants, so an edge is a sum over paths, each of which
passes some heads on its way. A path is counted at the *last* head it passes, the one that brings it
to the target's position; paths that pass none stay at that position all the way. These parts sum to
the edge. They say which head moved something, not why it looked there: that is in the attention
weights, which are constants here.

What a source adds to the stream is carried forward through all blocks, and at each head it meets
the gradient of a target that comes back past no head. So a head costs no pass of its own.

Shape letters: R targets, T positions, L blocks, H heads of a block, C width of the residual stream,
N sources, E edges.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae_experiments.studies.attribution.influence import TINY
from sae_experiments.studies.attribution.local import LocalModel


def n_parts(local: LocalModel) -> int:
    """Number of parts of an edge: none of the heads, then the heads block by block."""
    return 1 + local.n_layer * local.frozen.blocks[0].n_head


def name_of(local: LocalModel, part: int) -> str | None:
    """Name of a part's head, counted from 1; None for the part that passes no head."""
    if not part:
        return None
    block, head = divmod(part - 1, local.frozen.blocks[0].n_head)
    return f"block {block + 1} head {head + 1}"


class EdgeTargets(NamedTuple):
    """Nodes that read the stream."""

    layer: Tensor
    """Layer whose second norm each reads; L for what reads the last stream, (R,)."""
    position: Tensor
    """(R,)."""
    vectors: Tensor
    """Direction that each reads, (R, C)."""


@torch.no_grad()
def targets_of(local: LocalModel, rows: Tensor) -> EdgeTargets:
    """Targets of some rows (R,) of the adjacency: latents, then logits."""
    nodes = local.nodes
    last = torch.full((len(local.logits.token),), local.n_layer, device=rows.device)
    layer = torch.cat([nodes.layer, last])[rows]
    position = torch.cat([nodes.position, torch.full_like(last, local.length - 1)])[rows]
    vectors = local.error.new_zeros(len(rows), local.error.shape[2])
    logits, _ = local.logit_vectors()
    for k in layer.unique().tolist():
        here = layer == k
        if k < local.n_layer:
            vectors[here] = local.read_vectors(k, rows[here])[0]
        else:
            vectors[here] = logits[rows[here] - nodes.n]
    return EdgeTargets(layer, position, vectors)


class _Gradients(NamedTuple):
    """Gradients of targets at their own positions along paths that pass no head, (R, C) each."""

    mixed: list[Tensor]
    """At what the attention of each block mixes."""
    written: list[Tensor]
    """At what the MLP of each block writes."""
    embedded: Tensor
    """At the embeddings."""


def _gradients(local: LocalModel, targets: EdgeTargets) -> _Gradients:
    layer, position, vectors = targets
    frozen, skips = local.frozen, local.sae.W_skip
    of_text = (position >= local.first)[:, None]
    mixed, written = [], []
    g = vectors * (layer == local.n_layer)[:, None]
    for k in reversed(range(local.n_layer)):
        block, clean = frozen.blocks[k], frozen.clean[k]
        written.append(g)
        after_mlp = g
        if skips is not None:
            through = block.norm_2.pull_back(clean.rstd_2[0, position], g @ skips[k])
            after_mlp = g + through * of_text
        read_here = vectors * (layer == k)[:, None]
        at_attention = g if block.parallel else after_mlp + read_here
        rstd = None if clean.rstd_out is None else clean.rstd_out[0, position]
        mixed.append(block.past_norm_out(rstd, at_attention))
        g = after_mlp + read_here
    return _Gradients(mixed[::-1], written[::-1], g)


@torch.no_grad()
def split(local: LocalModel, targets: EdgeTargets, target: Tensor, source: Tensor) -> Tensor:
    """Parts of edges by the last head passed.

    Args:
        local: The local replacement model.
        targets: Targets of the edges.
        target: Target of each edge, by its number among `targets`, (E,).
        source: Source of each edge: a column of the adjacency before those of biases, (E,).

    Returns:
        (E, parts), see `n_parts`. Each row sums to the edge's weight.
    """
    frozen, n_head = local.frozen, local.frozen.blocks[0].n_head
    grads = _gradients(local, targets)
    sources, number = source.unique(return_inverse=True)
    position = targets.position[target]
    out = local.error.new_zeros(len(target), n_parts(local))
    h = _embedded(local, sources)
    out[:, 0] = (h[number, position] * grads.embedded[target]).sum(-1)
    for k, (block, clean) in enumerate(zip(frozen.blocks, frozen.clean, strict=True)):
        mixed = block.mix_heads(clean.weights, block.norm_1.linear(h, clean.rstd_1))
        asked = torch.einsum("rc,hec->rhe", grads.mixed[k], block.W_o)
        first = 1 + k * n_head
        out[:, first : first + n_head] = (mixed[number, position] * asked[target]).sum(-1)
        added = mixed.flatten(2) @ block.W_o.flatten(0, 1)
        if block.norm_out is not None and clean.rstd_out is not None:
            added = block.norm_out.linear(added, clean.rstd_out)
        r = h + added
        written = _written(local, sources, k)
        out[:, 0] += (written[number, position] * grads.written[k][target]).sum(-1)
        if local.sae.W_skip is not None:
            read = block.norm_2.linear(h if block.parallel else r, clean.rstd_2)
            written[:, local.first :] += read[:, local.first :] @ local.sae.W_skip[k].t()
        h = r + written
    return out


def _embedded(local: LocalModel, sources: Tensor) -> Tensor:
    """Part of each of some sources (N,) in the stream before the first block, (N, T, C)."""
    h = local.error.new_zeros(len(sources), *local.error.shape[1:])
    kinds = (
        (local.sources.tokens, local.token_embedding),
        (local.sources.positions, local.position_embedding),
    )
    for columns, values in kinds:
        chosen = ((sources >= columns.start) & (sources < columns.stop)).nonzero().squeeze(1)
        at = sources[chosen] - columns.start
        h[chosen, at] = values[at]
    return h


def _written(local: LocalModel, sources: Tensor, k: int) -> Tensor:
    """Part of each of some sources (N,) in the output of the MLP of block k, (N, T, C)."""
    out = local.error.new_zeros(len(sources), *local.error.shape[1:])
    n, errors = local.nodes.n, local.sources.errors
    is_latent = sources < n
    layer = torch.where(is_latent, local.nodes.layer[sources.clamp(max=n - 1)], -1)
    low = 0 if local.sae.cross else k
    chosen = (is_latent & (layer >= low) & (layer <= k)).nonzero().squeeze(1)
    if len(chosen):
        latents = sources[chosen]
        out[chosen, local.nodes.position[latents]] = local.write_of(k, latents)
    begin = errors.start + k * local.length
    chosen = ((sources >= begin) & (sources < begin + local.length)).nonzero().squeeze(1)
    at = sources[chosen] - begin
    out[chosen, at] = local.error[k, at]
    return out


@torch.no_grad()
def edge_heads(local: LocalModel, edges: Tensor) -> Tensor:
    """Parts of chosen edges by the last head passed.

    Args:
        local: The local replacement model.
        edges: Chosen edges (n + m, N) from latents, errors and tokens into latents and then logits.

    Returns:
        (E, parts), in the order of `edges.nonzero()`; each row sums to the edge's weight.
    """
    target, source = edges.nonzero(as_tuple=True)
    rows, number = target.unique(return_inverse=True)
    targets = targets_of(local, rows)
    parts = local.error.new_zeros(len(target), n_parts(local))
    for some in source.unique().split(local.batch):
        chosen = (source >= some[0]) & (source <= some[-1])
        parts[chosen] = split(local, targets, number[chosen], source[chosen])
    return parts


def attention_numbers(parts: Tensor) -> dict[str, float]:
    """Share of the chosen edges that goes through attention, and how far one head carries it.

    Args:
        parts: Parts of edges (E, parts) by the last head passed.

    Returns:
        `attention_share`: absolute parts of heads / absolute parts of all. `top_head_share`: the
        largest part of a head / the sum over heads, weighted by that sum.
    """
    size = parts.abs()
    heads = size[:, 1:]
    total = float(heads.sum())
    return {
        "attention_share": total / max(float(size.sum()), TINY),
        "top_head_share": float(heads.amax(1).sum()) / max(total, TINY),
    }
