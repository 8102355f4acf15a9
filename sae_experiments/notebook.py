"""SAEs on a plain tensor of activations, from any model: no Hydra configuration to write, no run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_experiments import fit
from sae_experiments.config import build, compose_checked
from sae_experiments.fit import FitReport, Sample
from sae_experiments.io import UserError
from sae_experiments.metrics import reconstruction, sparsity
from sae_experiments.metrics.base import Bench
from sae_experiments.saes.base import SAE, Batch
from sae_experiments.studies.arms import Arm
from sae_experiments.training import TrainConfig, seed_of

CONF = Path(__file__).resolve().parent.parent / "conf"


def build_sae(name: str, d_in: int, *, seed: int = 0, **settings: Any) -> SAE:
    """An untrained SAE of the family, with the defaults of ``conf/sae/<name>.yaml``.

    ``settings`` are its options without the leading ``sae.``: ``build_sae("jumprelu", 512, target_l0=20, d_sae=4096)``; options of the
    model itself with two underscores, ``model__bandwidth=0.05``.
    """
    arm, _ = _arm(name, settings)
    sae = arm.seeded(d_in, d_in, seed)
    if sae.blocks != 1 or sae.needs_model:
        raise UserError(f"{name} needs more than one tensor of activations: use it in study=language")
    return sae


def fit_saes(
    saes: SAE | Mapping[str, SAE], activations: Tensor, *, seed: int = 0, held_out: Tensor | None = None, **train: Any
) -> dict[str, FitReport]:
    """Fit one SAE, or several in one pass, to rows (N, D) in their own units; afterwards they are calibrated and in eval mode.

    A twentieth of the rows (at least 4,096 where there are five times as many, at most 2^17) is kept from training to calibrate thresholds
    on, unless ``held_out`` gives such rows. ``train`` changes numbers of ``fit.train``: ``steps=5000, lr=1e-3, batch_size=2048``, say.
    """
    named = {"sae": saes} if isinstance(saes, SAE) else dict(saes)
    d_in, device = {s.d_in for s in named.values()}, next(iter(named.values())).b_enc.device
    if activations.ndim != 2 or {activations.shape[1]} != d_in:
        raise UserError(f"activations of shape {tuple(activations.shape)} do not fit SAEs with d_in={sorted(d_in)}: give rows (N, d_in)")
    cfg = replace(_arm("batch_topk", {})[1], **train)
    order = torch.randperm(len(activations), generator=torch.Generator().manual_seed(seed_of(seed, "rows")))
    n_held = 0 if held_out is not None else min(max(len(order) // 20, min(4096, len(order) // 5), 1), 1 << 17)
    held = (activations[order[:n_held]] if held_out is None else held_out).float().to(device)
    order = order[n_held:]

    def batch_at(step: int) -> Batch:
        generator = torch.Generator().manual_seed(seed_of(seed, "batch", step))
        x = activations[order[torch.randint(len(order), (cfg.batch_size,), generator=generator)]].float().to(device)
        return Batch(x, x)

    x = activations[order[: 1 << 15]].float().to(device)
    return fit.fit_saes(named, batch_at, cfg, Sample(x, x, held), seed=seed, dead_after=round(0.03 * cfg.steps * cfg.batch_size))


def evaluate(sae: SAE, activations: Tensor) -> dict[str, float | None]:
    """Reconstruction and sparsity of ``sae`` on rows (N, D) that it was not fitted to; None where a number has no value."""
    bench = Bench(sae=sae, device=sae.b_enc.device, x=activations.float())
    out: dict[str, float | None] = {}
    for measured in (reconstruction.measure(bench, rows=None), sparsity.measure(bench, rows=None, entropy_latents=256)):
        out |= measured.scalars
    return out


def _arm(name: str, settings: dict[str, Any]) -> tuple[Arm, TrainConfig]:
    overrides = [f"sae.{k.replace('__', '.')}={_text(v)}" for k, v in settings.items()]
    cfg, _ = compose_checked(CONF, ["preset=laptop", f"sae={name}", *overrides])
    study = build(cfg.study)
    arm = next(iter(study.arms.values()))
    return arm, arm.config(study.fit.train)


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(_text(v) for v in value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
