"""Watching that training stays finite: where it does not, it stops, and the error names learner, step, term and tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.errors import NonFinite


class Watch:
    """Watches one learner. ``loss`` below is anything with a ``total`` (a scalar tensor) and ``parts`` (scalar tensors by name)."""

    def __init__(self, name: str, module: nn.Module, lr: float) -> None:
        self.name, self.module, self.lr = name, module, lr
        self.at_once = next(module.parameters()).device.type == "cpu"
        self.first_bad: Tensor | None = (
            None  # where not at once: the first step that was not finite, or -1
        )
        self.last: tuple[Any, Tensor]

    def see(self, step: int, loss: Any, norm: Tensor) -> None:
        """Raise :class:`NonFinite` if the loss or the gradient's ``norm`` of ``step`` is not finite.

        On an accelerator, asking would stop its queue: there the first such step is kept on the device, and :meth:`check` asks for it
        every few steps and before anything is written. What is trained in between is thrown away.
        """
        if self.at_once:
            if not (math.isfinite(loss.total.item()) and math.isfinite(norm.item())):
                raise NonFinite(self._told(step, loss, norm))
            return
        if self.first_bad is None:
            self.first_bad = torch.full((), -1, dtype=torch.int64, device=norm.device)
        bad = ~(torch.isfinite(loss.total.detach()) & torch.isfinite(norm)) & (self.first_bad < 0)
        self.first_bad, self.last = torch.where(bad, step, self.first_bad), (loss, norm)

    def check(self) -> None:
        """Raise :class:`NonFinite` if a step that was seen was not finite."""
        if self.first_bad is not None and (step := int(self.first_bad)) >= 0:
            raise NonFinite(self._told(step, *self.last))

    def weights(self, step: int) -> None:
        """Raise :class:`NonFinite` for a weight that the update of ``step`` broke: no loss would ever see what the last one did."""
        self.check()
        for name, value in self.module.named_parameters():
            if not bool(torch.isfinite(value).all()):
                raise NonFinite(
                    f"{self.name}: {name} is not finite after step {step}; try a smaller lr={self.lr}"
                )

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Raise :class:`NonFinite` for a held-out number, taken after ``step``, that is none."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFinite(
                    f"{self.name}: {name} is not finite after step {step}; try a smaller lr={self.lr}"
                )

    def _told(self, step: int, loss: Any, norm: Tensor) -> str:
        bad = [name for name, part in loss.parts.items() if not math.isfinite(float(part))]
        where = (
            f"loss term {', '.join(bad)}"
            if bad
            else "the loss"
            if not math.isfinite(loss.total.item())
            else "the gradient"
        )
        parts = ", ".join(f"{k}={float(v):.4g}" for k, v in loss.parts.items())
        named = dict(self.module.named_parameters())
        gradients = [
            n
            for n, p in named.items()
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ]
        weights = [
            n for n, p in named.items() if not bool(torch.isfinite(p).all())
        ]  # where the gradient is gone by now
        tensor = (
            f"; first non-finite gradient: {gradients[0]}"
            if gradients
            else f"; first non-finite weight: {weights[0]}"
            if weights
            else ""
        )
        return f"{self.name}: {where} is not finite at step {step} ({parts}, gradient norm {float(norm):.4g}){tensor}; try a smaller lr={self.lr}"
