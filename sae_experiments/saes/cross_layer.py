"""Transcoders of every MLP at once, with decoders to the own layer or to all later ones as well.

Ameisen et al. 2025, "Circuit Tracing"; with skip paths: Paulo et al. 2025.

Shape letters: L layers, C width of one site, P latents of one layer, besides those of `saes.base`
(D = O = L C, F = L P). Latents are ordered by layer: latent i reads layer `i // P`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.saes import ops, static
from sae_experiments.saes.base import SAE, Inference, NotExportable, Units, by_rows, sparse
from sae_experiments.saes.batch_topk import BatchTopK
from sae_experiments.saes.pattern import Pattern
from sae_experiments.saes.selection import top_mask
from sae_experiments.saes.static import StaticPattern
from sae_experiments.saes.types import Batch, Codes, Forward


class EveryLayer(SAE):
    """`a_l = act(W_enc_l x_l + b_enc_l)`, `yhat_k = sum_{l <= k} W_dec_lk^T a_l + b_dec_k`.

    Common part of the transcoders of every layer. A subclass inherits from this class first, and
    then from the SAE variant that decides which latents are active.

    The sites lie side by side in x and y (B, L C), in order of their layers. The L0 is that of all
    layers together. Every site is centred and scaled by itself, so that the loss

        sum_k ||y_k - yhat_k||^2

    is a sum of normalised errors. A latent's decoder rows together have length 1, so that an
    activation is the size of everything that the latent writes, and late latents, with few rows,
    compete on equal terms.

    Weights are stored without the blocks that are always 0. `W_enc` and `W_dec` are copies that
    hold them, in the form of every other SAE.

    Args:
        n_sites: Number of layers L.
        cross: A latent writes to its own and all later layers; false: to its own layer alone, which
            makes per-layer transcoders.
        skip: Add a linear path from each layer's input to its output.
        **kwargs: Further arguments of the SAE that chooses active latents.
    """

    supports_bf16 = False
    per_site = True

    def __init__(self, *, n_sites: int | None, cross: bool, skip: bool, **kwargs: Any) -> None:
        if n_sites is None:
            raise UserError("sae.model.n_sites=null: give the number of sites in sae.read")
        self.n_sites = n_sites  # `_make_weights`, which is called next, reads these two
        self.cross = cross
        super().__init__(pre_bias=False, **kwargs)
        shape = (n_sites, self.width, self.width)
        self.W_skip = nn.Parameter(torch.zeros(shape)) if skip else None

    def _make_weights(self) -> None:
        n_sites = self.n_sites
        if n_sites < 1 or self.d_in % n_sites or self.d_out != self.d_in:
            raise UserError(
                f"sae.read and sae.write must name {n_sites} sites of equal width each "
                f"(d_in={self.d_in}, d_out={self.d_out}), one per layer"
            )
        if self.d_sae % n_sites:
            raise UserError(
                f"sae.d_sae={self.d_sae}: the number of latents must be a multiple of the number "
                f"of layers, {n_sites}"
            )
        self.width = self.d_in // n_sites
        self.per_layer = self.d_sae // n_sites
        decoders = [
            torch.randn(self.sources(k).stop - self.sources(k).start, self.width)
            for k in range(n_sites)
        ]
        self.decoders = nn.ParameterList(decoders)
        self.encoders = nn.Parameter(ops.unit_rows(torch.randn(self.d_sae, self.width)))
        with torch.no_grad():
            self._normalise()

    # --- weights ---------------------------------------------------------------------------------

    def sources(self, k: int) -> slice:
        """Latents that write to layer k."""
        return slice(0 if self.cross else k * self.per_layer, (k + 1) * self.per_layer)

    def latents_of(self, layer: int) -> slice:
        """Latents that read a layer."""
        return slice(layer * self.per_layer, (layer + 1) * self.per_layer)

    def site_of(self, layer: int) -> slice:
        """Columns of x and y that belong to a layer."""
        return slice(layer * self.width, (layer + 1) * self.width)

    @property
    @torch.no_grad()
    def W_enc(self) -> Tensor:
        """All encoder rows (F, D), each 0 but at its own layer; a copy without a graph."""
        full = self.encoders.new_zeros(self.d_sae, self.d_in)
        for k in range(self.n_sites):
            full[self.latents_of(k), self.site_of(k)] = self.encoders[self.latents_of(k)]
        return full

    @property
    @torch.no_grad()
    def W_dec(self) -> Tensor:
        """All decoder rows (F, O), each 0 at the layers it does not write to; without a graph."""
        full = self.encoders.new_zeros(self.d_sae, self.d_out)
        for k, weight in enumerate(self.decoders):
            full[self.sources(k), self.site_of(k)] = weight
        return full

    def _squared_lengths(self, others: list[Tensor] | None = None) -> Tensor:
        """Inner product (F,) of each latent's decoder with itself or `others`, over layers."""
        total = self.encoders.new_zeros(self.d_sae)
        for k, weight in enumerate(self.decoders):
            other = weight if others is None else others[k]
            total[self.sources(k)] += (weight.detach() * other.detach()).sum(1)
        return total

    def _normalise(self) -> None:
        """Scale each latent's decoder rows so that together they have length 1."""
        length = self._squared_lengths().sqrt_().clamp_min_(1e-8)
        for k, weight in enumerate(self.decoders):
            weight.data.div_(length[self.sources(k), None])

    def decoder_norms(self) -> Tensor:
        """Length (F,) by which one unit of each latent moves the reconstruction, all layers."""
        return self._squared_lengths().sqrt()

    # --- codes -----------------------------------------------------------------------------------

    def _encoded(self, vector: Tensor) -> Tensor:
        """Product (F,) of the encoder and one vector (D,)."""
        blocks = self.encoders.view(self.n_sites, self.per_layer, self.width)
        return torch.einsum("lpc,lc->lp", blocks, vector.view(self.n_sites, -1)).flatten()

    def bias(self) -> Tensor:
        """Encoder bias (F,) with the origin folded in."""
        return self.b_enc - self._encoded(self.origin())

    @by_rows("d_in")
    def pre_acts(self, x: Tensor) -> Tensor:
        """Pre-activations (..., F) of rows (..., D), differentiable."""
        x = self.shifted(x)
        parts = [
            nn.functional.linear(
                x[:, self.site_of(k)],
                self.encoders[self.latents_of(k)],
                self.b_enc[self.latents_of(k)],
            )
            for k in range(self.n_sites)
        ]
        return torch.cat(parts, 1)

    @torch.no_grad()
    def encoder_matmul(self, x: Tensor, bias: Tensor, weight: Tensor | None = None) -> Tensor:
        """Pre-activations (B, F) without a graph, in a buffer that the next call overwrites."""
        buffer = self._scratch.get("pre")
        if static.on():
            buffer = x.new_empty(len(x), self.d_sae)
        elif buffer is None or len(buffer) < len(x) or buffer.device != x.device:
            buffer = self._scratch["pre"] = x.new_empty(len(x), self.d_sae)
        buffer = buffer[: len(x)]
        for k in range(self.n_sites):
            latents = self.latents_of(k)
            part = x[:, self.site_of(k)]
            if x.device.type == "cpu":
                with ops.fast_matmul():
                    torch.mm(part, self.encoders[latents].t(), out=buffer[:, latents])
            else:
                torch.mm(part, self.encoders[latents].t(), out=buffer[:, latents])
        return buffer.add_(bias)

    def encode_from(self, layer: int, x: Tensor, support: Tensor | None = None) -> Tensor:
        """Codes of the latents that read one layer.

        Args:
            layer: The layer, counted from 0.
            x: Input of its MLP, (..., C).
            support: Active latents (..., P), as booleans. None: those above the threshold.

        Returns:
            (..., P).
        """
        pre = self.pre_acts_from(layer, x)
        return pre * (self.is_active(layer, pre) if support is None else support)

    def pre_acts_from(self, layer: int, x: Tensor) -> Tensor:
        """Pre-activations (..., P) of the latents that read one layer, from (..., C)."""
        latents = self.latents_of(layer)
        x = x - self.centre[self.site_of(layer)]
        return nn.functional.linear(x, self.encoders[latents], self.b_enc[latents])

    def is_active(self, layer: int, pre: Tensor) -> Tensor:
        """Support (..., P) of the latents that read one layer, from their pre-activations."""
        return pre > self.cutoffs()[self.latents_of(layer)]

    def cutoffs(self) -> Tensor:
        """Pre-activations (F,) above which latents are active at inference."""
        return self.threshold.expand(self.d_sae)

    def decode(self, acts: Tensor) -> Tensor:
        """Reconstruction (..., O) of dense codes (..., F)."""
        acts = self.as_rows(acts, "d_sae")
        parts = [acts[..., self.sources(k)] @ weight for k, weight in enumerate(self.decoders)]
        return torch.cat(parts, -1) + self.b_dec

    def decode_codes(self, codes: Codes) -> Tensor:
        """Reconstruction (B, O) of a code, from its active entries if they are given."""
        if codes.pattern is None:
            return self.decode(codes.dense())
        return torch.cat(self._decode_sparse(codes), 1) + self.b_dec

    def decode_to(self, layer: int, acts: Tensor) -> Tensor:
        """Write (..., C) of dense codes (..., F) to one layer, with that layer's bias."""
        bias = self.b_dec[self.site_of(layer)]
        return acts[..., self.sources(layer)] @ self.decoders[layer] + bias

    def skip_to(self, layer: int, x: Tensor) -> Tensor | float:
        """Skip path (..., C) of one layer from its input (..., C); 0 without skip paths."""
        if self.W_skip is None:
            return 0.0
        return (x - self.centre[self.site_of(layer)]) @ self.W_skip[layer].t()

    def replacement(
        self, shape: Sequence[int], support: Tensor | None = None
    ) -> Callable[[int, Tensor], Tensor]:
        """MLPs of all layers in this SAE's form, for one pass through a language model.

        Args:
            shape: Leading dimensions of the inputs that it will be given.
            support: Active latents (*shape, F), as booleans. None: those above the threshold.

        Returns:
            A function of the layer, counted from 0 and called in order, and the input (..., C) of
            its MLP. It returns what the SAE puts in place of that MLP's output.
        """
        acts = self.encoders.new_zeros(*shape, self.d_sae)

        def mlp(layer: int, x: Tensor) -> Tensor:
            latents = self.latents_of(layer)
            on = None if support is None else support[..., latents]
            acts[..., latents] = self.encode_from(layer, x, on)
            return self.decode_to(layer, acts) + self.skip_to(layer, x)

        return mlp

    @by_rows("d_in")
    def linear_path(self, x: Tensor) -> Tensor | None:
        """The skip paths of rows (..., D)."""
        if self.W_skip is None:
            return None
        x = (x - self.centre).view(len(x), self.n_sites, -1)
        return torch.einsum("blc,loc->blo", x, self.W_skip).flatten(1)

    # --- training --------------------------------------------------------------------------------

    def begin(self, phase: str, x: Tensor, y: Tensor) -> None:
        """`b_dec` becomes the geometric median of the outputs, and pre-activations are centred."""
        self.b_dec.data.copy_(ops.geometric_median(y))
        self.b_enc.data.copy_(-self._encoded(x.mean(0)))

    def training_forward(self, batch: Batch) -> Forward:
        """One forward pass that keeps a graph only where a gradient can flow."""
        bias = self.bias()
        pre = self.encoder_matmul(batch.x, bias)
        support = sparse(self.support(pre))
        if isinstance(support, Pattern):
            x, by_layer = batch.x.view(-1, self.width), self._by_layer(support)
            values = support.gather(pre)
            if ops.rounds(self.encoders):
                values = ops.exact_entries(by_layer, x, self.encoders, bias)
            active_pre = ops.entries(x, self.encoders, bias, values, by_layer)
            values = support.weighted(self.activation(active_pre, support.col))
            codes = Codes(values, support)
            parts = self._decode_sparse(codes)
            mask = None
        else:
            mask = support.to(pre.dtype)
            active_pre = self._dense_entries(batch.x, bias, pre, mask)
            values = self.activation(active_pre, None)
            if values is not active_pre:
                values = ops.masked(values, mask)
            codes = Codes(values)
            parts = [
                ops.decode(values[:, self.sources(k)], None, weight)
                for k, weight in enumerate(self.decoders)
            ]
        recon = torch.cat(parts, 1) + self.b_dec
        direct = self.linear_path(batch.x)
        if direct is not None:
            recon = recon + direct
        return Forward(batch, pre, codes, recon, active_pre, None, mask)

    def _by_layer(self, pattern: Pattern) -> Pattern:
        """The same entries in a matrix (B L, F) whose rows are the layers of the rows of x."""
        layer = torch.div(pattern.col, self.per_layer, rounding_mode="floor")
        starts = torch.arange(pattern.n_rows * self.n_sites + 1, device=pattern.col.device)
        row = pattern.row * self.n_sites + layer
        crow = torch.searchsorted(row, starts, out_int32=True)
        return pattern.like(crow, pattern.col)

    def _decode_sparse(self, codes: Codes) -> list[Tensor]:
        """Writes (B, C) of the active entries to each layer, without biases."""
        values, pattern = codes
        parts = []
        for k, weight in enumerate(self.decoders):
            sources = self.sources(k)
            inside = (pattern.col >= sources.start) & (pattern.col < sources.stop)
            if isinstance(pattern, StaticPattern):
                col = (pattern.col - sources.start).clamp(0, len(weight) - 1)
                part = StaticPattern(pattern.crow, col, len(weight))
                parts.append(ops.decode(values.masked_fill(~inside, 0), part, weight))
                continue
            before = nn.functional.pad(inside.cumsum(0, dtype=torch.int32), (1, 0))
            chosen = inside.nonzero().squeeze(1)
            col = pattern.col.index_select(0, chosen) - sources.start
            part = Pattern(before.index_select(0, pattern.crow), col, len(weight))
            parts.append(ops.decode(values.index_select(0, chosen), part, weight))
        return parts

    def _dense_entries(self, x: Tensor, bias: Tensor, pre: Tensor, mask: Tensor) -> Tensor:
        """Pre-activations (B, F) of a dense code, 0 outside the mask."""
        parts = []
        for k in range(self.n_sites):
            latents = self.latents_of(k)
            parts.append(
                ops.entries(
                    x[:, self.site_of(k)],
                    self.encoders[latents],
                    bias[latents],
                    pre[:, latents],
                    mask[:, latents],
                )
            )
        return torch.cat(parts, 1)

    def aux_k_loss(self, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """Share of `residual` that the dead latents leave unexplained (see `ops.aux_k`).

        Each layer's part is computed with that layer's columns alone: rows of the whole width,
        most of them zeros, would take gigabytes where many latents of many layers are dead.
        """
        if static.on():
            return self._aux_k_masked(x, residual, dead)
        dead = dead.nonzero().squeeze(1)
        e = residual.detach()
        pre = self._by_layer_pre_acts(x.detach() - self.origin().detach(), dead)
        acts = nn.functional.leaky_relu(pre, 0.1)
        if self.k_aux < pre.shape[1]:
            acts = ops.masked(acts, top_mask(pre.detach(), self.k_aux))
        parts = []
        for k, weight in enumerate(self.decoders):
            sources = self.sources(k)
            inside = (dead >= sources.start) & (dead < sources.stop)
            parts.append(acts[:, inside] @ weight[dead[inside] - sources.start])
        return ops.unexplained(e, torch.cat(parts, 1))

    def _aux_k_masked(self, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """`aux_k_loss` without a look at which latents are dead (F,)."""
        e = residual.detach()
        pre = self.all_pre_acts(x.detach(), self.b_enc - self._encoded(self.origin().detach()))
        among = pre.detach().masked_fill(~dead, -torch.inf)
        chosen = top_mask(among, min(self.k_aux, self.d_sae)) & dead
        acts = ops.masked(nn.functional.leaky_relu(pre, 0.1), chosen)
        parts = [
            ops.decode(acts[:, self.sources(k)], None, weight)
            for k, weight in enumerate(self.decoders)
        ]
        return ops.unexplained(e, torch.cat(parts, 1)) * dead.any()

    def all_pre_acts(self, x: Tensor, bias: Tensor) -> Tensor:
        """Pre-activations (B, F) of rows (B, D) with a bias (F,), differentiable."""
        parts = [
            x[:, self.site_of(k)] @ self.encoders[self.latents_of(k)].t()
            for k in range(self.n_sites)
        ]
        return torch.cat(parts, 1) + bias

    def some_pre_acts(self, x: Tensor, latents: Tensor) -> Tensor:
        """Pre-activations (B, n) of some latents (n,), differentiable."""
        return self._by_layer_pre_acts(self.shifted(x), latents)

    def _by_layer_pre_acts(self, shifted: Tensor, latents: Tensor) -> Tensor:
        """Pre-activations (B, n) of some latents (n,) for rows (B, D) about the origin."""
        layer = torch.div(latents, self.per_layer, rounding_mode="floor")
        parts = [shifted.new_zeros(len(shifted), 0)]
        for k in layer.unique().tolist():
            chosen = latents[layer == k]
            rows, bias = self.encoders[chosen], self.b_enc[chosen]
            parts.append(nn.functional.linear(shifted[:, self.site_of(k)], rows, bias))
        place = layer.argsort(stable=True).argsort()
        return torch.cat(parts, 1)[:, place]

    def before_update(self) -> None:
        """Remove the radial part of each latent's decoder gradient, over all layers together."""
        grads = [weight.grad for weight in self.decoders]
        if not self.unit_decoder or any(grad is None for grad in grads):
            return
        share = self._squared_lengths(grads) / self._squared_lengths().clamp_min_(1e-12)
        for k, (weight, grad) in enumerate(zip(self.decoders, grads, strict=True)):
            grad.addcmul_(share[self.sources(k), None], weight.data, value=-1)

    def after_update(self, fwd: Forward, step: Any) -> None:
        """Renormalise the decoders."""
        if self.unit_decoder:
            self._normalise()
        self.after_step(fwd, step)

    @torch.no_grad()
    def rescale(self, inputs: Units, outputs: Units) -> None:
        """Turn an SAE of scaled rows into one of the data's own rows, skip paths included."""
        into = inputs.scale.double().view(self.n_sites, -1)
        out_of = outputs.scale.double().view(self.n_sites, -1)
        blocks = self.encoders.double().view(self.n_sites, self.per_layer, -1)
        self.encoders.copy_((blocks * into[:, None]).flatten(0, 1))
        for weight, scale in zip(self.decoders, out_of, strict=True):
            weight.copy_(weight.double() / scale)
        if self.W_skip is not None:
            self.W_skip.copy_(self.W_skip.double() * into[:, None] / out_of[:, :, None])
        self._move_origin(inputs, outputs)

    def inference(self) -> Inference:
        """Not exportable: SAELens has no transcoders of several layers."""
        raise NotExportable("transcoders of every layer have no counterpart in SAELens' format")


class CrossLayerTranscoder(EveryLayer, BatchTopK):
    """Transcoders of every layer whose code is the largest pre-activations of a batch (BatchTopK).

    The selection is over all layers together, see `EveryLayer` and `BatchTopK`.
    """

    static_steps = True
