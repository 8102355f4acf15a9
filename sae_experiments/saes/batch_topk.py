"""BatchTopK: k latents per row on average, selected over the whole batch.

Bussmann et al. 2024, arXiv 2412.06410.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import selection, static
from sae_experiments.saes.base import SAE, Inference
from sae_experiments.saes.pattern import Pattern


class BatchTopK(SAE):
    """The `B k` largest positive pre-activations of a training batch are its code; loss of `TopK`.

    In eval mode one global threshold decides. It is calibrated on unseen rows, as the exact
    quantile that leaves k latents per row active. The usual moving average of each batch's smallest
    kept value lags behind the weights and misses the requested L0.

    Args:
        k: Active latents per row, on average.
        **kwargs: Further arguments of `SAE`.
    """

    support_is_rowwise = False
    always_sparse = True
    static_steps = True

    def __init__(self, *, k: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < k <= self.d_sae:
            raise UserError(f"sae.model.k={k} must be positive and at most d_sae={self.d_sae}")
        self.k = k
        # Last threshold by code and number of rows. It only makes the selection faster.
        self._guess: dict[tuple[str, int], float] = {}

    @property
    def fixed_l0(self) -> float | None:
        """The argument `k`."""
        return float(self.k)

    def support(self, pre: Tensor) -> Pattern | Tensor:
        """Selection over the batch in training, by the calibrated threshold in eval mode."""
        return self.largest(pre) if self.training else super().support(pre)

    def largest(self, pre: Tensor, code: str = "") -> Pattern:
        """Select the `B * budget()` largest positive entries.

        Args:
            pre: Pre-activations (B, F).
            code: Name of the code, for a variant that selects several with different thresholds.
        """
        if static.on():
            room = round(self.most() * len(pre))
            return static.batch_top_k(pre, room, self.budget_on_device(len(pre)))
        n = round(self.budget() * len(pre))
        key = (code, len(pre))
        pattern, self._guess[key] = selection.batch_top_k(pre, n, self._guess.get(key))
        return pattern

    def budget(self) -> float:
        """Active latents per row in training, on average."""
        return self.k

    def most(self) -> float:
        """The largest `budget()` of a fit: patterns of `static.shapes()` have room for it."""
        return self.budget()

    def budget_on_device(self, n_rows: int) -> Tensor | None:
        """Entries to select from so many rows, on the device; None for `most()` of each row."""
        return None

    def finish(self, phase: str, x: Tensor) -> None:
        """Calibrate the threshold to k on rows (N, D)."""
        self.calibrate_threshold(x, self.k)

    def inference(self) -> Inference:
        """A JumpReLU with the same threshold for all latents."""
        return self.as_jumprelu()
