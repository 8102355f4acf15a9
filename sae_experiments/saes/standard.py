"""The standard SAE: ReLU and an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import controller as sparsity
from sae_experiments.saes import static
from sae_experiments.saes.base import SAE, Forward, Inference, Step
from sae_experiments.saes.controller import L0Controller
from sae_experiments.saes.pattern import Pattern
from sae_experiments.saes.types import DenseForm
from sae_experiments.sampling import spread_rows


class Standard(SAE):
    """`z = ReLU(W_enc (x - b_dec) + b_enc)` with an L1 penalty:

        ||x - xhat||^2 + lambda(t) mean_B sum_j z_j

    Decoder rows have length 1. lambda is fixed to `coeff`, or steered so that `target_l0` latents
    are active; the final threshold makes that L0 exact.

    Args:
        target_l0: Requested active latents per row.
        coeff: Fixed lambda. None: steer it.
        start_coeff: lambda where steering starts.
        warmup_frac: Share of the run over which lambda warms up.
        start_l0: Biases start where every latent is active equally often and
            `start_l0 * target_l0` are active per row. None: biases start at 0, where a third of all
            latents is active and the first steps are dense.
        norm_weighted: Use the form of April 2024, `lambda mean_B sum_j z_j ||d_j||` with a free
            decoder. The gradient flows into the norms.
        lift: Rise of the bias of a dead latent per step, on inputs of unit mean square; 0 leaves
            it to AuxK.
        **kwargs: Further arguments of `SAE`.
    """

    static_steps = True
    # Latents do not compete for places: twice the rate that top-k codes stand, on most rows.
    default_lr_factor = 2.0

    controller: L0Controller

    def __init__(
        self,
        *,
        target_l0: float,
        coeff: float | None,
        start_coeff: float,
        warmup_frac: float,
        start_l0: float | None,
        norm_weighted: bool = False,
        lift: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(unit_decoder=not norm_weighted, **kwargs)
        if start_l0 is not None and not start_l0 > 0:
            raise UserError(f"sae.model.start_l0={start_l0} must be positive, or null")
        if not lift >= 0:
            raise UserError(f"sae.model.lift={lift} must not be negative")
        self.lift = lift
        self.norm_weighted = norm_weighted
        self.warmup_frac = warmup_frac
        self.start_l0 = start_l0
        # Of a narrower type than in the base class, and assigned here alone.
        steered = L0Controller(target=target_l0, coeff=coeff, start=start_coeff)
        self.controller = steered  # pyright: ignore[reportIncompatibleVariableOverride]
        if norm_weighted:
            self.W_dec.data.mul_(0.1)
            self.W_enc.data.mul_(0.1)

    @property
    def fixed_l0(self) -> float | None:
        """The argument `target_l0`; None for a fixed coefficient."""
        return None if self.controller.fixed else float(self.controller.target)

    @torch.no_grad()
    def begin(self, phase: str, x: Tensor, y: Tensor) -> None:
        """Initialise from data: `b_dec`, and biases at which `start_l0 * target_l0` are active."""
        super().begin(phase, x, y)
        if self.start_l0 is None:
            return
        rows = spread_rows(x, 8192)
        active_share = min(self.start_l0 * self.controller.target / self.d_sae, 1.0)
        n_active = max(round(active_share * len(rows)), 1)  # rows on which each latent is active
        rows = self.encoder_input(rows)
        levels = []
        # All latents at once would be the peak of the memory that training takes.
        for weight, bias in zip(self.W_enc.split(256), self.bias().split(256), strict=True):
            pre = torch.addmm(bias, rows, weight.t()).t()
            levels.append(pre.topk(n_active, dim=1).values[:, -1])
        self.b_enc.data.sub_(torch.cat(levels))

    def support(self, pre: Tensor) -> Pattern | Tensor:
        """Positive entries in training, by the calibrated threshold in eval mode."""
        return pre > 0 if self.training else super().support(pre)

    def dense_form(self) -> DenseForm | None:
        """ReLU."""
        return DenseForm("relu") if self.encodes_as(Standard) else None

    def coefficient(self, step: Step) -> Any:
        """Current weight of the penalty, a number or within `static.shapes()` a scalar tensor."""
        warmup = sparsity.ramp(step.progress, self.warmup_frac)
        if static.on():
            return (self.controller.coeff_on_device * warmup).to(self.b_enc.dtype)
        return self.controller.coeff * warmup

    def row_norms(self) -> Tensor:
        """Weights (F,) of the latents in the norm-weighted penalty."""
        return self.W_dec.norm(dim=1)

    def penalties(self, fwd: Forward, step: Step) -> dict[str, Tensor]:
        """The L1 penalty."""
        values, pattern = fwd.codes
        if self.norm_weighted:
            norms = self.row_norms()
            total = (values * (norms if pattern is None else norms[pattern.col])).sum()
        else:
            total = values.sum() if fwd.counted is None else fwd.counted
        return {"sparsity": self.coefficient(step) * total / len(fwd.batch.x)}

    def lifted(self) -> Tensor:
        """Biases (F,) that rise while their latents are dead."""
        return self.b_enc

    def after_step(self, fwd: Forward, step: Step) -> None:
        """Raise the biases of dead latents, and steer lambda once it has warmed up."""
        if self.lift:
            self.lifted().data.add_(step.dead.to(self.b_enc.dtype), alpha=self.lift)
        warm = step.progress >= self.warmup_frac
        if static.on():
            self.controller.update_on_device(fwd.codes.l0_on_device, warm)
        elif warm:
            self.controller.update(fwd.codes.l0)

    def finish(self, phase: str, x: Tensor) -> None:
        """Calibrate the threshold to `target_l0` on rows (N, D), unless lambda is fixed."""
        if not self.controller.fixed:
            self.calibrate_threshold(x, self.controller.target)

    def inference(self) -> Inference:
        """A JumpReLU with one threshold for all latents, or a standard SAE without a threshold."""
        if self.threshold > 0:
            return self.as_jumprelu()
        config = {"apply_b_dec_to_input": self.pre_bias}
        return Inference("standard", self.plain_tensors(), config)
