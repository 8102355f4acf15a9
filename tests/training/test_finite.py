"""The watch over training, on the processor and, where there is one, on an accelerator, where
it may not stop the queue at every step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sae_experiments.errors import NonFinite
from sae_experiments.training.finite import FiniteGuard
from sae_experiments.training.loop import Learner, Loss, Session, StepInfo, train
from support.common import train_config

CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="until this machine has a CUDA device"
)
DEVICES = ["cpu", "cpu, as an accelerator", pytest.param("cuda", marks=CUDA)]


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device; on a processor that plays an accelerator, the watch asks as seldom as it does
    there.
    """
    if request.param.endswith("accelerator"):
        plain = FiniteGuard.__init__

        def init(self: FiniteGuard, *args: Any, **kwargs: Any) -> None:
            plain(self, *args, **kwargs)
            self.at_once = False

        monkeypatch.setattr(FiniteGuard, "__init__", init)
    return request.param.split(",")[0]


class Line(Learner):
    """Fits a line; its loss or its weights break at a step."""

    def __init__(
        self, device: str, *, loss_at: int = -1, weights_at: int = -1, evaluation_at: int = -1
    ) -> None:
        torch.manual_seed(0)
        cfg = train_config(steps=40, log_every=10, eval_every=15, checkpoint_every_s=0.0)
        super().__init__("line", nn.Linear(4, 1).to(device), cfg, seed=0)
        self.loss_at, self.weights_at, self.evaluation_at = loss_at, weights_at, evaluation_at

    def loss(self, batch: torch.Tensor, info: StepInfo) -> Loss:
        error = self.module(batch).square().mean()
        broken = error * (float("nan") if info.step == self.loss_at else 1.0)
        return Loss(broken, {"mse": broken.detach()})

    def after_update(self, loss: Loss, info: StepInfo) -> None:
        if info.step == self.weights_at:
            with torch.no_grad():
                self.module.weight[0, 2] = float("inf")

    def evaluate(self, step: int) -> dict[str, float]:
        return {"held_out": float("nan") if step == self.evaluation_at else 1.0}


def run(learner: Line, device: str, checkpoint=None) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(device)
    train([learner], lambda step: x, learner.cfg, Session(checkpoint=checkpoint))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("step", [0, 7, 10, 39])
def test_the_first_step_that_broke_is_named_and_nothing_of_it_is_written(device, step, tmp_path):
    with pytest.raises(
        NonFinite,
        match=(
            rf"^line: loss term mse is not finite at step {step} \(mse=nan.*; first non-finite"
            r" (gradient|weight): weight; try"
        ),
    ):
        run(Line(device, loss_at=step), device, tmp_path / "checkpoint")
    again = Line(device)
    run(again, device, tmp_path / "checkpoint")
    whole = Line(device)
    run(whole, device)
    assert torch.equal(again.module.weight, whole.module.weight), (
        "what was checkpointed before is good"
    )


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_a_weight_that_the_last_update_broke_is_named(device):
    with pytest.raises(
        NonFinite, match=r"^line: weight is not finite after step 39; try a smaller lr=0\.01"
    ):
        run(Line(device, weights_at=39), device)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_a_held_out_number_that_is_none_is_named(device):
    with pytest.raises(NonFinite, match=r"^line: held_out is not finite after step 29"):
        run(Line(device, evaluation_at=30), device)


@CUDA
def test_on_an_accelerator_the_watch_does_not_wait_for_each_step():
    watch = FiniteGuard("w", nn.Linear(2, 2).cuda(), 0.1)
    loss = Loss(torch.ones((), device="cuda"), {})
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            watch.see(0, loss, torch.ones((), device="cuda"))
            watch.see(1, loss, torch.ones((), device="cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    watch.check()
