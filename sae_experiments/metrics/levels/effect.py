"""Effect of each level on the language model: spliced in alone, or removed from the code."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_experiments.metrics.base import (
    EvalContext,
    Measured,
    MetricInfo,
    logits_of,
    next_log_probs,
)
from sae_experiments.metrics.codes import NO_TEXT, nulls
from sae_experiments.metrics.levels.paths import ONE_LEVEL, levels_of, only
from sae_experiments.metrics.noise import DRAWS, noise_of
from sae_experiments.models.hooks import Site, capture, prefix_of, spliced
from sae_experiments.saes.base import SAE
from sae_experiments.saes.hierarchical.sae import Hierarchical
from sae_experiments.sampling import evenly_spaced

CE = "ce_delta_bits"
KL = "kl"
#: Splices: name -> (replacement, shown).
SPLICES = {
    "splice_bottom": ("the bottom's reconstruction (gate 1) in place of the activation", True),
    "splice_top": ("the top's reconstruction (gate 0) in place of the activation", True),
}
#: Ablations: name -> (change of the code, shown). The shown ones remove the information of a level
#: about the text and leave the rest in a state that occurs in training. A code of zeros does not:
#: gates that follow an empty top, for instance, pass a mixture that no row had in training, and the
#: damage of that does not measure the need for the level.
ABLATIONS = {
    "ablate_bottom_mean": ("the bottom's code is set to its mean", True),
    "ablate_top_mean": ("the top's code is set to its mean (gates follow)", True),
    "ablate_top_frozen": ("the top's code is set to zero, the gates kept as they were", True),
    "ablate_bottom": (
        "the bottom's code is set to zero, a state that training never saw (gates as they are)",
        False,
    ),
    "ablate_top": (
        "the top's code is set to zero, a state that training never saw (gates follow)",
        False,
    ),
}


def _info(name: str, measure: str, words: str, shown: bool) -> MetricInfo:
    title = name.replace("_", " ")
    formula = f"rise of the cross-entropy when {words}"
    unit = "bit/char"
    if measure == KL:
        title += " (KL)"
        formula = f"KL(p_clean || p_changed) when {words}"
        unit = "nat"
    if name in ABLATIONS:
        formula += "; the SAE's error stays in"
    return MetricInfo(
        name=f"{name}_{measure}",
        title=title,
        formula=formula,
        unit=unit,
        better="down" if name in SPLICES else "none",
        shown=shown and measure == CE,
    )


INFO = [
    _info(name, measure, words, shown)
    for name, (words, shown) in (SPLICES | ABLATIONS).items()
    for measure in (CE, KL)
]

#: Maps dense codes (B, F) to a reconstruction (B, O).
Reconstruct = Callable[[Tensor], Tensor]


@torch.no_grad()
def measure(ctx: EvalContext, *, windows: int, batch: int, mean_rows: int) -> Measured:
    """Change of the model's predictions when levels replace the activation or are removed.

    Cross-entropy and KL are relative to the untouched model, over all positions of a window but the
    first. A splice replaces the activation by one level's reconstruction. An ablation adds to the
    activation the change that removing a level makes in the reconstruction, so that it is not
    charged for the SAE's error. Outlier rows that the fit left out stay as they are.

    Args:
        ctx: The SAE, the language model and the held-out text.
        windows: Held-out windows used, evenly spaced.
        batch: Windows per forward pass.
        mean_rows: Held-out rows, from the first, over which mean codes are taken.
    """
    lm, store, sae, site = ctx.lm, ctx.held_out, ctx.sae, ctx.write
    if lm is None or store is None:
        return nulls(INFO, NO_TEXT)
    if not isinstance(site, Site) or ctx.read != site:
        return nulls(INFO, "the SAE does not rebuild the one site it reads")
    if len(levels_of(sae)) < 2:
        return nulls(INFO, ONE_LEVEL)
    sae.eval()
    changes = _changes(sae, _mean_code(ctx, mean_rows))
    starts = evenly_spaced(store.starts, windows)
    by_batch: list[dict[str, Tensor]] = []
    batch = ctx.windows_per_pass(batch)
    for begin in range(0, len(starts), batch):
        x, y = (t.to(ctx.device) for t in lm.tokens(starts[begin : begin + batch]))
        by_batch.append(_effects(ctx, lm.model, site, changes, x, y))
    by_window = {}
    for name in by_batch[0]:
        by_window[name] = torch.cat([effects[name] for effects in by_batch]).numpy()
    return _summary(by_window)


def _effects(
    ctx: EvalContext,
    model: nn.Module,
    site: Site,
    changes: Mapping[str, Reconstruct],
    x: Tensor,
    y: Tensor,
) -> dict[str, Tensor]:
    """Mean effect of each change within each window.

    Args:
        ctx: Evaluation context.
        model: The language model.
        site: Site that the SAE reads and rebuilds.
        changes: Changed reconstructions by name.
        x: Token ids, (B, T).
        y: Next ids, (B, T).

    Returns:
        Effects (B,) by metric name.
    """
    with capture(model, [site]) as seen, prefix_of(model, [site]) as prefixes:
        clean = next_log_probs(logits_of(model, x))
    sae = ctx.sae
    rows = seen[site].flatten(0, 1).float()
    replaced = ctx.replaced(rows)
    acts = sae.encode(rows)
    recon = sae.reconstruct(rows, acts)
    effects = {}
    for name, change in changes.items():
        changed = change(acts)
        if name not in SPLICES:
            changed = rows - (recon - changed)
        changed = changed.view(*x.shape, -1)
        with spliced(model, {site: changed}, replaced, prefixes[-1]):
            log_p = next_log_probs(logits_of(model, x))
        rise = (clean - log_p).gather(2, y[:, 1:, None]).squeeze(2) / math.log(2)
        kl = F.kl_div(log_p, clean, log_target=True, reduction="none").sum(2)
        effects[f"{name}_{CE}"] = rise.double().mean(1).cpu()
        effects[f"{name}_{KL}"] = kl.double().mean(1).cpu()
    return effects


def _mean_code(ctx: EvalContext, rows: int) -> Tensor:
    """Mean code (F,) over the first `rows` held-out rows."""
    total = sum(r.acts.sum(0) for r in ctx.chunks(rows))
    return torch.as_tensor(total / min(rows, ctx.n_rows))


def _summary(by_window: dict[str, np.ndarray]) -> Measured:
    """Means and standard errors of values per window (n,), by metric name."""
    values: dict[str, float | None] = {}
    noise: dict[str, float] = {}
    why_null: dict[str, str] = {}
    for info in INFO:
        if info.name in by_window:
            values[info.name] = float(by_window[info.name].mean())
        else:
            values[info.name] = None
            why_null[info.name] = "the SAE has no gates"
    for name, windows in by_window.items():
        n = len(windows)
        if n > 1:
            noise[name] = noise_of(
                {"sum": windows}, lambda s, n=n: s["sum"] / n, draws=DRAWS, seed=0
            )
    return Measured(values, why_null=why_null, noise=noise)


def _changes(sae: SAE, mean: Tensor) -> dict[str, Reconstruct]:
    """Functions that reconstruct a code under each splice or ablation, by its name.

    Args:
        sae: The SAE.
        mean: Mean code, (F,).
    """
    changes: dict[str, Reconstruct] = {}
    for level, members in levels_of(sae).items():
        index = torch.from_numpy(members).to(mean.device)
        changes[f"splice_{level}"] = lambda acts, level=level: only(sae, acts, level)
        changes[f"ablate_{level}"] = _with_constant(sae, index, torch.zeros_like(mean[index]))
        changes[f"ablate_{level}_mean"] = _with_constant(sae, index, mean[index])
    if isinstance(sae, Hierarchical) and sae.levels == "both":
        changes["ablate_top_frozen"] = lambda acts: _without_top(sae, acts)
    return changes


def _with_constant(sae: SAE, index: Tensor, values: Tensor) -> Reconstruct:
    """Reconstruct codes whose latents `index` (n,) are set to `values` (n,)."""

    def reconstruct(acts: Tensor) -> Tensor:
        return sae.decode(acts.index_copy(1, index, values.expand(len(acts), -1)))

    return reconstruct


def _without_top(sae: Hierarchical, acts: Tensor) -> Tensor:
    """Reconstruct codes without the top's code, under the gates of the full code."""
    z1, z2 = sae.split(acts)
    predicted = sae.predict(torch.zeros_like(z2)) * sae.scale
    return sae.bottom.decode(torch.lerp(predicted, z1, sae.gates(z2)))
