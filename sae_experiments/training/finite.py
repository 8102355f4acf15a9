"""Stop training that is no longer finite, naming the learner, step, loss term and tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.errors import NonFinite


class FiniteGuard:
    """Check the losses, gradients and weights of one learner.

    Losses are any objects with a `total` (a scalar tensor) and `parts` (scalar tensors by name).

    Args:
        name: Name of the learner, for messages.
        module: Its parameters.
        lr: Its peak learning rate, for messages.
        later: Find out at the next `check` instead of at once. None: on an accelerator.
    """

    def __init__(
        self, name: str, module: nn.Module, lr: float, *, later: bool | None = None
    ) -> None:
        self.name = name
        self.module = module
        self.lr = lr
        on_cpu = next(module.parameters()).device.type == "cpu"
        self.at_once = on_cpu if later is None else not later
        # On an accelerator: the first step that was not finite, or -1.
        self.first_bad: Tensor | None = None
        self.last: tuple[Any, Tensor]

    def see(self, step: int | Tensor, loss: Any, norm: Tensor) -> None:
        """Raise `NonFinite` if the loss or gradient norm of `step` is not finite.

        Reading a number from an accelerator would stall its queue. There the first such step is
        kept on the device, and `check` reads it every few steps and before anything is
        written. What is trained in between is thrown away.

        Args:
            step: Number of the step; a tensor in a step that is recorded.
            loss: Its loss.
            norm: Norm of its gradient.
        """
        if self.at_once:
            if not (math.isfinite(loss.total.item()) and math.isfinite(norm.item())):
                raise NonFinite(self._told(int(step), loss, norm))
            return
        if self.first_bad is None:
            self.first_bad = torch.full((), -1, dtype=torch.int64, device=norm.device)
        bad = ~(torch.isfinite(loss.total.detach()) & torch.isfinite(norm)) & (self.first_bad < 0)
        self.first_bad.copy_(torch.where(bad, step, self.first_bad))
        self.last = loss._replace(total=loss.total.detach()), norm

    def check(self) -> None:
        """Raise `NonFinite` if any step so far was not finite."""
        if self.first_bad is not None and (step := int(self.first_bad)) >= 0:
            raise NonFinite(self._told(step, *self.last))

    def weights(self, step: int) -> None:
        """Raise `NonFinite` if a weight is not finite after the update of `step`.

        No later loss would show a weight that the last update broke.
        """
        self.check()
        for name, value in self.module.named_parameters():
            if not bool(torch.isfinite(value).all()):
                raise NonFinite(
                    f"{self.name}: {name} is not finite after step {step}; "
                    f"try a smaller lr={self.lr}"
                )

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Raise `NonFinite` if a held-out number, taken after `step`, is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFinite(
                    f"{self.name}: {name} is not finite after step {step}; "
                    f"try a smaller lr={self.lr}"
                )

    def _told(self, step: int, loss: Any, norm: Tensor) -> str:
        bad = [name for name, part in loss.parts.items() if not math.isfinite(float(part))]
        if bad:
            where = f"loss term {', '.join(bad)}"
        elif not math.isfinite(loss.total.item()):
            where = "the loss"
        else:
            where = "the gradient"
        parts = ", ".join(f"{k}={float(v):.4g}" for k, v in loss.parts.items())
        return (
            f"{self.name}: {where} is not finite at step {step} "
            f"({parts}, gradient norm {float(norm):.4g}){self._first_bad_tensor()}; "
            f"try a smaller lr={self.lr}"
        )

    def _first_bad_tensor(self) -> str:
        """The first non-finite gradient, or the first such weight if the gradients are gone."""
        for name, parameter in self.module.named_parameters():
            gradient = parameter.grad
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                return f"; first non-finite gradient: {name}"
        for name, parameter in self.module.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                return f"; first non-finite weight: {name}"
        return ""
