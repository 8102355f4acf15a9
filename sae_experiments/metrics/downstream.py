"""Loss of the language model when the SAE's reconstruction replaces the activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_experiments.conditions import OF_MODEL_ON_ROWS
from sae_experiments.metrics.base import (
    EvalContext,
    LMSplice,
    Measured,
    MetricInfo,
    logits_of,
    next_log_probs,
)
from sae_experiments.metrics.codes import nulls
from sae_experiments.metrics.noise import noise_of
from sae_experiments.models.hooks import Site, capture, prefix_of, spliced
from sae_experiments.quality_warnings import of_splice

INFO = [
    MetricInfo(
        name="ce_clean",
        title="CE clean",
        formula="cross-entropy of the language model on the held-out windows",
        unit="nat",
        better="none",
        shown=False,
        depends=OF_MODEL_ON_ROWS,
    ),
    MetricInfo(
        name="ce_spliced",
        title="CE spliced",
        formula="the same with the reconstruction in place of the activation",
        unit="nat",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="ce_delta_bits",
        title="delta CE",
        formula="(ce_spliced - ce_clean) / ln 2",
        unit="bit/char",
        better="down",
    ),
    MetricInfo(
        name="loss_recovered",
        title="loss recovered",
        formula="(CE_mean - CE_spliced) / (CE_mean - CE_clean), mean ablation",
        better="up",
    ),
    MetricInfo(
        name="loss_recovered_zero",
        title="loss recovered (zero)",
        formula="the same with zero ablation",
        better="up",
        shown=False,
    ),
    MetricInfo(
        name="kl",
        title="KL",
        formula="mean KL(p_clean || p_spliced)",
        unit="nat",
        better="down",
        shown=False,
    ),
]

#: Held-out rows over which mean ablation takes its mean.
MEAN_ROWS = 1 << 16

#: Least cost of an ablation, in nats, of which a share recovered is defined: 0.01 bit.
MIN_COST = 0.01 * math.log(2)

#: Metrics as functions of the mean loss in nats of the clean, splice, mean-ablated and
#: zero-ablated model, and of the mean KL divergence.
FORMULAS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "ce_clean": lambda s: s["clean"],
    "ce_spliced": lambda s: s["spliced"],
    "ce_delta_bits": lambda s: (s["spliced"] - s["clean"]) / math.log(2),
    "kl": lambda s: s["kl"],
    "loss_recovered": lambda s: _recovered(s, "mean"),
    "loss_recovered_zero": lambda s: _recovered(s, "zero"),
}


def _recovered(losses: Mapping[str, Any], ablation: str) -> Any:
    """Share of the loss of an ablation that the splice recovers; NaN if it costs below `MIN_COST`.

    A bootstrap sample may hold only windows on which the ablation costs nothing, or less.
    """
    cost = np.asarray(losses[ablation] - losses["clean"])
    recovered = np.asarray(losses[ablation] - losses["spliced"])
    share = np.divide(recovered, cost, out=np.full(cost.shape, np.nan), where=cost >= MIN_COST)
    return share if share.ndim else float(share)


def rows_read(settings: dict[str, Any], length: int) -> int:
    """Number of held-out rows that the values depend on.

    These are the rows of the windows or those of the mean activation, whichever are more.

    Args:
        settings: Options of `measure`.
        length: Rows per window.
    """
    return max(settings["windows"] * length, MEAN_ROWS)


@torch.no_grad()
def measure(ctx: EvalContext, *, windows: int, batch: int) -> Measured:
    """Cross-entropy with the reconstruction spliced in, and the KL divergence from the clean model.

    The reconstruction replaces the activation at every position, and at every site for an SAE over
    several; mean and zero ablation are the references. Outlier rows that the fit left out (see
    `saes.outliers`) stay as they are in all three. The first position of each window is left
    out of the averages, as it has no context. Loss recovered is null if the ablation costs less
    than 0.01 bit.

    Args:
        ctx: Evaluation context.
        windows: Number of held-out windows, from the first on.
        batch: Windows per forward pass.
    """
    lm = ctx.lm
    store = ctx.held_out
    if lm is None or store is None:
        return nulls(INFO, "there is no language model")
    length = store.length
    batch = ctx.windows_per_pass(batch)
    starts = store.starts[:windows]
    part = slice(0, min(store.n_rows, MEAN_ROWS))
    means = {s: store.rows(s, part).mean(0).to(ctx.device) for s in ctx.write_sites}
    batches = [
        _window_sums(ctx, lm, means, starts[begin : begin + batch])
        for begin in range(0, len(starts), batch)
    ]
    untouched = float(sum(sums.pop("untouched").sum() for sums in batches))
    window_means = {
        name: torch.cat([sums[name] for sums in batches]).numpy() / (length - 1)
        for name in batches[0]
    }
    result = _summary({name: float(values.mean()) for name, values in window_means.items()})
    warnings = of_splice(round(untouched), len(starts) * length)
    return result._replace(noise=_noise(window_means, result.scalars), warnings=warnings)


def _window_sums(
    ctx: EvalContext, lm: LMSplice, means: dict[Site, Tensor], starts: np.ndarray
) -> dict[str, Tensor]:
    """Sum over positions of each loss and of the KL divergence, (windows,) float64.

    Also, as `untouched`, the number of rows that stay as they are, (1,).

    Args:
        ctx: Evaluation context.
        lm: Its language model.
        means: Mean activation (D,) at each site that the SAE reconstructs.
        starts: Starts of the windows.
    """
    model = lm.model
    reads = ctx.read_sites
    x, y = (ids.to(ctx.device) for ids in lm.tokens(starts))
    with capture(model, reads) as seen, prefix_of(model, list(means)) as prefixes:
        clean = _log_probs(model, x)
    inputs = torch.cat([seen[site].flatten(0, 1) for site in reads], 1)
    recon = ctx.sae(inputs).view(*x.shape, -1)
    widths = [len(mean) for mean in means.values()]
    by_site = dict(zip(means, recon.split(widths, -1), strict=True))
    averages = {site: mean.expand(*x.shape, -1) for site, mean in means.items()}
    zeros = {site: torch.zeros_like(part) for site, part in by_site.items()}
    replaced = ctx.replaced(inputs)
    log_probs = {"clean": clean}
    alike = replaced is None and _hides_text(list(means))
    for name, new in (("mean", averages), ("zero", zeros), ("spliced", by_site)):
        # Of equal windows one is enough.
        n = 1 if alike and name != "spliced" else len(x)
        part = {site: value[:n] for site, value in new.items()}
        with spliced(model, part, replaced, prefixes[-1].part(slice(0, n))):
            log_probs[name] = _log_probs(model, x[:n]).repeat(len(x) // n, 1)
    splice = log_probs["spliced"]
    targets = y[:, 1:].reshape(-1)
    losses = {
        name: F.nll_loss(log_p, targets, reduction="none") for name, log_p in log_probs.items()
    }
    losses["kl"] = F.kl_div(splice, clean, log_target=True, reduction="none").sum(1)
    sums = {name: loss.view(len(x), -1).double().sum(1).cpu() for name, loss in losses.items()}
    untouched = 0 if replaced is None else int((~replaced).sum())
    return sums | {"untouched": torch.tensor([untouched])}


def _hides_text(sites: Sequence[Site]) -> bool:
    """True if nothing of the text reaches the blocks after the last of some replaced sites."""
    last = max(site.layer for site in sites)
    return any(site.stream == "resid" and site.layer == last for site in sites)


def _noise(
    window_means: dict[str, np.ndarray], scalars: dict[str, float | None]
) -> dict[str, float]:
    """Standard errors over resampled windows.

    Differences are taken within a window, so most of the noise of the two losses cancels.
    """
    n = len(window_means["clean"])
    if n < 2:
        return {}
    noise = {}
    for name, formula in FORMULAS.items():
        value = scalars[name]
        if value is None or not math.isfinite(value):
            continue
        error = noise_of(
            window_means,
            lambda totals, formula=formula: formula({k: v / n for k, v in totals.items()}),
        )
        if math.isfinite(error):
            noise[name] = error
    return noise


def _summary(losses: dict[str, float]) -> Measured:
    """Metrics from mean losses in nats; loss recovered is null where the ablation costs nothing."""
    values: dict[str, float | None] = {}
    why_null = {}
    ablation_of = {"loss_recovered": "mean", "loss_recovered_zero": "zero"}
    for name, formula in FORMULAS.items():
        ablation = ablation_of.get(name)
        span = math.inf if ablation is None else losses[ablation] - losses["clean"]
        if span >= MIN_COST:
            values[name] = formula(losses)
        else:
            values[name] = None
            why_null[name] = f"{ablation} ablation costs only {span:.4g} nats"
    return Measured(values, why_null=why_null)


def _log_probs(model: nn.Module, x: Tensor) -> Tensor:
    """Log-probabilities (n, V), float32, of the next character at all positions but the first."""
    return next_log_probs(logits_of(model, x)).flatten(0, 1)
