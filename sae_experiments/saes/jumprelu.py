"""JumpReLU: a learned threshold for every latent, trained with straight-through estimates (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.saes import ops
from sae_experiments.saes.base import Forward, Inference, Step
from sae_experiments.saes.standard import Standard


class _Jump(torch.autograd.Function):
    """``z = a H(a - theta)``; ``dz/dtheta := -(theta/eps) K((a - theta)/eps)``, K = 1 on |u| < 1/2 (``through``: dz/da := 1 in the window too)."""

    @staticmethod
    def forward(ctx, a: Tensor, theta: Tensor, eps: float, through: bool) -> Tensor:
        ctx.save_for_backward(a, theta)
        ctx.eps, ctx.through = eps, through
        return a * (a > theta)

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, theta = ctx.saved_tensors
        window = (a - theta).abs() < ctx.eps / 2
        open_ = (a > theta) | window if ctx.through else a > theta
        return grad * open_, -grad * window * theta / ctx.eps, None, None


class _Step(torch.autograd.Function):
    """``H(a - theta)``; ``dH/dtheta := -(1/eps) K((a - theta)/eps)``, no gradient to a."""

    @staticmethod
    def forward(ctx, a: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(a, theta)
        ctx.eps = eps
        return (a > theta).to(a.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, theta = ctx.saved_tensors
        return None, -grad * ((a - theta).abs() < ctx.eps / 2) / ctx.eps, None


class JumpReLU(Standard):
    """``z = a H(a - theta)`` with one threshold a latent, kept raw (a logarithm would freeze under Adam) and at least 0.

    ``form=step``: loss ``||x - xhat||^2 + lambda mean_B sum H(a - theta)``. ``form=tanh`` (Anthropic, January 2025): the penalty is
    ``lambda sum tanh(c z ||d||)``, the gradient passes through to a within the window, and dead latents are pulled up by
    ``pre_act_coeff sum ReLU(theta - a)``. lambda is steered to ``target_l0``; the last trim shifts all thresholds by one number.
    A dead latent has no sample near its threshold and so no gradient to it: its threshold melts, by the factor ``melt`` a step.
    The penalty counts on a, not on z: on z every inactive latent falls into the window once theta < eps/2.
    """

    def __init__(
        self,
        *,
        form: str,
        bandwidth: float,
        start_threshold: float,
        tanh_scale: float,
        pre_act_coeff: float,
        melt: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if form not in ("step", "tanh"):
            raise UserError(f"sae.model.form={form!r} is not one of step, tanh")
        if not bandwidth > 0:
            raise UserError(f"sae.model.bandwidth={bandwidth} must be positive")
        if not 0 < melt <= 1:
            raise UserError(f"sae.model.melt={melt} must lie in (0, 1]")
        self.melt = melt
        self.form, self.bandwidth, self.tanh_scale, self.pre_act_coeff = (
            form,
            bandwidth,
            tanh_scale,
            pre_act_coeff,
        )
        self.theta = nn.Parameter(torch.full((self.d_sae,), float(start_threshold)))

    def support(self, pre: Tensor) -> Tensor:
        if not self.training:
            return self.strength(pre) > self.threshold
        return (
            pre > self.theta.detach() - self.bandwidth / 2
        )  # the window is part of the support: it carries gradient

    def strength(self, pre: Tensor) -> Tensor:
        return torch.where(pre > 0, pre - self.theta, 0)

    def shape(self, entries: Tensor, col: Tensor | None) -> Tensor:
        theta = self.theta if col is None else self.theta[col]
        return _Jump.apply(entries, theta, self.bandwidth, self.form == "tanh")

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        rows, pattern = len(fwd.batch.x), fwd.codes.pattern
        if self.form == "tanh":
            out = {
                "sparsity": self.coefficient(step)
                * torch.tanh(self.tanh_scale * fwd.codes.values).sum()
                / rows
            }
            dead = step.dead.nonzero().squeeze(1)
            if self.pre_act_coeff and dead.numel():
                a = nn.functional.linear(fwd.batch.x, self.W_enc[dead], self.bias()[dead])
                out["pre_act"] = self.pre_act_coeff * torch.relu(self.theta[dead] - a).sum() / rows
            return out
        theta = self.theta if pattern is None else self.theta[pattern.col]
        active = _Step.apply(
            fwd.at, theta.expand_as(fwd.at) if pattern is None else theta, self.bandwidth
        )
        if (
            fwd.mask is not None
        ):  # the zeros outside the support are no pre-activations, and would lie in the window of a small theta
            active = ops.masked(active, fwd.mask)
        return {"sparsity": self.coefficient(step) * active.sum() / rows}

    def after_step(self, fwd: Forward, step: Step) -> None:
        self.theta.data.clamp_min_(0)
        if self.melt < 1:
            self.theta.data[step.dead] *= self.melt
        super().after_step(fwd, step)

    def inference(self) -> Inference:
        # The trim is a shift: a > theta and a - theta > threshold is a > theta + threshold.
        return Inference(
            "jumprelu",
            self.plain_tensors() | {"threshold": self.theta.detach() + self.threshold},
            {"apply_b_dec_to_input": self.pre_bias},
        )
