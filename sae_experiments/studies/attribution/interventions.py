"""Interventions on the real model: clamp latents and compare the effects with the graph.

Shape letters: R interventions, T positions, C width of the residual stream, n active latents, m
logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_experiments.models.frozen import Rerun
from sae_experiments.studies.attribution.local import Adjacency, LocalModel


class Effects(NamedTuple):
    """Changes that each intervention causes."""

    latents: Tensor
    """Change of the pre-activation of each active latent, (R, n)."""
    logits: Tensor
    """Change of each logit node, minus that of the mean logit, (R, m)."""


class Interventions:
    """Predicted and measured effects of clamping active latents of one prompt.

    A latent is set to a multiple of its activation by adding the difference, times its decoder
    rows, to the outputs of the real MLPs. Sets of latents are clamped together.

    - *Constrained*: MLP outputs are those of the clean run plus the latent's writes to all layers,
      and attention weights those of the clean run; norms respond. It tests direct effects.
    - *Free*: only the write to the latent's own layer is added, and attention, norms and all later
      MLPs respond. It tests total effects, along all paths of the graph.

    Args:
        local: The local replacement model.
        adjacency: Its attributions.
        memory_mb: Memory that a batch of reruns may take.
    """

    def __init__(self, local: LocalModel, adjacency: Adjacency, *, memory_mb: float = 64.0) -> None:
        self.local = local
        self.adjacency = adjacency
        n = local.nodes.n
        #: Change of each target per unit of each latent's activation, (n + m, n).
        self.slopes = adjacency.weights[:, :n] / local.nodes.value
        entries = 24 * local.length * local.error.shape[2] + 4 * local.frozen.logits.shape[2]
        per_run = entries * local.error.element_size()
        self.batch = max(1, int(memory_mb * 2**20 / per_run))

    def members(self, groups: Sequence[Tensor] | Tensor) -> Tensor:
        """Sets (R, n) of the latents in each of R groups."""
        sets = torch.zeros(len(groups), self.local.nodes.n, dtype=torch.bool)
        for row, group in zip(sets, groups, strict=True):
            row[group.cpu()] = True
        return sets.to(self.slopes.device)

    def one_each(self, latents: Tensor) -> Tensor:
        """Sets (R, n) with one latent each, for latents (R,)."""
        return self.members(latents[:, None])

    # --- predictions -----------------------------------------------------------------------------

    def direct(self, sets: Tensor, multiple: float) -> Effects:
        """Predicted direct effects of setting the latents of each set to a multiple of theirs.

        Args:
            sets: Active latents that are clamped together, as booleans (R, n).
            multiple: 0 removes a latent, 2 doubles it.
        """
        return self._split(self._step(sets, multiple))

    def total(self, sets: Tensor, multiple: float) -> Effects:
        """Predicted effects along all paths through active latents, which stay active.

        Effects of the latents of a set are added up, those through one another included: a free
        intervention adds its writes to a model that goes on to respond.
        """
        step = self._step(sets, multiple)
        change = step.clone()
        for _ in range(self.local.n_layer):
            step = step[:, : self.local.nodes.n] @ self.slopes.t()
            change += step
        return self._split(change)

    def _step(self, sets: Tensor, multiple: float) -> Tensor:
        """Direct effects (R, n + m) of sets."""
        weights = self.adjacency.weights[:, : self.local.nodes.n]
        return (multiple - 1) * sets.to(weights) @ weights.t()

    def _split(self, change: Tensor) -> Effects:
        n = self.local.nodes.n
        return Effects(change[:, :n], change[:, n:])

    # --- measurements ----------------------------------------------------------------------------

    @torch.no_grad()
    def measure(
        self, sets: Tensor, multiple: float, *, free: bool, hold_norms: bool = False
    ) -> Effects:
        """Measured effects of setting the latents of each set to a multiple of their activation.

        Args:
            sets: Active latents that are clamped together, as booleans (R, n).
            multiple: 0 removes a latent, 2 doubles it.
            free: See the class.
            hold_norms: Hold the denominators of norms as well; only if constrained.
        """
        parts = []
        for some in sets.split(self.batch):
            run = self._clamped(some, multiple, free=free, hold_norms=hold_norms)
            parts.append(self._changes(run))
        return Effects(*(torch.cat(part) for part in zip(*parts, strict=True)))

    @torch.no_grad()
    def next_tokens(self, sets: Tensor, multiple: float) -> Tensor:
        """Log probabilities (R, V) of the next token after a free intervention on each set."""
        parts = [
            self.local.frozen.log_probs(self._clamped(some, multiple, free=True).logits[:, 0])
            for some in sets.split(self.batch)
        ]
        return torch.cat(parts)

    def _clamped(
        self, sets: Tensor, multiple: float, *, free: bool, hold_norms: bool = False
    ) -> Rerun:
        """Run the real model with each set (R, n) at a multiple of its activation."""
        chosen = sets.any(0).nonzero().squeeze(1)
        member = sets[:, chosen]
        delta = [
            (multiple - 1) * self._writes(k, chosen, member, own=free)
            for k in range(self.local.n_layer)
        ]
        return self._rerun(delta, len(sets), free, hold_norms)

    def _writes(self, k: int, chosen: Tensor, member: Tensor, *, own: bool) -> Tensor:
        """Writes (R, T, C) of sets of latents to one layer.

        Args:
            k: The layer.
            chosen: Active latents (r,).
            member: Latents that belong to each set, (R, r).
            own: Only the writes to the layer that a latent reads.
        """
        local = self.local
        layer = local.nodes.layer[chosen]
        low = k if own or not local.sae.cross else 0
        inside = ((layer >= low) & (layer <= k)).nonzero().squeeze(1)
        out = local.error.new_zeros(len(member), local.length, local.error.shape[2])
        if len(inside):
            vectors = local.write_of(k, chosen[inside])
            position = local.nodes.position[chosen[inside]]
            amount = member[:, inside].to(vectors)
            out.index_add_(1, position, amount[:, :, None] * vectors)
        return out

    def _rerun(self, delta: list[Tensor], rows: int, free: bool, hold_norms: bool) -> Rerun:
        """Run the real model with something added to the outputs of its MLPs."""
        frozen, first = self.local.frozen, self.local.first
        if free:
            return frozen.free(delta)

        def clamped(k: int, x: Tensor) -> Tensor:
            return (frozen.clean[k].mlp_out + delta[k])[:, first:]

        return frozen.held(clamped, rows=rows, norms=hold_norms, last=True)

    def _changes(self, run: Rerun) -> Effects:
        """Changes of pre-activations and logits in a rerun."""
        local = self.local
        nodes = local.nodes
        latents = local.error.new_zeros(len(run.logits), nodes.n)
        for layer, x in enumerate(run.mlp_in):
            chosen = (nodes.layer == layer).nonzero().squeeze(1)
            rows = local.sae.encoders[nodes.latent[chosen] + layer * local.sae.per_layer]
            moved = (x - local.frozen.clean[layer].mlp_in)[:, nodes.position[chosen]]
            latents[:, chosen] = (moved * rows).sum(-1)
        moved = run.logits[:, 0] - local.frozen.logits[:, -1]
        logits = moved[:, local.logits.token] - moved.mean(1, keepdim=True)
        return Effects(latents, logits)

    def later(self, sets: Tensor) -> Tensor:
        """Pairs (R, n) of a set and a latent outside it that some member can reach.

        Such a latent reads a later layer, here or further on.
        """
        nodes = self.local.nodes
        deeper = nodes.layer > nodes.layer[:, None]
        reached = deeper & (nodes.position >= nodes.position[:, None])
        return (sets.to(self.slopes) @ reached.to(self.slopes) > 0) & ~sets

    # --- deletion --------------------------------------------------------------------------------

    @torch.no_grad()
    def deletion(self, order: Tensor, counts: Sequence[int]) -> Tensor:
        """KL divergence of the next token when the first latents of an order are removed, freely.

        Args:
            order: Active latents in the order of their removal, (n,).
            counts: Numbers of latents to remove.

        Returns:
            KL(p || p without them) in nats, (len(counts),).
        """
        n = len(order)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(n, device=order.device)
        sets = rank < torch.tensor(counts, device=order.device)[:, None]
        log_q = self.next_tokens(sets, 0.0)
        log_p = self.local.frozen.log_probs(self.local.frozen.logits[:, -1]).expand_as(log_q)
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
