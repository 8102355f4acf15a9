"""Crosscoder: one code for several sites at once (Lindsey et al. 2024, "Sparse Crosscoders")."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes.base import Inference, NotExportable
from sae_experiments.saes.standard import Standard


class Crosscoder(Standard):
    """`z = ReLU(sum_l W_enc_l x_l + b_enc)`, `xhat_l = W_dec_l^T z + b_l` for L sites.

    The sites lie side by side in x (B, L d). The loss is

        sum_l ||x_l - xhat_l||^2 + lambda mean_B sum_j z_j sum_l ||d_{l,j}||

    with a free decoder. The sum of norms, unlike the norm of the whole row, lets a latent live in a
    few of the sites. Every site is centred and scaled by itself.

    Args:
        n_sites: Number of sites L.
        start_norm: Length of the part of a decoder row for one site, at the start.
        **kwargs: Further arguments of `Standard`.
    """

    static_steps = True
    default_lr_factor = 1.0

    def __init__(self, *, n_sites: int, start_norm: float, **kwargs: Any) -> None:
        super().__init__(norm_weighted=True, **kwargs)
        if self.d_in % n_sites or self.d_out != self.d_in:
            raise UserError(
                f"sae.read must name {n_sites} sites of equal width (d_in={self.d_in}), "
                "and sae.write must be null"
            )
        self.n_sites = n_sites
        # Rows of a norm-weighted SAE start at length 0.1; here the length is given per site.
        self.W_dec.data.mul_(start_norm * n_sites**0.5 / 0.1)
        self.W_enc.data.mul_(start_norm * n_sites**0.5 / 0.1)

    def row_norms(self) -> Tensor:
        """`sum_l ||d_{l,j}||`, (F,)."""
        return self.W_dec.view(self.d_sae, self.n_sites, -1).norm(dim=2).sum(1)

    def inference(self) -> Inference:
        """Not exportable: SAELens has no crosscoders."""
        raise NotExportable("crosscoders have no counterpart in SAELens' format")
