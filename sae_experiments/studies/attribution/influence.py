"""Influence of the nodes of a graph on the logits, pruning by it, and the scores of the graph.

As in Ameisen et al. 2025, "Circuit Tracing". Shape letters: n active latents, m logits, N all
columns that count: latents, errors, tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Sums of absolute weights into a node below this are taken for none.
TINY = 1e-10


@dataclass(frozen=True)
class Graph:
    """The part of an adjacency that influence flows through: without positions and biases.

    Args:
        weights: Attributions into latents and then logits (n + m, N), from latents, errors and
            then tokens.
        probability: Probabilities of the logits, (m,).
        n_errors: Number of error nodes.
    """

    weights: Tensor
    probability: Tensor
    n_errors: int

    @property
    def n(self) -> int:
        """Number of latents."""
        return len(self.weights) - len(self.probability)

    @property
    def errors(self) -> slice:
        """Columns of the error nodes."""
        return slice(self.n, self.n + self.n_errors)

    @property
    def tokens(self) -> slice:
        """Columns of the tokens."""
        return slice(self.n + self.n_errors, self.weights.shape[1])

    @property
    def normalised(self) -> Tensor:
        """Absolute weights, with rows that sum to 1, or to 0 for a node without inputs."""
        size = self.weights.abs()
        return size / size.sum(1, keepdim=True).clamp_min(TINY)

    def influence(self) -> tuple[Tensor, Tensor]:
        """Share of the logits' probability that flows through each node.

        It is the sum of `p A`, `p A^2`, ..., which ends after as many terms as there are layers.

        Returns:
            Influence of the columns (N,), and the start of the flow in each row (n + m,): the
            influence of latents and the probability of logits.
        """
        normalised = self.normalised
        flow = torch.cat([normalised.new_zeros(self.n), self.probability.to(normalised)])
        total = normalised.new_zeros(normalised.shape[1])
        while bool(flow.any()):
            passed = flow @ normalised
            total += passed
            flow = torch.cat([passed[: self.n], torch.zeros_like(self.probability).to(passed)])
        rows = torch.cat([total[: self.n], self.probability.to(total)])
        return total, rows

    def scores(self) -> dict[str, float]:
        """Replacement and completeness of the graph.

        Returns:
            `replacement`: share of the flow that ends in tokens, not in errors. `completeness`:
            share of the edges into a node that does not come from errors, over the nodes with
            inputs, weighted by their influence. `completeness_all`: the same with tokens and errors
            among the nodes, counted as complete (as circuit-tracer 0.5 counts).
        """
        total, rows = self.influence()
        of_tokens, of_errors = float(total[self.tokens].sum()), float(total[self.errors].sum())
        complete = 1 - self.normalised[:, self.errors].sum(1)
        weight = float(rows.sum())
        inside = float((complete * rows).sum())
        leaves = of_tokens + of_errors
        return {
            "replacement": of_tokens / max(leaves, TINY),
            "completeness": inside / max(weight, TINY),
            "completeness_all": (inside + leaves) / max(weight + leaves, TINY),
        }

    def masked(self, nodes: Tensor, edges: Tensor | None = None) -> Graph:
        """The graph with some nodes (N,), and optionally only some edges (n + m, N)."""
        weights = self.weights * nodes
        weights[: self.n] *= nodes[: self.n, None]
        return Graph(weights if edges is None else weights * edges, self.probability, self.n_errors)

    def unexplained(self, kept: Tensor) -> Graph:
        """The graph of the kept nodes (N,), where what comes from dropped latents is an error.

        Scores of a pruned graph are taken from it. The added error is one column per target.
        """
        dropped = self.weights[:, : self.n] * ~kept[: self.n]
        pruned = self.masked(kept | self._is_error(kept))
        merged = dropped.sum(1, keepdim=True)
        merged[: self.n] *= kept[: self.n, None]
        weights = torch.cat(
            [
                pruned.weights[:, : self.errors.stop],
                merged,
                pruned.weights[:, self.errors.stop :],
            ],
            1,
        )
        return Graph(weights, self.probability, self.n_errors + 1)

    def _is_error(self, like: Tensor) -> Tensor:
        mask = torch.zeros_like(like)
        mask[self.errors] = True
        return mask


def prune(graph: Graph, node_share: float, edge_share: float) -> tuple[Tensor, Tensor]:
    """The smallest part of a graph that carries most of the influence.

    Nodes of largest influence are kept until their share of the sum reaches `node_share`, then
    edges between kept nodes in the same way up to `edge_share`. Nodes that then lead nowhere, and
    latents without inputs, are dropped. Tokens always stay.

    Args:
        graph: The graph.
        node_share: Share of the influence of latents, errors and tokens, 0 to 1.
        edge_share: Share of the influence of the edges, 0 to 1.

    Returns:
        Kept nodes (N,) and kept edges (n + m, N), as booleans.
    """
    influence, _ = graph.influence()
    nodes = keep_share(influence, node_share)
    nodes[graph.tokens] = True
    pruned = graph.masked(nodes)
    _, rows = pruned.influence()
    scores = pruned.normalised * rows[:, None]
    edges = keep_share(scores.flatten(), edge_share).view_as(scores) & (scores > 0)
    n = graph.n
    while True:
        used = edges.any(0)
        used[graph.tokens] = True
        used[:n] &= edges[:n].any(1)
        alive = nodes & used
        if bool((alive == nodes).all()):
            return nodes, edges
        nodes = alive
        edges = edges & nodes
        edges[:n] &= nodes[:n, None]


def keep_share(scores: Tensor, share: float) -> Tensor:
    """Mask of the largest scores that together reach a share of the sum."""
    order = torch.argsort(scores, descending=True, stable=True)
    total = scores.double()[order].cumsum(0)
    wanted = int((total < share * total[-1]).sum()) + 1 if len(scores) else 0
    mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    mask[order[:wanted]] = True
    return mask


def cumulative_share(influence: Tensor) -> Tensor:
    """Share of the sum that the nodes up to each one, in order of influence, have together."""
    order = torch.argsort(influence, descending=True, stable=True)
    total = influence.double()[order].cumsum(0)
    out = torch.empty_like(total)
    out[order] = total / total[-1].clamp_min(TINY)
    return out
