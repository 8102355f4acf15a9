"""Settings of a hierarchical SAE, with their checks and the sizes that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sae_experiments.errors import UserError


class LossWeights(NamedTuple):
    """Weights of the loss terms, which are all free of units."""

    top: float
    """Reconstruction with the gate closed, from the top alone."""
    bottom: float
    """Reconstruction with the gate open, from the bottom alone; in the last phase only."""
    code: float
    """Relative squared error of the top's prediction of the bottom's code."""
    orthogonality: float
    """Coherence of the levels' directions."""
    mutual_information: float
    """Mutual information of the levels' latents."""
    gate: float
    """Mean opening of the gate over active bottom latents."""
    anchor: float
    """Turning of the bottom's decoder rows in the last phase."""

    @classmethod
    def checked(cls, given: Mapping[str, float]) -> LossWeights:
        """Weights from a mapping of exactly these names to numbers of at least 0."""
        unknown = set(given) ^ set(cls._fields)
        if unknown:
            raise UserError(
                f"sae.model.weights: {', '.join(sorted(unknown))} is missing or unknown; "
                f"the terms are {', '.join(cls._fields)}"
            )
        for name, value in given.items():
            if not value >= 0:
                raise UserError(f"sae.model.weights.{name}={value} must not be negative")
        return cls(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a hierarchical SAE beside its size: the keys of `conf/sae/hierarchical.yaml`."""

    sparsity: Sequence[float]
    """Share of each row's latents that are zero: of the bottom, of the top."""
    top_frac: float
    """Share of all latents that form the top level."""
    levels: str
    """Levels of the reconstruction: `both`; `bottom`, without a top; `top`, with a closed gate."""
    phase_fracs: Sequence[float]
    """Share of the steps in each of the three phases."""
    rank: int
    """Rank of the gate's matrix A B."""
    gate_bias: float
    """Bias b of the gate at the start."""
    drop_bottom: float
    """Share of the training rows with g = 0, from the top alone."""
    drop_top: float
    """Share of the training rows with g = 1, from the bottom alone."""
    rows: int | None
    """Rows of a batch that the last two phases use, spread over it; None: all."""
    bottom_lr: float
    """Learning rate of the bottom in the last phase, as a multiple of the top's."""
    weights: Mapping[str, float]
    """Weights of the loss terms, see `LossWeights`."""
    information: Mapping[str, Any]
    """Sizes of the mutual information term, see `Information`."""
    coherence: Mapping[str, Any]
    """Sizes of the coherence term, see `Coherence`."""
    aim: float
    """L0 that each level's L1 penalty steers at, as a multiple of the requested one."""
    start_coeff: Sequence[float]
    """L1 coefficient of each level at which steering starts."""
    start_l0: float | None
    """Active latents of a level at the start of its phase, as a multiple of the requested ones."""
    warmup_frac: float
    """Share of a level's first phase over which its L1 coefficient warms up."""

    def __post_init__(self) -> None:
        shares = list(self.phase_fracs)
        if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise UserError(
                f"sae.model.phase_fracs={shares} must be three positive numbers that sum to 1"
            )
        starts = list(self.start_coeff)
        if len(starts) != 2 or min(starts) < 0:
            raise UserError(
                f"sae.model.start_coeff={starts} must be two numbers of at least 0: bottom, top"
            )
        dropped = self.drop_bottom + self.drop_top
        if self.drop_bottom < 0 or self.drop_top < 0 or dropped > 1:
            raise UserError(
                f"sae.model: drop_bottom={self.drop_bottom} and drop_top={self.drop_top} "
                "must not be negative nor sum to more than 1"
            )
        if self.rank < 1 or (self.rows is not None and self.rows < 1):
            raise UserError(f"sae.model: rank={self.rank} and rows={self.rows} must be at least 1")


def level_widths(
    d_in: int, d_sae: int, d_out: int | None, top_frac: float, levels: str
) -> tuple[int, ...]:
    """Number of latents of the bottom and, unless `levels` is "bottom", of the top.

    Raises:
        UserError: The sizes are invalid.
    """
    if levels not in ("both", "bottom", "top"):
        raise UserError(f"sae.model.levels={levels!r} is not one of both, bottom, top")
    for name, value in (("d_in", d_in), ("d_sae", d_sae)):
        if value < 1:
            raise UserError(f"sae: {name}={value} must be at least 1")
    if d_out not in (None, d_in):
        raise UserError(
            "sae: a hierarchical SAE rebuilds what it reads: "
            f"d_in={d_in} and d_out={d_out} must be equal"
        )
    n_top = round(top_frac * d_sae)
    if not 0 < top_frac < 1 or not 1 <= n_top < d_sae:
        raise UserError(
            f"sae.model.top_frac={top_frac} leaves a level without latents at d_sae={d_sae}"
        )
    n_bottom = d_sae - n_top
    return (n_bottom,) if levels == "bottom" else (n_bottom, n_top)


def level_l0s(
    widths: Sequence[int], sparsity: Sequence[float], target_l0: float | None
) -> list[float]:
    """Requested active latents per row of each level.

    Args:
        widths: Number of latents of each level.
        sparsity: Share of the latents that are zero, of the bottom and of the top.
        target_l0: Active latents of all levels together, to which the numbers that follow from
            `sparsity` are scaled. None: not scaled.

    Raises:
        UserError: A level would have to be active in full, or not at all.
    """
    if len(sparsity) != 2 or not all(0 < share < 1 for share in sparsity):
        raise UserError(f"sae.model.sparsity={list(sparsity)} must be two numbers between 0 and 1")
    active = [(1 - share) * width for share, width in zip(sparsity, widths, strict=False)]
    if target_l0 is None:
        return active
    scaled = [l0 * target_l0 / sum(active) for l0 in active]
    full = any(l0 >= width for l0, width in zip(scaled, widths, strict=True))
    if not target_l0 > 0 or full:
        raise UserError(
            f"sae.target_l0={target_l0} cannot be met by levels of {', '.join(map(str, widths))} "
            f"latents at sparsity={list(sparsity)}"
        )
    return scaled
