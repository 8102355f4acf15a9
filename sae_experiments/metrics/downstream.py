"""What the language model loses when the SAE's reconstruction takes the place of the activation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_experiments.activations import capture, patched
from sae_experiments.metrics.base import Bench, Measured, MetricInfo

INFO = [
    MetricInfo(
        name="ce_clean",
        title="CE clean",
        formula="cross-entropy of the language model on the held-out windows",
        unit="nat",
        better="none",
        shown=False,
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


@torch.no_grad()
def measure(bench: Bench, *, windows: int, batch: int) -> Measured:
    """Cross-entropy clean, spliced, with the activation's mean and with zero in its place, and the KL divergence of spliced from clean.

    Over the first ``windows`` held-out windows; the reconstruction is spliced in at every position, the first position of a window is left
    out of the averages (it has no context). Loss recovered is null where the ablation costs less than 0.01 bit.
    """
    lm, store = bench.lm, bench.held_out
    if lm is None or store is None:
        return Measured(dict.fromkeys(i.name for i in INFO), why_null=dict.fromkeys((i.name for i in INFO), "there is no language model"))
    model, site = lm.model, bench.write
    mean = store.rows(site, slice(0, min(store.n_rows, 1 << 16))).mean(0).to(bench.device)
    found = torch.empty(0)  # what the encoder reads, from the clean pass of the batch at hand

    def rebuild(x: Tensor) -> Tensor:
        source = x if bench.read == bench.write else found
        return bench.sae(source.reshape(-1, source.shape[-1])).reshape(x.shape)

    ablations: dict[str, Callable[[Tensor], Tensor]] = {"mean": lambda x: mean.expand_as(x), "zero": torch.zeros_like, "spliced": rebuild}
    total = dict.fromkeys(("clean", "kl", *ablations), 0.0)
    count = 0
    starts = store.starts[:windows]
    for begin in range(0, len(starts), batch):
        x, y = (t.to(bench.device) for t in lm.tokens(starts[begin : begin + batch]))
        with capture(model, [bench.read]) as seen:
            clean = _log_probs(model, x)
        found = seen[bench.read]
        targets = y[:, 1:].reshape(-1)
        total["clean"] += float(F.nll_loss(clean, targets, reduction="sum"))
        for name, fn in ablations.items():
            with patched(model, site, fn):
                changed = _log_probs(model, x)
            total[name] += float(F.nll_loss(changed, targets, reduction="sum"))
        total["kl"] += float(F.kl_div(changed, clean, log_target=True, reduction="sum"))  # the last pass is the spliced one
        count += len(targets)
    ce = {name: value / count for name, value in total.items()}
    why = {}
    recovered = {}
    for key, ablation in (("loss_recovered", "mean"), ("loss_recovered_zero", "zero")):
        span = ce[ablation] - ce["clean"]
        worthless = span < 0.01 * math.log(2)
        recovered[key] = None if worthless else (ce[ablation] - ce["spliced"]) / span
        if worthless:
            why[key] = f"{ablation} ablation costs only {span:.4g} nats"
    values = {"ce_clean": ce["clean"], "ce_spliced": ce["spliced"], "ce_delta_bits": (ce["spliced"] - ce["clean"]) / math.log(2), "kl": ce["kl"]}
    return Measured(values | recovered, why_null=why)


def _log_probs(model, x: Tensor) -> Tensor:
    """Log-probabilities of the next character at all positions but the first, (n, V) in float32."""
    logits = model(input_ids=x, use_cache=False).logits[:, 1:]
    return logits.reshape(-1, logits.shape[-1]).float().log_softmax(-1)
