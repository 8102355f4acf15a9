"""A new SAE variant in a few lines, trained and saved without touching the package.

    python examples/new_variant.py

To sweep and compare it from the command line, give it a YAML file as well (see CONTRIBUTING.md).
"""

import torch
from torch import Tensor

from sae_experiments import evaluate, fit_saes
from sae_experiments.saes.base import SAE


class GroupMax(SAE):
    """Latents in groups of `group`; in each group the largest positive pre-activation is active."""

    def __init__(self, *, d_in: int, d_sae: int, group: int = 16) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, aux_coeff=1 / 32)
        self.group = group

    def support(self, pre: Tensor) -> Tensor:
        """The active entries of pre-activations (B, F), as a boolean mask."""
        grouped = pre.unflatten(1, (-1, self.group))
        largest = grouped == grouped.amax(2, keepdim=True)
        return largest.flatten(1) & (pre > 0)


def main(steps: int = 300) -> None:
    """Fit the variant to rows with eight active directions each."""
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(256, 64), dim=1)
    active = (torch.rand(40_000, 256) < 8 / 256).float()
    rows = (active * (1 + 0.2 * torch.randn(40_000, 256))) @ directions
    sae = GroupMax(d_in=64, d_sae=256)
    fit_saes(sae, rows[:36_000], steps=steps, batch_size=1024, lr=3e-3)
    scores = evaluate(sae, rows[36_000:])
    print(f"FVU {scores['sae_fvu']:.3f} at L0 {scores['sae_l0']:.1f}")


if __name__ == "__main__":
    main()
