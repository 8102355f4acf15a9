"""Early stopping of a fit on the stability of its code on fixed rows under fixed noise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.saes.base import SAE, Batch, Codes, Forward
from sae_experiments.saes.purified.perturb import NoiseModel
from sae_experiments.sampling import spread
from sae_experiments.training.loop import Loss

#: Seed of the noise, the same in every evaluation.
SEED = 20_101
#: Numbers of the state, which are attributes of the module: FSS, FVU and progress of the best
#: evaluation, the smallest FVU, evaluations since the best one, progress of the next evaluation,
#: and progress at the stop. NaN stands for none so far.
STATE = ("score_fss", "score_fvu", "score_at", "least_fvu", "bad", "next_look", "stopped_at")


class StabilityEarlyStopping(nn.Module):
    """Stop training when feature stability no longer improves, and restore the best weights.

    Every `eval_every_frac` of training, measures FSS (feature stability score) and FVU on a fixed
    sample under fixed noise, and scores them as

        score = FSS - 100 max(0, FVU / FVU_0 - slack)

    FSS is pooled, `100 (1 - sum |z~ - z| / sum (z~ + z))`, under Gaussian noise. FVU_0 is `fvu`,
    or else the smallest FVU so far, by which older scores are computed again. The sample is spread
    over the rows that SAEs are initialised from, a negligible share of the training rows. A
    stopped SAE leaves the remaining steps almost free (batches are still read for the SAEs beside
    it).

    Args:
        sae: The SAE to watch.
        patience: Evaluations without improvement before stopping, at least 1.
        eval_every_frac: Share of training between evaluations, in (0, 1].
        min_gain: Improvement of the score that counts.
        slack: Relative increase of FVU over FVU_0 that costs nothing.
        eps: Size of the noise, in mean distances of the rows from their mean.
        eval_rows: Rows of the sample.
        start_frac: Share of training before the first evaluation.
        fvu: FVU of the host; None: the smallest FVU so far.
    """

    x: Tensor
    y: Tensor
    best: Tensor
    state: Tensor
    trace: Tensor

    def __init__(  # noqa: PLR0913 (keyword-only settings)
        self,
        sae: SAE,
        *,
        patience: int,
        eval_every_frac: float,
        min_gain: float,
        slack: float,
        eps: float,
        eval_rows: int,
        start_frac: float,
        fvu: float | None,
    ) -> None:
        super().__init__()
        if not 0 < eval_every_frac <= 1 or patience < 1 or eval_rows < 1 or not eps > 0:
            raise UserError(
                "sae.model.stop: needs eval_every_frac in (0, 1], patience and eval_rows of at "
                f"least 1 and eps above 0, not eval_every_frac={eval_every_frac}, "
                f"patience={patience}, eval_rows={eval_rows}, eps={eps}"
            )
        self.patience = patience
        self.eval_every_frac = eval_every_frac
        self.min_gain = min_gain
        self.slack = slack
        self.eps = eps
        self.start_frac = start_frac
        self.fvu = fvu
        self.register_buffer("x", torch.zeros(eval_rows, sae.d_in))
        self.register_buffer("y", torch.zeros(eval_rows, sae.d_out))
        self.register_buffer("best", torch.zeros(sum(p.numel() for p in sae.parameters())))
        self.register_buffer("state", torch.full((len(STATE),), torch.nan, dtype=torch.float64))
        # Progress, FSS and FVU of each evaluation.
        self.register_buffer("trace", torch.full((round(1 / eval_every_frac) + 1, 3), torch.nan))

    def __getattr__(self, name: str) -> Any:
        return self.state[STATE.index(name)].item() if name in STATE else super().__getattr__(name)

    def note(self, **values: float) -> None:
        """Set entries of the state by name."""
        for name, value in values.items():
            self.state[STATE.index(name)] = value

    @property
    def stopped(self) -> bool:
        """True if training is over for this SAE."""
        return not math.isnan(self.stopped_at)

    def begin(self, x: Tensor, y: Tensor) -> None:
        """Take the sample from inputs (N, D) and targets (N, O), and forget earlier evaluations."""
        n = len(self.x)
        sample = torch.from_numpy(spread(len(x), n)).to(x.device)
        part = sample[torch.arange(n, device=x.device) % len(sample)]
        self.x.copy_(x[part])
        self.y.copy_(y[part])
        self.state.fill_(torch.nan)
        self.note(bad=0, next_look=self.start_frac)

    def look(self, sae: SAE, progress: float) -> None:
        """Evaluate if it is time; keep the best weights, and stop after `patience` worse ones.

        Args:
            sae: The SAE.
            progress: Share of training that is done.
        """
        if self.stopped or progress < self.next_look:
            return
        fss, fvu = self.measure(sae)
        turn = min(round(progress / self.eval_every_frac), len(self.trace) - 1)
        self.trace[turn] = torch.tensor([progress, fss, fvu])
        least_fvu = fvu if math.isnan(self.least_fvu) else min(fvu, self.least_fvu)
        self.note(next_look=self.next_look + self.eval_every_frac, least_fvu=least_fvu)
        best = self.score(self.score_fss, self.score_fvu)
        # Negated, so that anything is better than NaN, the score before the first evaluation.
        if not self.score(fss, fvu) <= best + self.min_gain:
            self.note(score_fss=fss, score_fvu=fvu, score_at=progress, bad=0)
            torch.cat([p.detach().reshape(-1) for p in sae.parameters()], out=self.best)
            return
        self.note(bad=self.bad + 1)
        if self.bad >= self.patience:
            self.note(stopped_at=progress)

    def score(self, fss: float, fvu: float) -> float:
        """FSS minus a penalty for a reconstruction that is worse than allowed."""
        return fss - 100 * max(0.0, fvu / (self.fvu or self.least_fvu) - self.slack)

    @torch.no_grad()
    def measure(self, sae: SAE) -> tuple[float, float]:
        """FSS (per cent) and FVU on the sample, with the support selected as in training."""
        cloud = NoiseModel(sae.d_in).to(self.x.device).learn(self.x)
        generator = torch.Generator(self.x.device).manual_seed(SEED)
        delta = cloud.directions("gaussian", len(self.x), generator).mul_(self.eps * cloud.radius)
        z, moved = sae.encode(self.x), sae.encode(self.x + delta)
        variance = (self.y - self.y.mean(0)).square().sum().clamp_min(1e-12)
        fvu = (self.y - sae.reconstruct(self.x, z)).square().sum() / variance
        mass = (z.abs() + moved.abs()).sum().clamp_min(1e-12)
        fss = 100 * (1 - float((z - moved).abs().sum() / mass))
        return fss, float(fvu)

    @torch.no_grad()
    def restore(self, sae: SAE) -> None:
        """Put the best weights back, unless training ran to its end and the last are as good."""
        if math.isnan(self.score_at):
            return
        best = self.score(self.score_fss, self.score_fvu)
        if not self.stopped and self.score(*self.measure(sae)) >= best:
            return
        parameters = list(sae.parameters())
        values = self.best.split([p.numel() for p in parameters])
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value.view_as(p))

    def idle(self, sae: SAE, batch: Batch) -> Loss:
        """A loss of zero that costs nothing, with the forward pass of an empty code."""
        x, y = batch.x[:2], batch.y[:2]
        zero = torch.stack([p.sum() * 0 for p in sae.parameters() if p.requires_grad]).sum()
        codes = Codes(x.new_zeros(len(x), sae.d_sae))
        fwd = Forward(Batch(x, y), x.new_zeros(len(x), sae.d_sae), codes, y, codes.values)
        return Loss(zero, {"stopped": zero.detach()}, fwd)
