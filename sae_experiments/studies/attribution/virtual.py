"""Virtual weights: the effect of a latent's write on a later latent, independent of the prompt.

The weight from source s to target t is the residual path alone,

    V_st = mean(rho_t) <sum_{l_s <= k < l_t} W_dec[s -> k], u_t>

with `u_t` the encoder row pulled back through the second norm's weight and centring, and `rho_t`
that norm's inverse deviation. Latents that never fire together can have a large weight
(interference). The expected weight corrects for it (TWERA in Ameisen et al. 2025, with the norm):

    E[a_t a_s rho_t] / E[a_t] <...>

which is the mean of the attribution along the residual path, weighted by the target's activation.
What goes through attention or skip paths is in neither, and inhibition, where the target is 0, is
not in the latter.

Shape letters: N rows of text, F latents of all layers, D chosen latents, L layers, C width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse, stats
from torch import Tensor

from sae_experiments.files import rounded
from sae_experiments.models.frozen import FrozenModel
from sae_experiments.models.layouts import CausalLM
from sae_experiments.saes.cross_layer import EveryLayer

#: Names of the numbers of `interference`.
NUMBERS = ("virtual_never_share", "virtual_rank_r")
#: Share of the largest weights among which those that never act are counted.
STRONGEST = 0.01


class VirtualWeightRows(NamedTuple):
    """Weights between chosen latents (rows) and all latents (columns), (D, F) each."""

    plain: np.ndarray
    """Weights V."""
    expected: np.ndarray
    """Corrected for co-activation of the two latents."""
    together: np.ndarray
    """Rows of text on which both fire."""


class VirtualWeights:
    """Virtual weights of transcoders of every layer, with activations of some text.

    Args:
        model: A causal language model of a known layout.
        sae: Transcoders of all its layers.
        tokens: Token ids of the text, (windows, T).
        batch: Windows per forward pass.
    """

    @torch.no_grad()
    def __init__(
        self, model: CausalLM, sae: EveryLayer, tokens: Tensor, *, batch: int = 16
    ) -> None:
        self.model, self.sae = model, sae
        acts, rstd = [], []
        read: list[Tensor] = []
        for some in tokens.split(batch):
            frozen = FrozenModel(model, some)
            first = frozen.n_begin
            inputs = [clean.mlp_in[:, first:].flatten(0, 1) for clean in frozen.clean]
            x = torch.cat(inputs, 1)
            acts.append(sparse.csr_matrix(sae.encode(x).double().cpu().numpy()))
            scales = [clean.rstd_2[:, first:].flatten()[:, None] for clean in frozen.clean]
            rstd.append(torch.cat(scales, 1))
            read = read or _read_rows(frozen, sae)
        #: Activations (N, F).
        self.acts = sparse.csr_matrix(sparse.vstack(acts, "csr"))
        self.rstd = torch.cat(rstd).double().cpu().numpy()
        layer = np.arange(sae.d_sae) // sae.per_layer
        #: Activations times the inverse deviation of the layer that each latent reads, (N, F).
        self.scaled = sparse.csr_matrix(self.acts.multiply(self.rstd[:, layer]))
        self.mean_rstd = self.rstd.mean(0)[layer]
        self.mean_act = np.asarray(self.acts.mean(0)).ravel()
        self._read = read

    @torch.no_grad()
    def into(self, latents: Tensor) -> VirtualWeightRows:
        """Weights from all latents into chosen ones (D,)."""
        sae = self.sae
        dots = self._read[0].new_zeros(len(latents), sae.d_sae)
        for row, latent in zip(dots, latents.tolist(), strict=True):
            layer, within = divmod(latent, sae.per_layer)
            for k in range(layer):
                row[sae.sources(k)] += sae.decoders[k] @ self._read[layer][within]
        chosen = latents.cpu().numpy()
        moment = (self.scaled[:, chosen].T @ self.acts).toarray() / len(self.rstd)
        scale, act = self.mean_rstd[chosen, None], self.mean_act[chosen, None]
        return self._weights(chosen, dots, scale, moment, act)

    @torch.no_grad()
    def out_of(self, latents: Tensor) -> VirtualWeightRows:
        """Weights from chosen latents (D,) into all."""
        sae = self.sae
        dots = self._read[0].new_zeros(len(latents), sae.d_sae)
        written = self._read[0].new_zeros(len(latents), sae.width)
        for layer in range(1, sae.n_sites):
            written = written + self._written(latents, layer - 1)
            dots[:, sae.latents_of(layer)] = written @ self._read[layer].t()
        chosen = latents.cpu().numpy()
        moment = (self.acts[:, chosen].T @ self.scaled).toarray() / len(self.rstd)
        return self._weights(chosen, dots, self.mean_rstd, moment, self.mean_act)

    def _written(self, latents: Tensor, k: int) -> Tensor:
        """Decoder rows (D, C) of latents to layer k, 0 where they do not write to it."""
        sources = self.sae.sources(k)
        rows = self._read[0].new_zeros(len(latents), self.sae.width)
        inside = (latents >= sources.start) & (latents < sources.stop)
        rows[inside] = self.sae.decoders[k][latents[inside] - sources.start]
        return rows

    def _weights(
        self,
        chosen: np.ndarray,
        dots: Tensor,
        scale: np.ndarray,
        moment: np.ndarray,
        target_act: np.ndarray,
    ) -> VirtualWeightRows:
        """Both weights from inner products, mean scales, moments and the targets' mean."""
        products = dots.double().cpu().numpy()
        fires = sparse.csr_matrix(self.acts.astype(bool).astype(np.float64))
        together = (fires[:, chosen].T @ fires).toarray()
        mean = np.divide(moment, target_act, out=np.zeros_like(moment), where=target_act > 0)
        return VirtualWeightRows(products * scale, products * mean, together)


def _read_rows(frozen: FrozenModel, sae: EveryLayer) -> list[Tensor]:
    """Encoder rows of every layer pulled back through its norm, at a deviation of 1."""
    one = torch.ones((), dtype=sae.encoders.dtype, device=sae.encoders.device)
    return [
        block.norm_2.pull_back(one, sae.encoders[sae.latents_of(k)])
        for k, block in enumerate(frozen.blocks)
    ]


def strongest(weights: VirtualWeightRows, n: int) -> list[list[list[Any]]]:
    """The largest expected weights of each chosen latent: `[latent, expected, plain]`."""
    order = np.argsort(-np.abs(weights.expected), axis=1, kind="stable")[:, :n]
    listed = []
    for row, columns in enumerate(order.tolist()):
        pairs = [(i, weights.expected[row, i], weights.plain[row, i]) for i in columns]
        listed.append([[i, rounded(e, 3), rounded(v, 3)] for i, e, v in pairs if e])
    return listed


def interference(weights: VirtualWeightRows) -> dict[str, float | None]:
    """Distance of plain weights from those that act.

    Args:
        weights: Weights into or out of chosen latents.

    Returns:
        `virtual_never_share`: share of the largest 1 % of absolute plain weights between latents
        that never fire together. `virtual_rank_r`: Spearman correlation of absolute plain and
        expected weights, of the pairs that do.
    """
    size = np.abs(weights.plain)
    possible = size > 0
    if not possible.any():
        return dict.fromkeys(NUMBERS)
    large = size >= np.quantile(size[possible], 1 - STRONGEST)
    pairs = possible & (weights.together > 0)
    rank = None
    if pairs.sum() > 2:
        rho: Any = stats.spearmanr(size[pairs], np.abs(weights.expected[pairs]))
        rank = float(rho.statistic)
    never = float((weights.together[large & possible] == 0).mean())
    return dict(zip(NUMBERS, (never, rank), strict=True))
