"""The standard SAE: ReLU and an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import controller as sparsity
from sae_experiments.saes.base import SAE, Forward, Inference, Step
from sae_experiments.saes.controller import L0Controller
from sae_experiments.sampling import spread_rows


class Standard(SAE):
    """``z = ReLU(W_enc (x - b_dec) + b_enc)``; loss ``||x - xhat||^2 + lambda(t) mean_B sum_j z_j`` with unit-norm decoder rows.

    ``norm_weighted``: the April 2024 form, ``lambda mean_B sum_j z_j ||d_j||`` with a free decoder (gradient flows into the norms).
    lambda warms up over ``warmup`` of the run. It is ``coeff`` where that is given, else steered so that ``target_l0`` latents are active;
    the final threshold makes that exact.

    ``start_l0``: biases start where every latent fires equally often and ``start_l0 * target_l0`` are active (None: biases start at 0, where
    a third of all latents is active and the first steps are dense).
    """

    def __init__(
        self,
        *,
        target_l0: float,
        coeff: float | None,
        start_coeff: float,
        warmup: float,
        start_l0: float | None,
        norm_weighted: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(unit_decoder=not norm_weighted, **kwargs)
        if start_l0 is not None and not start_l0 > 0:
            raise UserError(f"sae.model.start_l0={start_l0} must be positive, or null")
        self.norm_weighted, self.warmup, self.start_l0 = norm_weighted, warmup, start_l0
        self.controller = L0Controller(target=target_l0, coeff=coeff, start=start_coeff)
        if norm_weighted:
            self.W_dec.data.mul_(0.1)
            self.W_enc.data.mul_(0.1)

    @property
    def asked_l0(self) -> float | None:
        return None if self.controller.fixed else float(self.controller.target)

    @torch.no_grad()
    def begin(self, phase: str, x: Tensor, y: Tensor) -> None:
        super().begin(phase, x, y)
        if self.start_l0 is None:
            return
        rows = spread_rows(x, 8192)
        kept = max(
            round(min(self.start_l0 * self.controller.target / self.d_sae, 1.0) * len(rows)), 1
        )
        rows, levels = self.encoder_input(rows), []
        for weight, bias in zip(
            self.W_enc.split(256), self.bias().split(256), strict=True
        ):  # all latents at once would be the peak of training
            levels.append(torch.addmm(bias, rows, weight.t()).t().topk(kept, dim=1).values[:, -1])
        self.b_enc.data.sub_(torch.cat(levels))

    def support(self, pre: Tensor) -> Tensor:
        return pre > 0 if self.training else super().support(pre)

    def coefficient(self, step: Step) -> float:
        """The penalty's weight at this moment."""
        return self.controller.coeff * sparsity.ramp(step.progress, self.warmup)

    def row_norms(self) -> Tensor:
        """What a latent's activity is weighted with in the norm-weighted penalty, (F,)."""
        return self.W_dec.norm(dim=1)

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        values, pattern = fwd.codes
        if self.norm_weighted:
            norms = self.row_norms()
            values = values * (norms if pattern is None else norms[pattern.col])
        return {"sparsity": self.coefficient(step) * values.sum() / len(fwd.batch.x)}

    def after_step(self, fwd: Forward, step: Step) -> None:
        if step.progress >= self.warmup:
            self.controller.update(fwd.codes.l0)

    def finish(self, phase: str, x: Tensor) -> None:
        if not self.controller.fixed:
            self.calibrate_threshold(x, self.controller.target)

    def inference(self) -> Inference:
        return (
            self.as_jumprelu()
            if self.threshold > 0
            else Inference(
                "standard", self.plain_tensors(), {"apply_b_dec_to_input": self.pre_bias}
            )
        )
