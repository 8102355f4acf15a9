"""The language model with every MLP replaced at once by transcoders of all layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.metric_info import info
from sae_experiments.metrics.base import EvalContext, Measured, logits_of, next_log_probs
from sae_experiments.metrics.codes import nulls
from sae_experiments.models.frozen import FrozenModel
from sae_experiments.models.hooks import Site, blocks_of, capture, patched
from sae_experiments.models.layouts import CausalLM
from sae_experiments.saes.cross_layer import EveryLayer
from sae_experiments.saes.types import RESOLUTION

_FROZEN = "attention weights and norm denominators held at those of the clean run"
INFO = [
    info("fvu_layers", "FVU per layer", "mean over the layers of each one's FVU", "down"),
    info("fvu_worst_layer", "worst FVU", "largest FVU of a layer", "down", shown=False),
    info(
        "replaced_ce_delta_bits",
        "delta CE, all MLPs",
        "(CE with every MLP replaced at once - CE) / ln 2; codes from the changed inputs",
        "down",
        unit="bit/char",
    ),
    info(
        "replaced_kl",
        "KL, all MLPs",
        "mean KL(p || p with every MLP replaced)",
        "down",
        unit="nat",
    ),
    info(
        "replaced_agreement",
        "same top token",
        "share of positions where the most probable token stays the same",
        "up",
        shown=False,
    ),
    info(
        "replaced_frozen_ce_delta_bits",
        "delta CE, frozen",
        f"replaced_ce_delta_bits with {_FROZEN}",
        "down",
        unit="bit/char",
    ),
    info(
        "replaced_frozen_kl",
        "KL, frozen",
        f"replaced_kl with {_FROZEN}",
        "down",
        unit="nat",
        shown=False,
    ),
    info(
        "replaced_with_errors_gap",
        "gap with errors",
        "largest change of a logit when errors of the clean run are added back (0 in exact "
        "arithmetic)",
        "down",
        shown=False,
    ),
]
OF_FROZEN = ("replaced_frozen_ce_delta_bits", "replaced_frozen_kl")


class _Sums(NamedTuple):
    """Sums over the positions of some windows."""

    clean: float
    live: float
    live_kl: float
    same: float
    frozen: float
    frozen_kl: float
    positions: int


@torch.no_grad()
def measure(ctx: EvalContext, *, windows: int, batch: int) -> Measured:
    """Loss of the language model with every MLP replaced at once, and the error of each layer.

    Each layer's codes are computed from the input that the replaced layers before it produce. The
    first position of each window, which has no context, is left out of the averages.

    Args:
        ctx: Evaluation context.
        windows: Number of held-out windows, from the first on.
        batch: Windows per forward pass.
    """
    sae, lm = ctx.sae, ctx.lm
    if lm is None or ctx.held_out is None:
        return nulls(INFO, "there is no language model")
    if not isinstance(sae, EveryLayer):
        return nulls(INFO, "the SAE does not replace the MLPs of all layers")
    fvu, l0 = _per_layer(ctx, sae, windows * ctx.held_out.length)
    starts = ctx.held_out.starts[:windows]
    sums, gap, reason = [], 0.0, ""
    for begin in range(0, len(starts), batch):
        x, y = (ids.to(ctx.device) for ids in lm.tokens(starts[begin : begin + batch]))
        try:
            frozen: FrozenModel | None = FrozenModel(lm.model, x)
        except UserError as error:
            frozen, reason = None, str(error)
        sums.append(_window_sums(lm.model, frozen, sae, x, y))
        if not begin:
            gap = with_errors_gap(lm.model, sae, x)
    total = _Sums(*(sum(part) for part in zip(*sums, strict=True)))
    n = total.positions
    scalars: dict[str, float | None] = {
        "fvu_layers": float(fvu.mean()),
        "fvu_worst_layer": float(fvu.max()),
        "replaced_ce_delta_bits": (total.live - total.clean) / n / math.log(2),
        "replaced_kl": total.live_kl / n,
        "replaced_agreement": total.same / n,
        "replaced_frozen_ce_delta_bits": (total.frozen - total.clean) / n / math.log(2),
        "replaced_frozen_kl": total.frozen_kl / n,
        "replaced_with_errors_gap": gap,
    }
    why_null: dict[str, str] = {}
    if reason:
        scalars |= dict.fromkeys(OF_FROZEN)
        why_null |= dict.fromkeys(OF_FROZEN, reason)
    arrays = {"layer_fvu": fvu, "layer_l0": l0}
    return Measured(scalars, why_null=why_null, arrays=arrays)


def _per_layer(ctx: EvalContext, sae: EveryLayer, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """FVU of each layer, and active latents per row that read it, (L,) each."""
    error = torch.zeros(sae.d_out, dtype=torch.float64)
    total, square = torch.zeros_like(error), torch.zeros_like(error)
    active = torch.zeros(sae.n_sites, dtype=torch.int64)
    n = 0
    for part in ctx.chunks(rows):
        error += (part.y - part.recon).double().square().sum(0).cpu()
        total += part.y.double().sum(0).cpu()
        square += part.y.double().square().sum(0).cpu()
        active += (part.acts != 0).view(len(part.y), sae.n_sites, -1).sum((0, 2)).cpu()
        n += len(part.y)

    def of_site(sums: Tensor) -> Tensor:
        return sums.view(sae.n_sites, -1).sum(1)

    tiny = torch.finfo(torch.float64).tiny
    least = (RESOLUTION**2 * of_site(square)).clamp_min(tiny)
    variance = of_site(square - total.square() / n).maximum(least)
    return (of_site(error) / variance).numpy(), (active / n).numpy()


def _window_sums(
    model: CausalLM, frozen: FrozenModel | None, sae: EveryLayer, x: Tensor, y: Tensor
) -> _Sums:
    """Losses and divergences of some windows."""
    targets = y[:, 1:].reshape(-1)
    clean = next_log_probs(logits_of(model, x)).flatten(0, 1)
    live = next_log_probs(replaced_logits(model, x, sae.replacement(x.shape))).flatten(0, 1)
    held = clean
    if frozen is not None:
        run = frozen.held(sae.replacement(x.shape))
        held = next_log_probs(frozen.soft_capped(run.logits)[:, frozen.n_begin :]).flatten(0, 1)

    def loss(log_p: Tensor) -> float:
        return float(F.nll_loss(log_p, targets, reduction="sum"))

    def kl(log_q: Tensor) -> float:
        return float(F.kl_div(log_q, clean, log_target=True, reduction="sum"))

    same = float((live.argmax(1) == clean.argmax(1)).sum())
    return _Sums(loss(clean), loss(live), kl(live), same, loss(held), kl(held), len(targets))


def replaced_logits(
    model: CausalLM, tokens: Tensor, mlp: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Logits (n, T, V) with the MLP of every block replaced.

    Args:
        model: A language model of any known layout.
        tokens: Token ids (n, T).
        mlp: Output (n, T, C) of an MLP, from the number of its block and its input (n, T, C).
    """
    inputs: dict[int, Tensor] = {}

    def keep(layer: int, x: Tensor) -> Tensor:
        inputs[layer] = x
        return x

    with ExitStack() as stack:
        for k in range(len(blocks_of(model))):
            stack.enter_context(patched(model, Site("mlp_in", k + 1), lambda x, k=k: keep(k, x)))
            stack.enter_context(
                patched(model, Site("mlp_out", k + 1), lambda _y, k=k: mlp(k, inputs[k]))
            )
        return model(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def with_errors_gap(model: CausalLM, sae: EveryLayer, tokens: Tensor) -> float:
    """Largest change of a logit with every MLP replaced and the errors of the clean run added.

    Active latents are those of the clean run: rounding could turn one at the threshold on or off.
    """
    layers = range(sae.n_sites)
    reads, writes = ([Site(s, k + 1) for k in layers] for s in ("mlp_in", "mlp_out"))
    with capture(model, [*reads, *writes]) as seen:
        clean = model(input_ids=tokens, use_cache=False).logits
    acts = sae.encode(torch.cat([seen[site] for site in reads], -1))
    mlp = sae.replacement(tokens.shape, acts != 0)
    errors = []
    for k in layers:
        recon = sae.decode_to(k, acts) + sae.skip_to(k, seen[reads[k]])
        errors.append(seen[writes[k]] - recon)
    again = replaced_logits(model, tokens, lambda k, x: mlp(k, x) + errors[k])
    return float((again - clean).abs().max())
