"""Random dictionaries, the sanity check of every table.

Korznikov et al. 2026, arXiv 2602.14111; Heap et al. 2025.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes.batch_topk import BatchTopK
from sae_experiments.sampling import spread_rows
from sae_experiments.training.loop import Group, Phase


class Random(BatchTopK):
    """BatchTopK with a random decoder that is never trained.

    Args:
        learn: `nothing`: the encoder is the transpose of the decoder, times the one factor that
            fits the calibration rows best. `encoder`: the encoder and both biases are trained
            against the frozen random decoder.
        **kwargs: Further arguments of `BatchTopK`.
    """

    static_steps = True

    def __init__(self, *, learn: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if learn not in ("nothing", "encoder"):
            raise UserError(f"sae.model.learn={learn!r} is not one of nothing, encoder")
        self.learn = learn

    def phases(self) -> list[Phase]:
        """One phase, over the encoder and the biases or over nothing."""
        groups = []
        if self.learn == "encoder":
            groups = [Group([self.W_enc, self.b_enc, self.b_dec])]
        return [Phase("train", 1.0, groups)]

    def finish(self, phase: str, x: Tensor) -> None:
        """Calibrate the threshold; scale an untrained encoder to the rows (N, D)."""
        super().finish(phase, x)
        if self.learn != "nothing":
            return
        was_training = self.training
        self.eval()
        rows = spread_rows(x, 8192)
        target = rows - self.b_dec
        recon = self(rows) - self.b_dec
        self.train(was_training)
        factor = (target * recon).sum() / recon.square().sum().clamp_min(1e-12)
        for t in (self.W_enc.data, self.b_enc.data, self.threshold):
            t.mul_(factor)
