"""Early stopping on stability: a fixed set of rows under fixed noise tells when an SAE was at its best, and that state is put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.saes.base import SAE, Batch, Codes, Forward, Step
from sae_experiments.saes.purified.perturb import NoiseModel
from sae_experiments.sampling import spread
from sae_experiments.training.loop import Loss

SEED = 20_101  # of the noise, the same at every look
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

    def __init__(
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
        self.register_buffer(
            "trace", torch.full((round(1 / eval_every_frac) + 1, 3), torch.nan)
        )  # progress, FSS, FVU of each look

    def __getattr__(self, name: str) -> Any:
        return self.state[STATE.index(name)].item() if name in STATE else super().__getattr__(name)

    def note(self, **values: float) -> None:
        """Write numbers of the state."""
        for name, value in values.items():
            self.state[STATE.index(name)] = value

    @property
    def stopped(self) -> bool:
        """Whether training is over for this SAE."""
        return self.stopped_at == self.stopped_at

    def begin(self, x: Tensor, y: Tensor) -> None:
        """Take the rows."""
        few = torch.from_numpy(spread(len(x), len(self.x))).to(x.device)
        part = few[torch.arange(len(self.x), device=x.device) % len(few)]
        self.x.copy_(x[part])
        self.y.copy_(y[part])
        self.state.fill_(torch.nan)
        self.note(bad=0, next_look=self.start_frac)

    def look(self, sae: SAE, progress: float) -> None:
        """Measure if it is time, keep the state if it is the best, stop if none was for long."""
        if self.stopped or progress < self.next_look:
            return
        fss, fvu = self.measure(sae)
        turn = min(round(progress / self.eval_every_frac), len(self.trace) - 1)
        self.trace[turn] = torch.tensor([progress, fss, fvu])
        self.note(
            next_look=self.next_look + self.eval_every_frac,
            least_fvu=min(fvu, self.least_fvu) if self.least_fvu == self.least_fvu else fvu,
        )
        if (
            not self.score(fss, fvu) <= self.score(self.score_fss, self.score_fvu) + self.min_gain
        ):  # also where there is none yet
            self.note(score_fss=fss, score_fvu=fvu, score_at=progress, bad=0)
            torch.cat([p.detach().reshape(-1) for p in sae.parameters()], out=self.best)
            return
        self.note(bad=self.bad + 1)
        if self.bad >= self.patience:
            self.note(stopped_at=progress)

    def score(self, fss: float, fvu: float) -> float:
        """FSS less what the reconstruction is worse than allowed."""
        return fss - 100 * max(0.0, fvu / (self.fvu or self.least_fvu) - self.slack)

    @torch.no_grad()
    def measure(self, sae: SAE) -> tuple[float, float]:
        """FSS and FVU on the rows, with the support chosen as in training."""
        cloud = NoiseModel(sae.d_in).to(self.x.device).learn(self.x)
        generator = torch.Generator(self.x.device).manual_seed(SEED)
        delta = cloud.directions("gaussian", len(self.x), generator).mul_(self.eps * cloud.radius)
        z, moved = sae.encode(self.x), sae.encode(self.x + delta)
        error = (self.y - sae.reconstruct(self.x, z)).square().sum() / (
            self.y - self.y.mean(0)
        ).square().sum().clamp_min(1e-12)
        return 100 * (
            1 - float((z - moved).abs().sum() / (z.abs() + moved.abs()).sum().clamp_min(1e-12))
        ), float(error)

    @torch.no_grad()
    def restore(self, sae: SAE) -> None:
        """Put the best state back, unless the last one is as good."""
        if self.score_at == self.score_at and not (
            not self.stopped
            and self.score(*self.measure(sae)) >= self.score(self.score_fss, self.score_fvu)
        ):
            parameters = list(sae.parameters())
            for p, value in zip(
                parameters, self.best.split([p.numel() for p in parameters]), strict=True
            ):
                p.copy_(value.view_as(p))

    def idle(self, sae: SAE, batch: Batch, step: Step) -> Loss:
        """A loss of zero that costs nothing, with an empty pass for whoever counts."""
        x, y = batch.x[:2], batch.y[:2]
        zero = torch.stack([p.sum() * 0 for p in sae.parameters() if p.requires_grad]).sum()
        codes = Codes(x.new_zeros(len(x), sae.d_sae))
        fwd = Forward(Batch(x, y), x.new_zeros(len(x), sae.d_sae), codes, y, codes.values)
        return Loss(zero, {"stopped": zero.detach()}, fwd)
