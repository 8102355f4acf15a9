"""Heads that carry the edges of a graph.

Attention is linear while its weights are constants, so an edge is a sum over paths, each of which
passes some heads on its way. A path is counted at the *last* head it passes, the one that brings it
to the target's position; paths that pass none stay at that position all the way. These parts sum to
the edge. They say which head moved something, not why it looked there: that is in the attention
weights, which are constants here.

Shape letters: R targets, T positions, L blocks, H heads of a block, C width of the residual stream,
S sources, E edges.
"""

from __future__ import annotations

from collections.abc import Iterator

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


@torch.no_grad()
def head_rows(local: LocalModel, layer: int, position: Tensor, vectors: Tensor) -> Tensor:
    """Attributions into targets that read the stream in one layer, by the last head passed.

    Args:
        local: The local replacement model.
        layer: The layer whose second norm they read; L for what reads the last stream.
        position: Position of each target, (R,).
        vectors: Direction that each reads, (R, C).

    Returns:
        (R, parts, S), see `n_parts`.
    """
    n_head = local.frozen.blocks[0].n_head
    out = vectors.new_zeros(len(vectors), n_parts(local), local.n_sources)
    direct = out[:, 0]
    each = torch.arange(len(vectors), device=vectors.device)
    g = vectors.new_zeros(len(vectors), local.length, vectors.shape[1])
    g[each, position] = vectors
    for k in reversed(range(local.n_layer)):
        block, clean = local.frozen.blocks[k], local.frozen.clean[k]
        of_attention = g
        if k < layer:
            local.add_writes(direct, k, g)
            g = local.past_mlp(k, g)
            of_attention = of_attention if block.parallel else g
        if k < layer or (k == layer and not block.parallel):
            mixed = local.before_norm_out(k, of_attention)
            local.add_attention_bias(direct, k, mixed)
            through = block.pull_back_heads(
                clean.weights[0], clean.rstd_1[0], position, mixed[each, position]
            )
            part = vectors.new_zeros(len(vectors) * n_head, local.n_sources)
            local.descend(part, k, through.flatten(0, 1))
            first = 1 + k * n_head
            out[:, first : first + n_head] = part.view(len(vectors), n_head, -1)
    local.add_embeddings(direct, g)
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
    by_edge = local.error.new_zeros(int(edges.sum()), n_parts(local))
    number = edges.flatten().cumsum(0).view_as(edges) - 1
    batch = max(1, local.batch // n_parts(local))
    for layer, rows in _targets(local, edges):
        for some in rows.split(batch):
            position, vectors = _read(local, layer, some)
            parts = head_rows(local, layer, position, vectors)
            chosen = edges[some]
            target, source = chosen.nonzero(as_tuple=True)
            by_edge[number[some][chosen]] = parts[target, :, source]
    return by_edge


def _targets(local: LocalModel, edges: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Rows that have chosen edges, layer by layer; logits read layer L."""
    n = local.nodes.n
    used = edges.any(1).nonzero().squeeze(1)
    last = torch.full((len(edges) - n,), local.n_layer, device=edges.device)
    layer = torch.cat([local.nodes.layer, last])[used]
    for k in layer.unique().tolist():
        yield k, used[layer == k]


def _read(local: LocalModel, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (R,) and read vectors (R, C) of targets in one layer."""
    if layer < local.n_layer:
        return local.nodes.position[rows], local.read_vectors(layer, rows)[0]
    vectors = local.logit_vectors()[0][rows - local.nodes.n]
    return torch.full_like(rows, local.length - 1), vectors


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
