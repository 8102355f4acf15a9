"""What the language model loses when the SAE's reconstruction takes the place of the activation."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_experiments.conditions import OF_MODEL_ON_ROWS
from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.noise import noise_of
from sae_experiments.models.hooks import Site, as_sites, capture, patched

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
    MetricInfo(name="ce_delta_bits", title="delta CE", formula="(ce_spliced - ce_clean) / ln 2", unit="bit/char", better="down"),
    MetricInfo(
        name="loss_recovered", title="loss recovered", formula="(CE_mean - CE_spliced) / (CE_mean - CE_clean), mean ablation", unit="", better="up"
    ),
    MetricInfo(name="loss_recovered_zero", title="loss recovered (zero)", formula="the same with zero ablation", unit="", better="up", shown=False),
    MetricInfo(name="kl", title="KL", formula="mean KL(p_clean || p_spliced)", unit="nat", better="down", shown=False),
]


MEAN_ROWS = 1 << 16  # held-out rows that mean ablation takes its mean over


def rows_read(settings: dict[str, Any], length: int) -> int:
    """Held-out rows that decide the values: the first windows, and those of the mean."""
    return max(settings["windows"] * length, MEAN_ROWS)


@torch.no_grad()
def measure(bench: Bench, *, windows: int, batch: int) -> Measured:
    """Cross-entropy clean, spliced, with the activation's mean and with zero in its place, and the KL divergence of spliced from clean.

    Over the first ``windows`` held-out windows; the reconstruction is spliced in at every position (of every site, for an SAE over several),
    the first position of a window is left out of the averages (it has no context). Loss recovered is null where the ablation costs less
    than 0.01 bit.
    """
    lm, store = bench.lm, bench.held_out
    if lm is None or store is None:
        return Measured(dict.fromkeys(i.name for i in INFO), why_null=dict.fromkeys((i.name for i in INFO), "there is no language model"))
    model, reads, writes = lm.model, as_sites(bench.read), as_sites(bench.write)
    mean = {s: store.rows(s, slice(0, min(store.n_rows, MEAN_ROWS))).mean(0).to(bench.device) for s in writes}
    sums: dict[str, list[Tensor]] = {name: [] for name in ("clean", "mean", "zero", "spliced", "kl")}  # a sum a window
    starts = store.starts[:windows]
    for begin in range(0, len(starts), batch):
        x, y = (t.to(bench.device) for t in lm.tokens(starts[begin : begin + batch]))
        targets = y[:, 1:].reshape(-1)
        with capture(model, reads) as seen:
            clean = _log_probs(model, x)
        recon = bench.sae(torch.cat([seen[s].flatten(0, 1) for s in reads], 1)).view(*x.shape, -1)
        rebuilt = dict(zip(writes, recon.split([len(mean[s]) for s in writes], -1), strict=True))
        spliced = _changed(model, x, rebuilt)
        for name, log_p in (
            ("clean", clean),
            ("mean", _changed(model, x, {s: m.expand(*x.shape, -1) for s, m in mean.items()})),
            ("zero", _changed(model, x, {s: torch.zeros_like(r) for s, r in rebuilt.items()})),
            ("spliced", spliced),
        ):
            sums[name].append(F.nll_loss(log_p, targets, reduction="none").view(len(x), -1).double().sum(1).cpu())
        divergence = F.kl_div(spliced, clean, log_target=True, reduction="none").sum(1)
        sums["kl"].append(divergence.view(len(x), -1).double().sum(1).cpu())
    windows_of = {name: torch.cat(parts).numpy() / (store.length - 1) for name, parts in sums.items()}
    found = _summary({name: float(means.mean()) for name, means in windows_of.items()})
    return found._replace(noise=_noise(windows_of, found))


def _noise(means: dict[str, np.ndarray], found: Measured) -> dict[str, float]:
    """Standard errors over resampled windows, from the mean of each: differences are taken within a window, so most of its noise cancels."""
    formulas = {
        "ce_clean": lambda s: s["clean"],
        "ce_spliced": lambda s: s["spliced"],
        "ce_delta_bits": lambda s: (s["spliced"] - s["clean"]) / math.log(2),
        "kl": lambda s: s["kl"],
        "loss_recovered": lambda s: (s["mean"] - s["spliced"]) / (s["mean"] - s["clean"]),
        "loss_recovered_zero": lambda s: (s["zero"] - s["spliced"]) / (s["zero"] - s["clean"]),
    }
    known = {n: f for n, f in formulas.items() if found.scalars[n] is not None and math.isfinite(found.scalars[n])}
    n = len(means["clean"])
    if n < 2:
        return {}
    return {name: noise_of(means, lambda s, f=f: f({k: v / n for k, v in s.items()}), draws=200, seed=0) for name, f in known.items()}


def _summary(ce: dict[str, float]) -> Measured:
    why, recovered = {}, {}
    for key, ablation in (("loss_recovered", "mean"), ("loss_recovered_zero", "zero")):
        span = ce[ablation] - ce["clean"]
        recovered[key] = (ce[ablation] - ce["spliced"]) / span if span >= 0.01 * math.log(2) else None
        if recovered[key] is None:
            why[key] = f"{ablation} ablation costs only {span:.4g} nats"
    values = {"ce_clean": ce["clean"], "ce_spliced": ce["spliced"], "ce_delta_bits": (ce["spliced"] - ce["clean"]) / math.log(2), "kl": ce["kl"]}
    return Measured(values | recovered, why_null=why)


def _changed(model: nn.Module, x: Tensor, by_site: dict[Site, Tensor]) -> Tensor:
    """Log-probabilities with the activations at some sites replaced, (n, V)."""
    with ExitStack() as stack:
        for site, value in by_site.items():
            stack.enter_context(patched(model, site, lambda _old, value=value: value))
        return _log_probs(model, x)


def _log_probs(model: nn.Module, x: Tensor) -> Tensor:
    """Log-probabilities of the next character at all positions but the first, (n, V) in float32."""
    logits = model(input_ids=x, use_cache=False).logits[:, 1:]
    return logits.reshape(-1, logits.shape[-1]).float().log_softmax(-1)
