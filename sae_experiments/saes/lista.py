"""LISTA-Matryoshka: one refinement step of the code (after Chanin 2026; Gregor and LeCun 2010)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import ops
from sae_experiments.saes.base import Inference, NotExportable
from sae_experiments.saes.matryoshka import Matryoshka
from sae_experiments.saes.pattern import Pattern


class Lista(Matryoshka):
    """Matryoshka with a code refined once:

        a0 = W_enc (x - b) + b_enc,  z0 = BatchTopK(a0)
        a1 = a0 + eta W_enc (x - b - W_dec^T z0),  z = BatchTopK(a1)

    a1 is the plain encoder at `b + (1 + eta)(x - b) - eta W_dec^T z0`, so the refinement only
    changes the input of the encoder. In eval mode each of the two codes has its own calibrated
    threshold. The reconstruction is compared with x itself; the published code compares it with
    the centred input.

    Args:
        eta: Size of the refinement step.
        **kwargs: Further arguments of `Matryoshka`.
    """

    same_units = True
    static_steps = True

    first_threshold: Tensor

    def __init__(self, *, eta: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if eta < 0:
            raise UserError(f"sae.model.eta={eta} must not be negative")
        self.eta = eta
        self.register_buffer("first_threshold", torch.zeros(()))
        self._refining = True

    def encoder_input(self, x: Tensor) -> Tensor:
        """The rows whose plain pre-activations are a1."""
        if not self._refining or not self.eta:
            return x
        centred = self.shifted(x)
        pre = self.encoder_matmul(centred, self.b_enc)
        if self.training:
            pattern = self.largest(pre, "first")
        else:
            pattern = Pattern.from_mask(pre > self.first_threshold)
        found = pre
        if ops.rounds(self.W_enc):
            found = ops.exact_entries(pattern, centred, self.W_enc, self.b_enc)
        values = ops.entries(centred, self.W_enc, self.b_enc, found, pattern)
        values = pattern.weighted(values)
        return x + self.eta * (centred - ops.decode(values, pattern, self.W_dec))

    def finish(self, phase: str, x: Tensor) -> None:
        """Calibrate the threshold of the first code, then that of the refined one."""
        self._refining = False
        super().finish(phase, x)
        self.first_threshold.copy_(self.threshold)
        self._refining = True
        was_training = self.training
        self.eval()
        self.calibrate_threshold(x, self.k)
        self.train(was_training)

    def inference(self) -> Inference:
        """Not exportable: SAELens has no refined encoders."""
        raise NotExportable("a refined encoder has no counterpart in SAELens' format")
