"""BatchTopK: k latents a row on average, chosen over the whole batch (Bussmann et al. 2024, arXiv 2412.06410)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import selection
from sae_experiments.saes.base import SAE, Inference
from sae_experiments.saes.selection import Pattern


class BatchTopK(SAE):
    """In training the ``B k`` largest positive pre-activations of the batch are the code; loss as TopK's.

    In eval mode one global threshold decides, calibrated on unseen rows as the exact quantile that leaves k active a row: a moving
    average of the batches' smallest kept value, the usual choice, lags and misses the asked-for L0.
    """

    rowwise = False

    def __init__(self, *, k: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < k <= self.d_sae:
            raise UserError(f"sae.model.k={k} must be positive and at most d_sae={self.d_sae}")
        self.k = k
        self._guess: dict[
            tuple[str, int], float
        ] = {}  # by code and number of rows; speeds the selection up, never changes it

    @property
    def asked_l0(self) -> float | None:
        return float(self.k)

    def support(self, pre: Tensor) -> Pattern | Tensor:
        if not self.training:
            return super().support(pre)
        return self.largest(pre)

    def largest(self, pre: Tensor, code: str = "") -> Pattern:
        """The ``B budget`` largest positive entries of (B, F); ``code`` tells selections apart that have thresholds of their own."""
        key = code, len(pre)
        pattern, self._guess[key] = selection.batch_top_k(
            pre, round(self.budget() * len(pre)), self._guess.get(key)
        )
        return pattern

    def budget(self) -> float:
        """Active latents a row in training, on average."""
        return self.k

    def finish(self, phase: str, x: Tensor) -> None:
        self.calibrate_threshold(x, self.k)

    def inference(self) -> Inference:
        return self.as_jumprelu()
