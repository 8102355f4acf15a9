"""Fit one or many SAEs in one pass over a stream of activations. Needs no Hydra and no run folder.

The policy all variants share sits here, once: input scale, dead-latent tracking, calibration, folding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_experiments.io import UserError
from sae_experiments.saes.base import SAE, Batch, Forward, Step
from sae_experiments.training import At, History, Learner, Loss, Phase, Session, TrainConfig, train


class FitReport(NamedTuple):
    """What fitting one SAE took: ``seconds`` of its own steps plus its share of reading batches, rows used a second, curves."""

    seconds: float
    rows_per_second: float
    steps: int
    history: History
    cut: bool


class Sample(NamedTuple):
    """Rows outside the stream: ``x, y`` to initialise from, ``held`` (N, D) to calibrate thresholds on, never trained on."""

    x: Tensor
    y: Tensor
    held: Tensor


class SAELearner(Learner):
    """An SAE as a learner: keeps count of the rows since each latent last fired, and calls the SAE's hooks."""

    def __init__(self, name: str, sae: SAE, cfg: TrainConfig, sample: Sample, *, dead_after: int, seed: int) -> None:
        module = nn.Module()
        module.sae = sae
        module.register_buffer("since_fired", torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.b_enc.device))
        # A step may use fewer rows than a batch should have: whole windows, a phase on a sample.
        module.register_buffer("rows_used", torch.zeros((), dtype=torch.int64, device=sae.b_enc.device))
        super().__init__(name, module, cfg, seed=seed)
        self.sae, self.sample, self.dead_after = sae, sample, dead_after

    def phases(self) -> list[Phase]:
        return self.sae.phases()

    def begin(self, phase: str) -> None:
        self.sae.begin(phase, self.sample.x, self.sample.y)

    def finish(self, phase: str) -> None:
        with torch.no_grad():
            self.sae.finish(phase, self.sample.held)

    def moment(self, at: At) -> Step:
        return Step(phase=at.phase, progress=at.progress, dead=self.module.since_fired > self.dead_after, generator=at.generator)

    def loss(self, batch: Batch, at: At) -> Loss:
        return self.sae.loss(batch, self.moment(at))

    def before_update(self) -> None:
        self.sae.before_update()

    @torch.no_grad()
    def after_update(self, loss: Loss, at: At) -> None:
        fwd: Forward = loss.extra
        moment = self.moment(at)
        self.module.rows_used.add_(fwd.batch.x.shape[0])
        self.module.since_fired.add_(fwd.batch.x.shape[0]).masked_fill_(fwd.codes.fires > 0, 0)
        self.sae.after_update(fwd, moment)

    @torch.no_grad()
    def observe(self, loss: Loss, at: At) -> dict[str, float]:
        fwd: Forward = loss.extra
        variance = (fwd.batch.y - fwd.batch.y.mean(0)).square().sum()
        values = {
            "l0": fwd.codes.l0,
            "fvu": float((fwd.batch.y - fwd.recon).square().sum() / variance.clamp_min(1e-12)),
            "dead_frac": float((self.module.since_fired > self.dead_after).float().mean()),
        }
        controller = getattr(self.sae, "controller", None)
        return values | ({"coeff": controller.coeff} if controller is not None else {})


#: How activations are scaled in a fit.
SCALES = ("spread", "none")


def fit_saes(
    saes: Mapping[str, SAE],
    batch_at: Callable[[int], Batch],
    cfg: TrainConfig | Mapping[str, TrainConfig],
    sample: Sample,
    *,
    seed: int,
    dead_after: int,
    scale: str = "spread",
    session: Session | None = None,
) -> dict[str, FitReport]:
    """Train ``saes`` side by side on the batches ``batch_at(step)`` (in raw units) and leave them calibrated, in eval mode and raw units.

    Inside, inputs and outputs are scaled by one number each to unit mean square, which is folded into the weights at the end, so that
    coefficients and learning rates carry over between models. An SAE's result does not depend on which others are trained beside it.

    Args:
        scale: one of :data:`SCALES`; with none the SAE sees the rows in their own units.

    Raises:
        NonFinite: a loss became NaN or infinite (names SAE, step and term).
        UserError: the sample holds a non-finite value, or nothing but zeros.
    """
    configs = cfg if isinstance(cfg, Mapping) else dict.fromkeys(saes, cfg)
    blocks = {sae.blocks for sae in saes.values()}
    if len(blocks) != 1:
        raise UserError("SAEs over different numbers of sites cannot share one pass")
    if scale not in SCALES:
        raise UserError(f"scale={scale!r} is not one of {', '.join(SCALES)}")
    s_in, s_out = scale_of(sample.x, "activations", *blocks), scale_of(sample.y, "targets", *blocks)
    if scale == "none":
        s_in, s_out = torch.ones_like(s_in), torch.ones_like(s_out)
    scaled = Sample(sample.x * s_in, sample.y * s_out, sample.held * s_in)
    learners = [SAELearner(name, sae, configs[name], scaled, dead_after=dead_after, seed=seed) for name, sae in saes.items()]
    for sae in saes.values():
        controller = getattr(sae, "controller", None)
        if controller is not None:
            controller.horizon = next(iter(configs.values())).steps

    def scaled_batch(step: int) -> Batch:
        batch = batch_at(step)
        x = batch.x * s_in
        rest = batch.downstream
        return Batch(
            x,
            x if batch.y is batch.x else batch.y * s_out,
            None if batch.alt is None else batch.alt * s_in,
            None if rest is None else lambda recon: rest(recon / s_out),
        )

    first = next(iter(configs.values()))
    progress = train(learners, scaled_batch, first, session or Session())
    reports = {}
    for (name, sae), learner in zip(saes.items(), learners, strict=True):
        sae.rescale(s_in, s_out)
        sae.eval()
        sae.requires_grad_(False)
        seconds = progress.seconds_of(name)
        mine = [(s, k.removeprefix(f"{name}/"), v) for s, k, v in progress.history if len(saes) == 1 or k.startswith(f"{name}/")]
        rows_per_second = int(learner.module.rows_used) / max(seconds, 1e-9)
        reports[name] = FitReport(seconds, rows_per_second, progress.step, mine, progress.cut)
    return reports


def scale_of(x: Tensor, what: str, blocks: int = 1) -> Tensor:
    """``1 / sqrt(mean ||x||^2)`` over rows (N, D), as (D,): brings activations to unit mean square (each of ``blocks`` equal parts by itself)."""
    mean = x.double().square().view(len(x), blocks, -1).sum(2).mean(0)
    if not bool((mean > 0).all()) or not bool(torch.isfinite(mean).all()):
        raise UserError(f"{what} cannot be scaled: their mean square is {mean.tolist()} (constant zero or non-finite values in the store)")
    return mean.rsqrt().to(x.dtype).repeat_interleave(x.shape[1] // blocks)
