"""Removal of virtual weights, to find those that the loss depends on.

In the frozen replacement model (every MLP replaced by transcoders, attention weights and norm
denominators held at those of the clean run) a share of all virtual weights is removed: a target's
pre-activation loses `a_s rho_t <...>` (see `virtual`) of the source's activation in this run, so
that codes of later layers and logits respond. The smallest weights go first, by a ranking:

    expected   absolute weights corrected by co-activation, ties by `size`
    size       absolute plain weights
    random     none

The ranking is made from other windows than those on which the loss is measured.

Shape letters: L layers, P latents of one layer, T positions, S shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_experiments.metrics.base import next_log_probs
from sae_experiments.models.frozen import FrozenModel
from sae_experiments.saes.cross_layer import EveryLayer
from sae_experiments.studies.attribution.virtual import VirtualWeights

#: Shares of the weights that are removed.
SHARES = (0.0, 0.5, 0.7, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
#: Rise of the loss, in bit per token, up to which weights count as removable.
TOLERATED_BITS = 0.01
ORDERS = {
    "expected": "smallest corrected by co-activation first",
    "size": "smallest first",
    "random": "in random order",
}
NUMBERS = (*(f"virtual_removable_{order}" for order in ORDERS), "virtual_worth")
#: Weights that are ranked at most; each takes about 60 bytes.
MOST = 32_000_000
WINDOWS, BATCH = 16, 8


class Ranked(NamedTuple):
    """All virtual weights of transcoders, and their rank in each order."""

    weights: list[Tensor]
    """By target layer: inner products (sources, P) at a deviation of 1."""
    places: dict[str, list[Tensor]]
    """By order and target layer: ranks (sources, P), from 0 for the first to be removed."""
    n_weights: int
    """Number of weights."""

    def removed(self, order: str, share: float) -> list[Tensor]:
        """Weights (sources, P) of each layer that are among the first share of an order."""
        first = round(share * self.n_weights)
        pairs = zip(self.weights, self.places[order], strict=True)
        return [weight * (place < first) for weight, place in pairs]


def count_weights(sae: EveryLayer) -> int:
    """Number of virtual weights of transcoders."""
    return sae.per_layer**2 * sae.n_sites * (sae.n_sites - 1) // 2


def rank(virtual: VirtualWeights, seed: int) -> Ranked:
    """Rank all virtual weights in each of the three orders.

    Args:
        virtual: Virtual weights of transcoders.
        seed: Seed of the random order.
    """
    sae = virtual.sae
    weights, size, expected = [], [], []
    for layer in range(sae.n_sites):
        latents = torch.arange(sae.d_sae)[sae.latents_of(layer)]
        before = slice(0, layer * sae.per_layer)
        into = virtual.into(latents.to(sae.encoders.device))
        scale = virtual.mean_rstd[latents.numpy(), None]
        products = torch.from_numpy((into.plain / scale)[:, before].T.copy())
        weights.append(products.to(sae.encoders))
        size.append(np.abs(into.plain[:, before].T).ravel())
        expected.append(np.abs(into.expected[:, before].T).ravel())
    sizes, corrected = np.concatenate(size), np.concatenate(expected)
    orders = {
        "expected": np.lexsort((sizes, corrected)),
        "size": np.argsort(sizes, kind="stable"),
        "random": np.random.default_rng(seed).permutation(len(sizes)),
    }
    places = {name: _places(order, weights) for name, order in orders.items()}
    return Ranked(weights, places, len(sizes))


def _places(order: np.ndarray, like: list[Tensor]) -> list[Tensor]:
    """Place of every weight in an order, in the shapes of the layers' weights."""
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    ends = np.cumsum([weight.numel() for weight in like])[:-1]
    parts = zip(np.split(place, ends), like, strict=True)
    return [torch.from_numpy(part).view(w.shape).to(w.device) for part, w in parts]


def without(
    sae: EveryLayer, frozen: FrozenModel, removed: list[Tensor]
) -> Callable[[int, Tensor], Tensor]:
    """MLPs of all layers replaced, for a run held at the clean one, without some virtual weights.

    Args:
        sae: Transcoders of every layer.
        frozen: The language model at the text that will be run.
        removed: By target layer, inner products (sources, P) of the weights to remove; 0 keeps one.

    Returns:
        A function as `EveryLayer.replacement` returns it.
    """
    rows, length, _ = frozen.embedded.shape
    acts = sae.encoders.new_zeros(rows, length - frozen.n_begin, sae.d_sae)

    def mlp(layer: int, x: Tensor) -> Tensor:
        rstd = frozen.clean[layer].rstd_2[:, frozen.n_begin :]
        lost = rstd * (acts[..., : len(removed[layer])] @ removed[layer])
        pre = sae.pre_acts_from(layer, x) - lost
        acts[..., sae.latents_of(layer)] = pre * sae.is_active(layer, pre)
        return sae.decode_to(layer, acts) + sae.skip_to(layer, x)

    return mlp


@torch.no_grad()
def measure(
    virtual: VirtualWeights, tokens: Tensor, following: Tensor, seed: int
) -> dict[str, np.ndarray]:
    """Rise of the loss when the first shares of every order are removed.

    Args:
        virtual: Virtual weights of transcoders, from other text.
        tokens: Token ids (windows, T).
        following: The token after each, (windows, T).
        seed: Seed of the random order.

    Returns:
        `virtual_removed`, the shares (S,), and for each order `virtual_rise_ORDER`, the rise (S,)
        in bit per token. The first position of a window, which has no context, is left out.
    """
    sae, ranked = virtual.sae, rank(virtual, seed)
    losses = {order: np.zeros(len(SHARES)) for order in ORDERS}
    n = following[:, 1:].numel()
    parts = [
        (FrozenModel(virtual.model, x), y[:, 1:].reshape(-1))
        for x, y in zip(tokens.split(BATCH), following.split(BATCH), strict=True)
    ]
    for order, total in losses.items():
        for i, share in enumerate(SHARES):
            removed = ranked.removed(order, share)
            for frozen, targets in parts:
                run = frozen.held(without(sae, frozen, removed))
                log_p = next_log_probs(frozen.soft_capped(run.logits)[:, frozen.n_begin :])
                total[i] += float(F.nll_loss(log_p.flatten(0, 1), targets, reduction="sum"))
    rises = {f"virtual_rise_{o}": (loss - loss[0]) / n / math.log(2) for o, loss in losses.items()}
    return {"virtual_removed": np.array(SHARES), **rises}


def numbers(curves: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Metrics of removal curves.

    Args:
        curves: Result of `measure`.

    Returns:
        `virtual_removable_ORDER`: largest measured share up to which no rise of the loss is above
        0.01 bit. `virtual_worth`: rise in bit when all are removed.
    """
    shares = curves["virtual_removed"]
    measured: dict[str, float | None] = {}
    for order in ORDERS:
        costly = curves[f"virtual_rise_{order}"] > TOLERATED_BITS
        first = int(costly.argmax()) if costly.any() else len(shares)
        measured[f"virtual_removable_{order}"] = float(shares[max(first - 1, 0)])
    return measured | {"virtual_worth": float(curves["virtual_rise_size"][-1])}
