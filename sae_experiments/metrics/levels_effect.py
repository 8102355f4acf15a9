"""What each level does for the language model: one level's reconstruction spliced in alone, and one level taken out of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_experiments.activations import capture, patched
from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import NO_TEXT, nulls
from sae_experiments.metrics.level_paths import levels_of, only
from sae_experiments.metrics.noise import noise_of
from sae_experiments.saes.base import SAE
from sae_experiments.saes.hierarchical import Hierarchical

SPLICES = {
    "splice_bottom": ("the bottom's reconstruction (gate 1) in place of the activation", True),
    "splice_top": ("the top's reconstruction (gate 0) in place of the activation", True),
}
#: What is shown takes away what a level says of this text and leaves the rest in a state that training has seen. A code of zeros
#: is none: gates that follow an empty top, say, pass a mixture that no row ever had, and what breaks then is no measure of need.
ABLATIONS = {
    "ablate_bottom_mean": ("the bottom's code is set to its mean", True),
    "ablate_top_mean": ("the top's code is set to its mean (gates follow)", True),
    "ablate_top_frozen": ("the top's code is set to zero, the gates kept as they were", True),
    "ablate_bottom": ("the bottom's code is set to zero, a state that training never saw (gates as they are)", False),
    "ablate_top": ("the top's code is set to zero, a state that training never saw (gates follow)", False),
}
INFO = [
    MetricInfo(
        name=f"{name}_{what}",
        title=f"{name.replace('_', ' ')}{'' if what == 'ce_delta_bits' else ' (KL)'}",
        formula=f"{'rise of the cross-entropy' if what == 'ce_delta_bits' else 'KL(p_clean || p_changed)'} when {words}"
        + ("; the SAE's error stays in" if name in ABLATIONS else ""),
        unit=unit,
        better="down" if name in SPLICES else "none",
        shown=shown and what == "ce_delta_bits",
    )
    for name, (words, shown) in (SPLICES | ABLATIONS).items()
    for what, unit in (("ce_delta_bits", "bit/char"), ("kl", "nat"))
]
CE, KL = "ce_delta_bits", "kl"


@torch.no_grad()
def measure(bench: Bench, *, windows: int, batch: int, mean_rows: int) -> Measured:
    """Over ``windows`` held-out windows evenly spaced, all positions but the first; both relative to the untouched model.

    Splices replace the activation; ablations add to it the change that removing a level makes in the reconstruction, so that they are not
    charged for the SAE's error. Means are over the first ``mean_rows`` held-out rows.
    """
    lm, store, sae = bench.lm, bench.held_out, bench.sae
    if lm is None or store is None:
        return nulls(INFO, NO_TEXT)
    if not hasattr(bench.write, "stream") or bench.read != bench.write:
        return nulls(INFO, "the SAE does not rebuild the one site it reads")
    if len(levels_of(sae)) < 2:
        return nulls(INFO, "the SAE has one level")
    sae.eval()
    mean = sum(r.acts.sum(0) for r in bench.chunks(mean_rows)) / min(mean_rows, bench.n_rows)
    changes = _changes(sae, mean)
    picked = store.starts[torch.linspace(0, len(store.starts) - 1, min(windows, len(store.starts))).round().long().unique().numpy()]
    sums: dict[str, list[Tensor]] = {f"{n}_{w}": [] for n in changes for w in (CE, KL)}
    for begin in range(0, len(picked), batch):
        x, y = (t.to(bench.device) for t in lm.tokens(picked[begin : begin + batch]))
        with capture(lm.model, [bench.read]) as seen:
            clean = _log_probs(lm.model, x)
        rows = seen[bench.read].flatten(0, 1).float()
        acts = sae.encode(rows)
        recon = sae.reconstruct(rows, acts)
        for name, change in changes.items():
            new = change(acts)
            new = (new if name in SPLICES else rows - (recon - new)).view(*x.shape, -1)
            with patched(lm.model, bench.write, lambda a, new=new: new.to(a.dtype)):
                log_p = _log_probs(lm.model, x)
            rise = (clean - log_p).gather(2, y[:, 1:, None]).squeeze(2) / math.log(2)
            sums[f"{name}_{CE}"].append(rise.double().mean(1).cpu())
            sums[f"{name}_{KL}"].append(F.kl_div(log_p, clean, log_target=True, reduction="none").sum(2).double().mean(1).cpu())
    values = {name: torch.cat(parts).numpy() for name, parts in sums.items()}
    found: dict[str, float | None] = {i.name: float(values[i.name].mean()) if i.name in values else None for i in INFO}
    n = len(picked)
    noise = {k: noise_of({"sum": v}, lambda s: s["sum"] / n, draws=200, seed=0) for k, v in values.items()} if n > 1 else {}
    why = {name: "the SAE has no gates" for name, value in found.items() if value is None}
    return Measured(found, why_null=why, noise=noise)


def _changes(sae: SAE, mean: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """What becomes of the reconstruction of dense codes, by name."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for level, members in levels_of(sae).items():
        index = torch.from_numpy(members).to(mean.device)
        found[f"splice_{level}"] = lambda acts, level=level: only(sae, acts, level)
        found[f"ablate_{level}"] = lambda acts, index=index: sae.decode(acts.index_fill(1, index, 0.0))
        found[f"ablate_{level}_mean"] = lambda acts, index=index: sae.decode(acts.index_copy(1, index, mean[index].expand(len(acts), -1)))
    if isinstance(sae, Hierarchical) and sae.levels == "both":
        found["ablate_top_frozen"] = lambda acts: _without_top(sae, acts)
    return found


def _without_top(sae: Hierarchical, acts: Tensor) -> Tensor:
    z1, z2 = sae.split(acts)
    return sae.bottom.decode(torch.lerp(sae.predict(torch.zeros_like(z2)) * sae.scale, z1, sae.gates(z2)))


def _log_probs(model: nn.Module, x: Tensor) -> Tensor:
    """Log-probabilities of the next character at all positions but the first, (B, T - 1, V) in float32."""
    return model(input_ids=x, use_cache=False).logits[:, 1:].float().log_softmax(-1)
