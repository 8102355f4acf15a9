"""The local replacement model of one prompt, and the exact attributions in it.

Attention weights and norm denominators are constants of the prompt, MLPs are the transcoder's
active latents plus an error that is a constant as well. Everything is then linear, and the
attribution from a source to a target is the source's value times the gradient of the target's
pre-activation (Ameisen et al. 2025, "Circuit Tracing").

Shape letters: R targets, T positions, L layers, C width of the residual stream, n active latents,
m logits, S sources.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae_experiments.models.frozen import FrozenModel
from sae_experiments.models.layouts import CausalLM
from sae_experiments.saes.cross_layer import EveryLayer


class Nodes(NamedTuple):
    """Active latents of a prompt, ordered by layer, then position, then latent."""

    layer: Tensor
    """Layer that each reads, from 0, (n,)."""
    position: Tensor
    """(n,)."""
    latent: Tensor
    """Number within its layer, (n,)."""
    value: Tensor
    """Activation, (n,)."""

    @property
    def n(self) -> int:
        """Number of active latents."""
        return len(self.value)


class LogitNodes(NamedTuple):
    """The most probable next tokens."""

    token: Tensor
    """Token ids, (m,)."""
    probability: Tensor
    """(m,)."""


class Sources(NamedTuple):
    """Columns of the adjacency, by kind."""

    latents: slice
    """Active latents."""
    errors: slice
    """Error nodes, by layer and then position."""
    tokens: slice
    """Token embeddings, by position."""
    positions: slice
    """Position embeddings, by position."""
    biases: slice
    """Attention's biases by layer, then the transcoder's biases by layer."""


class Adjacency(NamedTuple):
    """Attributions into every active latent and every logit."""

    weights: Tensor
    """Rows: latents, then logits; columns: see `Sources`. (n + m, S)."""
    constant: Tensor
    """Part of each target that comes from its own encoder bias and the norm's, (n + m,)."""
    value: Tensor
    """Pre-activation of each latent; each logit minus the mean logit, (n + m,)."""

    @property
    def gap(self) -> float:
        """Largest difference between a target's value and the sum of what goes into it.

        Relative to the root mean square of the values.
        """
        difference = self.weights.sum(1) + self.constant - self.value
        scale = self.value.square().mean().sqrt().clamp_min(1e-12)
        return float(difference.abs().max() / scale)


class LocalModel:
    """The local replacement model of one prompt.

    Args:
        model: A causal language model of a known layout.
        sae: Transcoder of all its layers.
        tokens: Token ids of the prompt, (1, T), without a begin-of-text token.
        logits: Cumulative probability of the logit nodes, and their largest number.
        memory_mb: Memory that a batch of gradients may take.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: CausalLM,
        sae: EveryLayer,
        tokens: Tensor,
        *,
        logits: tuple[float, int] = (0.95, 10),
        memory_mb: float = 64.0,
    ) -> None:
        self.sae = sae
        self.frozen = FrozenModel(model, tokens)
        clean = self.frozen.clean
        self.n_layer, self.length = len(clean), self.frozen.tokens.shape[1]
        #: First position of the text. Before it transcoders do nothing, and MLPs are errors.
        self.first = self.frozen.n_begin
        x = torch.cat([block.mlp_in[0] for block in clean], 1)
        acts = sae.encode(x).to(x.dtype)
        acts[: self.first] = 0
        recon = sae.reconstruct(x, acts).view(self.length, self.n_layer, -1)
        recon[: self.first] = 0
        written = torch.stack([block.mlp_out[0] for block in clean])
        #: Error nodes, (L, T, C).
        self.error = written - recon.transpose(0, 1)
        self.acts = acts
        self.nodes = _active(acts, self.n_layer)
        self.sources = self._columns()
        probability = self.frozen.log_probs(self.frozen.logits[0, -1]).exp()
        share, most = logits
        top = probability.topk(min(most, len(probability)))
        wanted = int((top.values.cumsum(0) < share).sum()) + 1
        self.logits = LogitNodes(top.indices[:wanted], top.values[:wanted])
        self.token_embedding = self.frozen.token_embedding[0]
        self.position_embedding = self.frozen.embedded[0] - self.token_embedding
        bytes_per_row = 6 * self.error[0].numel() * x.element_size()
        self.batch = max(1, int(memory_mb * 2**20 / bytes_per_row))

    def _columns(self) -> Sources:
        sizes = (self.nodes.n, self.n_layer * self.length, self.length, self.length)
        ends = torch.tensor([0, *sizes, 2 * self.n_layer]).cumsum(0).tolist()
        return Sources(*(slice(a, b) for a, b in itertools.pairwise(ends)))

    @property
    def n_sources(self) -> int:
        """Number of columns of the adjacency."""
        return self.sources.biases.stop

    # --- targets ---------------------------------------------------------------------------------

    @torch.no_grad()
    def read_vectors(self, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Directions that latents of one layer read, at the input of its second norm.

        Args:
            layer: The layer.
            chosen: Active latents of that layer, (R,).

        Returns:
            Directions (R, C), and the constant part of each pre-activation (R,).
        """
        sae, block = self.sae, self.frozen.blocks[layer]
        latent = self.nodes.latent[chosen] + layer * sae.per_layer
        rows = sae.encoders[latent]
        rstd = self.frozen.clean[layer].rstd_2[0, self.nodes.position[chosen]]
        offset = block.norm_2.bias - sae.centre[sae.site_of(layer)]
        return block.norm_2.pull_back(rstd, rows), rows @ offset + sae.b_enc[latent]

    @torch.no_grad()
    def logit_vectors(self) -> tuple[Tensor, Tensor]:
        """The same for the logits minus the mean logit, at the last position: (m, C) and (m,)."""
        frozen, token = self.frozen, self.logits.token
        rows = frozen.unembedding[token] - frozen.unembedding.mean(0)
        constant = rows @ frozen.norm.bias
        if frozen.logit_bias is not None:
            constant = constant + frozen.logit_bias[token] - frozen.logit_bias.mean()
        return frozen.norm.pull_back(frozen.rstd_f[0, -1], rows), constant

    # --- edges -----------------------------------------------------------------------------------

    @torch.no_grad()
    def adjacency(self) -> Adjacency:
        """Attributions into all active latents and logits."""
        n, m = self.nodes.n, len(self.logits.token)
        weights = self.error.new_zeros(n + m, self.n_sources)
        constant = self.error.new_zeros(n + m)
        value = self.error.new_zeros(n + m)
        value[:n] = self.nodes.value
        last = self.frozen.logits[0, -1]
        value[n:] = last[self.logits.token] - last.mean()
        for layer in range(self.n_layer):
            for rows in (self.nodes.layer == layer).nonzero().squeeze(1).split(self.batch):
                vectors, constant[rows] = self.read_vectors(layer, rows)
                weights[rows] = self.rows(layer, self.nodes.position[rows], vectors)
        vectors, constant[n:] = self.logit_vectors()
        where = torch.full((m,), self.length - 1, device=vectors.device)
        weights[n:] = self.rows(self.n_layer, where, vectors)
        return Adjacency(weights, constant, value)

    @torch.no_grad()
    def rows(self, layer: int, position: Tensor, vectors: Tensor) -> Tensor:
        """Attributions (R, S) into targets that read the stream in one layer.

        Args:
            layer: The layer whose second norm they read; L for what reads the last stream.
            position: Position of each target, (R,).
            vectors: Direction that each reads, (R, C).
        """
        out = vectors.new_zeros(len(vectors), self.n_sources)
        g = vectors.new_zeros(len(vectors), self.length, vectors.shape[1])
        g[torch.arange(len(g), device=g.device), position] = vectors
        if layer < self.n_layer and not self.frozen.blocks[layer].parallel:
            g = g + self.past_attention(out, layer, g)
        self.descend(out, layer, g)
        return out

    def descend(self, out: Tensor, k: int, g: Tensor) -> None:
        """Add what reaches the targets from everything before a block.

        Args:
            out: Attributions (R, S), changed in place.
            k: The block; L for the end of the stream.
            g: Gradients at the stream before the block, (R, T, C).
        """
        for j in reversed(range(k)):
            self.add_writes(out, j, g)
            after_mlp = self.past_mlp(j, g)
            # The MLP of a parallel block reads what attention has not changed.
            of_attention = g if self.frozen.blocks[j].parallel else after_mlp
            g = after_mlp + self.past_attention(out, j, of_attention)
        self.add_embeddings(out, g)

    def past_attention(self, out: Tensor, k: int, g: Tensor) -> Tensor:
        """Gradient before a block through its attention alone, from that after it, (R, T, C).

        What comes from the attention's biases is added to the attributions `out` (R, S).
        """
        block, clean = self.frozen.blocks[k], self.frozen.clean[k]
        g = self.before_norm_out(k, g)
        self.add_attention_bias(out, k, g)
        return block.pull_back(clean.weights[0], clean.rstd_1[0], g)

    def before_norm_out(self, k: int, g: Tensor) -> Tensor:
        """Gradient (R, T, C) before the output norm of attention in block k, from that after it."""
        rstd = self.frozen.clean[k].rstd_out
        return self.frozen.blocks[k].past_norm_out(None if rstd is None else rstd[0], g)

    def add_attention_bias(self, out: Tensor, k: int, g: Tensor) -> None:
        """Add what comes from the biases of block k's attention to attributions (R, S).

        Args:
            out: Attributions, changed in place.
            k: The block.
            g: Gradients at what that attention mixes, (R, T, C).
        """
        bias = self.frozen.blocks[k].mixed_bias
        out[:, self.sources.biases.start + k] += g.sum(1) @ bias

    def add_embeddings(self, out: Tensor, g: Tensor) -> None:
        """Add what comes from tokens and positions, from gradients (R, T, C) at the embedding."""
        out[:, self.sources.tokens] += (g * self.token_embedding).sum(-1)
        out[:, self.sources.positions] += (g * self.position_embedding).sum(-1)

    def past_mlp(self, k: int, g: Tensor) -> Tensor:
        """Gradient at the stream before the MLP of a block from that after it."""
        if self.sae.W_skip is None:
            return g
        block, clean = self.frozen.blocks[k], self.frozen.clean[k]
        through = block.norm_2.pull_back(clean.rstd_2[0], g @ self.sae.W_skip[k])
        through[:, : self.first] = 0
        return g + through

    def add_writes(self, out: Tensor, k: int, g: Tensor) -> None:
        """Add what reaches the targets from the output of the MLP of block k.

        Args:
            out: Attributions (R, S), changed in place.
            k: The block.
            g: Gradients at that output, (R, T, C).
        """
        columns = self.sources
        for chosen, vectors in self.writes(k):
            position = int(self.nodes.position[chosen[0]])
            out[:, chosen] += g[:, position] @ vectors.t()
        at = columns.errors.start + k * self.length
        out[:, at : at + self.length] += (g * self.error[k]).sum(-1)
        bias = self.sae.b_dec[self.sae.site_of(k)]
        if self.sae.W_skip is not None:
            offset = self.frozen.blocks[k].norm_2.bias - self.sae.centre[self.sae.site_of(k)]
            bias = bias + self.sae.W_skip[k] @ offset
        out[:, columns.biases.start + self.n_layer + k] += g[:, self.first :].sum(1) @ bias

    def writes(self, k: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Writes of active latents to the output of the MLP of block k, position by position.

        Yields:
            Active latents at one position (r,) and their writes (r, C).
        """
        first = k if not self.sae.cross else 0
        inside = (self.nodes.layer >= first) & (self.nodes.layer <= k)
        for t in range(self.length):
            chosen = (inside & (self.nodes.position == t)).nonzero().squeeze(1)
            if len(chosen):
                yield chosen, self.write_of(k, chosen)

    def write_of(self, k: int, chosen: Tensor) -> Tensor:
        """Writes (r, C) of active latents to one layer; they must be among its sources."""
        latent = self.nodes.layer[chosen] * self.sae.per_layer + self.nodes.latent[chosen]
        rows = self.sae.decoders[k][latent - self.sae.sources(k).start]
        return rows * self.nodes.value[chosen, None]


def _active(acts: Tensor, n_layer: int) -> Nodes:
    """Active latents of codes (T, F)."""
    by_layer = acts.view(len(acts), n_layer, -1).transpose(0, 1)
    layer, position, latent = by_layer.nonzero(as_tuple=True)
    return Nodes(layer, position, latent, by_layer[layer, position, latent])
