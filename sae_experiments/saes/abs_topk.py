"""AbsTopK: the k largest pre-activations by absolute value, with their sign.

Zhu et al. 2025, arXiv 2510.00404.
"""

from __future__ import annotations

from torch import Tensor

from sae_experiments.saes.base import Inference, NotExportable
from sae_experiments.saes.pattern import Pattern
from sae_experiments.saes.topk import TopK


class AbsTopK(TopK):
    """`z_j = a_j` for the k largest `|a_j|` of a row, 0 elsewhere; loss of `TopK`.

    One latent represents both poles of a direction.
    """

    static_steps = True

    def support(self, pre: Tensor) -> Pattern:
        """The k largest absolute values of every row."""
        return super().support(pre.abs())

    def activation(self, entries: Tensor, col: Tensor | None) -> Tensor:
        """The identity: codes keep their sign."""
        return entries

    def inference(self) -> Inference:
        """Not exportable: SAELens has no signed codes."""
        raise NotExportable("signed codes have no counterpart in SAELens' format")
