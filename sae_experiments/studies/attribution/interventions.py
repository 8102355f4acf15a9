"""Interventions on the real model: clamp a latent, and compare what follows with the graph.

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
    """Changes of what every intervention may change."""

    latents: Tensor
    """Change of the pre-activation of each active latent, (R, n)."""
    logits: Tensor
    """Change of each logit node, minus that of the mean logit, (R, m)."""


class Interventions:
    """Predicted and measured effects of clamping active latents of one prompt.

    A latent is set to a multiple of its activation by adding the difference, times its decoder
    rows, to the outputs of the real MLPs.

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
        per_run = 24 * local.length * local.error.shape[2] * local.error.element_size()
        self.batch = max(1, int(memory_mb * 2**20 / per_run))

    # --- predictions -----------------------------------------------------------------------------

    def direct(self, sources: Tensor, multiple: float) -> Effects:
        """Predicted direct effects of setting each source (R,) to a multiple of its activation."""
        change = (multiple - 1) * self.adjacency.weights[:, sources].t()
        return self._split(change)

    def total(self, sources: Tensor, multiple: float) -> Effects:
        """Predicted effects along all paths through active latents, which stay active."""
        n = self.local.nodes.n
        step = (multiple - 1) * self.adjacency.weights[:, sources].t()
        change = step.clone()
        for _ in range(self.local.n_layer):
            step = step[:, :n] @ self.slopes.t()
            change += step
        return self._split(change)

    def _split(self, change: Tensor) -> Effects:
        n = self.local.nodes.n
        return Effects(change[:, :n], change[:, n:])

    # --- measurements ----------------------------------------------------------------------------

    @torch.no_grad()
    def measure(
        self,
        sources: Tensor,
        multiple: float,
        *,
        free: bool,
        hold_norms: bool = False,
    ) -> Effects:
        """Measured effects of setting each source (R,) to a multiple of its activation.

        Args:
            sources: Active latents.
            multiple: 0 removes a latent, 2 doubles it.
            free: See the class.
            hold_norms: Hold the denominators of norms as well; only if constrained.
        """
        parts = []
        for some in sources.split(self.batch):
            one_each = torch.eye(len(some), dtype=torch.bool, device=some.device)
            delta = [
                (multiple - 1) * self._writes(k, some, one_each, own=free)
                for k in range(self.local.n_layer)
            ]
            parts.append(self._changes(self._rerun(delta, len(some), free, hold_norms)))
        return Effects(*(torch.cat(part) for part in zip(*parts, strict=True)))

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
        frozen = self.local.frozen

        def clamped(k: int, x: Tensor) -> Tensor:
            return frozen.clean[k].mlp_out + delta[k]

        def live(k: int, x: Tensor) -> Tensor:
            return frozen.blocks[k].mlp(x) + delta[k]

        return frozen.run(
            live if free else clamped,
            rows=rows,
            hold_attention=not free,
            hold_norms=hold_norms,
            last=True,
        )

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

    def later(self, sources: Tensor) -> Tensor:
        """Pairs (R, n) of a source and a latent that reads a later layer, here or further on."""
        nodes = self.local.nodes
        deeper = nodes.layer > nodes.layer[sources, None]
        return deeper & (nodes.position >= nodes.position[sources, None])

    # --- deletion --------------------------------------------------------------------------------

    @torch.no_grad()
    def deletion(self, order: Tensor, counts: Sequence[int]) -> Tensor:
        """KL divergence of the next token when the first latents of an order are removed, freely.

        Args:
            order: Active latents, the first to remove first, (n,).
            counts: Numbers of latents to remove.

        Returns:
            KL(p || p without them) in nats, (len(counts),).
        """
        counts = [min(count, len(order)) for count in counts]
        chosen = order[: max(counts)]
        rank = torch.arange(len(chosen), device=order.device)
        member = rank < torch.tensor(counts, device=order.device)[:, None]
        parts = []
        for some in member.split(self.batch):
            delta = [-self._writes(k, chosen, some, own=True) for k in range(self.local.n_layer)]
            run = self._rerun(delta, len(some), free=True, hold_norms=False)
            log_q = run.logits[:, 0].log_softmax(-1)
            log_p = self.local.frozen.logits[:, -1].log_softmax(-1).expand_as(log_q)
            parts.append(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1))
        return torch.cat(parts)
