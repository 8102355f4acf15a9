"""JumpReLU: a learned threshold for every latent, trained with straight-through estimates.

Rajamanoharan et al. 2024, arXiv 2407.14435.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.saes import ops, static
from sae_experiments.saes.base import Forward, Inference, Step
from sae_experiments.saes.standard import Standard
from sae_experiments.saes.types import DenseForm


class _Jump(torch.autograd.Function):
    """`z = a H(a - theta)`, with the estimate `dz/dtheta := -(theta/eps) K((a - theta)/eps)`.

    H is the Heaviside function, and K = 1 on |u| < 1/2. With `through`, `dz/da := 1` in the window
    of K as well.
    """

    @staticmethod
    def forward(ctx, a: Tensor, theta: Tensor, eps: float, through: bool) -> Tensor:
        ctx.save_for_backward(a, theta)
        ctx.eps, ctx.through = eps, through
        return a * (a > theta)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        a, theta = ctx.saved_tensors
        window = (a - theta).abs() < ctx.eps / 2
        passes = a > theta
        if ctx.through:
            passes = passes | window
        return grad * passes, -grad * window * theta / ctx.eps, None, None


class _Heaviside(torch.autograd.Function):
    """`H(a - theta)`, with `dH/dtheta := -(1/eps) K((a - theta)/eps)` and no gradient to a."""

    @staticmethod
    def forward(ctx, a: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(a, theta)
        ctx.eps = eps
        return (a > theta).to(a.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        a, theta = ctx.saved_tensors
        window = (a - theta).abs() < ctx.eps / 2
        return None, -grad * window / ctx.eps, None


class JumpReLU(Standard):
    """`z = a H(a - theta)` with one threshold theta per latent.

    Thresholds are stored as they are, at least 0; their logarithms would freeze under Adam. lambda
    is steered to `target_l0`. At the end all thresholds are shifted by one number, so that the L0
    is exact.

    With `form=step` the loss is `||x - xhat||^2 + lambda mean_B sum H(a - theta)`. With `form=tanh`
    (Anthropic, January 2025) the penalty is `lambda sum tanh(c z ||d||)`, the gradient passes
    through to a within the window, and dead latents are pulled up by
    `pre_act_coeff sum ReLU(theta - a)`.

    A dead latent has no sample near its threshold, and so the threshold gets no gradient. Instead
    it falls by the factor `melt` at each step.

    The penalty counts active latents on a, not on z: on z every inactive latent would lie in the
    window once theta < eps/2.

    Args:
        form: `step` or `tanh`.
        bandwidth: Width eps of the straight-through window, on inputs of unit mean square.
        start_threshold: theta at the start.
        tanh_scale: c of `form=tanh`.
        pre_act_coeff: Weight of the term for dead latents of `form=tanh`.
        melt: Factor in (0, 1] of the threshold of a dead latent, per step; 1 leaves it.
        **kwargs: Further arguments of `Standard`.
    """

    static_steps = True
    default_lr_factor = 1.0

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
        self.form = form
        self.bandwidth = bandwidth
        self.tanh_scale = tanh_scale
        self.pre_act_coeff = pre_act_coeff
        self.melt = melt
        self.theta = nn.Parameter(torch.full((self.d_sae,), float(start_threshold)))

    def support(self, pre: Tensor) -> Tensor:
        """Entries above the threshold; in training those in the window below it as well."""
        if not self.training:
            return self.threshold_score(pre) > self.threshold
        # The window is part of the support because it carries a gradient.
        return pre > self.theta.detach() - self.bandwidth / 2

    def threshold_score(self, pre: Tensor) -> Tensor:
        """Distance of positive pre-activations above their thresholds."""
        return torch.where(pre > 0, pre - self.theta, 0)

    def activation(self, entries: Tensor, col: Tensor | None) -> Tensor:
        """The jump `a H(a - theta)`."""
        theta = self.theta if col is None else self.theta[col]
        return _Jump.apply(entries, theta, self.bandwidth, self.form == "tanh")

    def dense_form(self) -> DenseForm | None:
        """The jump."""
        if not self.encodes_as(JumpReLU):
            return None
        through = self.form == "tanh"
        return DenseForm("jump", scale=self.theta, width=self.bandwidth, through=through)

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The sparsity penalty of the form, and the term for dead latents."""
        if self.form == "tanh":
            return self._tanh_penalties(fwd, step)
        if fwd.counted is not None:
            return {"sparsity": self.coefficient(step) * fwd.counted / len(fwd.batch.x)}
        pattern = fwd.codes.pattern
        theta = self.theta.expand_as(fwd.active_pre) if pattern is None else self.theta[pattern.col]
        active = _Heaviside.apply(fwd.active_pre, theta, self.bandwidth)
        if fwd.mask is not None:
            # The zeros outside the support are no pre-activations, and would lie in the window of
            # a small theta.
            active = ops.masked(active, fwd.mask)
        return {"sparsity": self.coefficient(step) * active.sum() / len(fwd.batch.x)}

    def _tanh_penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The terms of `form=tanh`."""
        n_rows = len(fwd.batch.x)
        saturated = torch.tanh(self.tanh_scale * fwd.codes.values)
        terms = {"sparsity": self.coefficient(step) * saturated.sum() / n_rows}
        if self.pre_act_coeff and step.any_dead:
            if static.on():
                pre = self.all_pre_acts(fwd.batch.x, self.bias())
                below = torch.relu(self.theta - pre) * step.dead
            else:
                dead = step.dead.nonzero().squeeze(1)
                below = torch.relu(self.theta[dead] - self.some_pre_acts(fwd.batch.x, dead))
            terms["pre_act"] = self.pre_act_coeff * below.sum() / n_rows
        return terms

    def all_pre_acts(self, x: Tensor, bias: Tensor) -> Tensor:
        """Pre-activations (B, F) of rows (B, D) with a bias (F,), differentiable."""
        return nn.functional.linear(x, self.W_enc, bias)

    def some_pre_acts(self, x: Tensor, latents: Tensor) -> Tensor:
        """Pre-activations (B, n) of some latents (n,), differentiable."""
        return nn.functional.linear(x, self.W_enc[latents], self.bias()[latents])

    def after_step(self, fwd: Forward, step: Step) -> None:
        """Keep thresholds at 0 or above, lower those of dead latents, and steer lambda."""
        self.theta.data.clamp_min_(0)
        if self.melt < 1:
            self.theta.data.mul_(torch.where(step.dead, self.melt, 1.0))
        super().after_step(fwd, step)

    def inference(self) -> Inference:
        """A JumpReLU SAE in SAELens' terms."""
        # The final threshold is a shift: a - theta > threshold is a > theta + threshold.
        tensors = self.plain_tensors() | {"threshold": self.theta.detach() + self.threshold}
        return Inference("jumprelu", tensors, {"apply_b_dec_to_input": self.pre_bias})
