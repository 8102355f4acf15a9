"""One level of a hierarchical SAE: a dictionary with a threshold and a steered L1 penalty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_experiments.saes import ops, static
from sae_experiments.saes.base import SAE, Batch, Codes
from sae_experiments.saes.pattern import Pattern
from sae_experiments.saes.standard import Standard

#: Bins of the histogram that brackets a quantile.
BINS = 4096


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` for matrices, as fast as `ops.fast_matmul` also in the backward pass."""
    return ops.decode(left, None, right)


class Level(Standard):
    """`z = a 1[a > theta]` with `a = W_enc (x - b_dec) + b_enc`, in training as in inference.

    The L1 coefficient is steered so that `aim` times the requested L0 is active; the threshold
    trims the rest. theta is 0 until it is calibrated at the end of a phase, and keeps its value
    through the next phase, so that a level that continues to learn starts from the sparsity at
    which it ended.

    Args:
        aim: L0 to steer at, as a multiple of the requested one.
        **kwargs: Further arguments of `Standard`.
    """

    def __init__(self, *, aim: float, **kwargs: Any) -> None:
        super().__init__(coeff=None, **kwargs)
        self.controller.aim = aim

    def support(self, pre: Tensor) -> Pattern | Tensor:
        return SAE.support(self, pre)

    @property
    def learns(self) -> bool:
        """True if the current phase trains the level."""
        return self.W_dec.requires_grad

    def dense(self, x: Tensor) -> Tensor:
        """The dense code (B, F) of rows (B, D), differentiable."""
        bias = self.bias()
        pre = self.encoder_matmul(x, bias)
        return ops.entries(x, self.W_enc, bias, pre, self.support(pre))

    def columns(self, x: Tensor, latents: Tensor) -> Tensor:
        """Differentiable pre-activations (B, n) of some latents (n,), for rows (B, D)."""
        return matmul(x, self.W_enc[latents].t()) + self.bias()[latents]

    def penalty(self, values: Tensor, ramp: Any) -> Tensor:
        """L1 penalty `lambda mean_B sum_j z_j`; decoder rows have length 1.

        Args:
            values: Dense code (B, F).
            ramp: Warm-up factor of lambda, in [0, 1]: a number or a scalar tensor.
        """
        if static.on():
            weight = (self.controller.coeff_on_device * ramp).to(values.dtype)
            return weight * values.sum() / len(values)
        return self.controller.coeff * ramp * values.sum() / len(values)

    def steer(self, code: Codes, warm: Any) -> None:
        """Adapt lambda to the code of a step, once the level has warmed up.

        Args:
            code: The level's code.
            warm: Whether it has: a boolean, or a scalar tensor.
        """
        if static.on():
            self.controller.update_on_device(code.l0_on_device, warm)
        elif warm:
            self.controller.update(code.l0)

    def normalise_decoder(self) -> None:
        """Scale decoder rows to length 1, unless the level is frozen: its bits must not change."""
        if self.learns:
            self.W_dec.data.div_(self.W_dec.data.norm(dim=1, keepdim=True).clamp_min_(1e-8))

    def calibrate(self, chunks: Callable[[], Iterable[Tensor]], rows: int) -> None:
        """Set the threshold at which the requested L0 is met.

        A very short fit can leave a level sparser than requested, with no positive entries to
        spare. Then the threshold is 0 and all biases rise by the same amount.

        Args:
            chunks: Gives the calibration rows, in blocks (B, D).
            rows: Number of calibration rows.
        """

        def pre_activations() -> Iterator[Tensor]:
            bias = self.bias()
            for chunk in chunks():
                yield self.encoder_matmul(chunk, bias)

        threshold = exact_threshold(pre_activations, round(rows * self.controller.target))
        self.threshold.fill_(max(threshold, 0.0))
        if threshold < 0:
            self.b_enc.data.sub_(threshold)


def exact_threshold(chunks: Callable[[], Iterable[Tensor]], n: int) -> float:
    """The value that exactly `n` entries lie above, if no entries are equal.

    A histogram brackets the quantile, and the entries within the bracket are sorted. Keeping the n
    largest entries instead would need memory for them, and at a sparsity of 70 % they are nearly a
    third of all.

    Args:
        chunks: Gives the entries in blocks of any shape, the same in every call.
        n: Number of entries above the value.

    Returns:
        The value; the largest entry if `n` is 0 or all entries are equal.
    """
    ends = [torch.stack(chunk.aminmax()) for chunk in chunks()]
    low = float(min(end[0] for end in ends))
    high = float(max(end[1] for end in ends))
    if n < 1 or not high > low:
        return high
    counts = torch.zeros(BINS, dtype=torch.int64)
    for chunk in chunks():
        counts += torch.histc(chunk, BINS, low, high).cpu().long()
    at_least = counts.flip(0).cumsum(0).flip(0)  # entries in each bin and the bins above it
    last_bin = int((at_least >= n).nonzero().max())
    # A margin of one bin on either side: histc rounds, and may count an entry on an edge next door.
    width = (high - low) / BINS
    bottom = low + width * (last_bin - 1)
    top = low + width * (last_bin + 2)
    inside = []
    above = 0
    for chunk in chunks():
        inside.append(chunk[(chunk > bottom) & (chunk <= top)])
        above += int(torch.count_nonzero(chunk > top))
    smallest = torch.cat(inside).sort(descending=True).values[n - above - 1]
    # The smallest of the n must stay active, and active means strictly above the threshold.
    return float(torch.nextafter(smallest, smallest.new_tensor(-torch.inf)))


class Joined(Codes):
    """The codes of several levels side by side, concatenated only where `values` is read.

    Args:
        parts: Dense codes (B, F_i) of the first levels.
        widths: F_i of all levels; a level without a code is all zeros.
    """

    def __init__(self, parts: list[Tensor], widths: list[int]) -> None:
        n_rows = len(parts[0])
        missing = [parts[0].new_zeros(n_rows, width) for width in widths[len(parts) :]]
        self.parts = [Codes(part) for part in [*parts, *missing]]
        self.pattern = None

    # Other codes store the values, and these are computed when they are read.
    @property
    def values(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Activations of all parts (B, F)."""
        return torch.cat([part.values for part in self.parts], 1)

    @property
    def fires(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.cat([part.fires for part in self.parts])

    @property
    def l0(self) -> float:
        return sum(part.l0 for part in self.parts)

    def detach(self) -> Joined:
        widths = [part.values.shape[1] for part in self.parts]
        return Joined([part.values.detach() for part in self.parts], widths)


class TrainingPass(NamedTuple):
    """One training pass of B rows through both levels, of m1 and m2 latents."""

    z: tuple[Tensor, Tensor]
    """Codes of the levels, (B, m1) and (B, m2)."""
    code: Tensor
    """The bottom's code u as the top reads it, in units of its scale, (B, m1)."""
    predicted: Tensor
    """The top's prediction v of it, (B, m1)."""
    gate: Tensor | None
    """The gate g (B, m1); None where it is always closed."""
    mixed: Tensor
    """The code (B, m1) that the bottom decodes."""


class StepOutcome(NamedTuple):
    """Detached results of a step, for the controllers and the record of the fit."""

    batch: Batch
    codes: Joined
    recon: Tensor
    """Reconstruction (B, D)."""
    gate: Tensor | None
    """The gate g (B, m1); None without a gate."""


class Controllers:
    """The controllers of all levels, as one controller for the fit.

    Args:
        levels: The levels, bottom first.
        shares: Share of the fit in which each level is trained first.
    """

    fixed = False

    def __init__(self, levels: Sequence[Level], shares: Sequence[float]) -> None:
        self.levels = levels
        self.shares = shares

    @property
    def coeff(self) -> float:
        """The L1 coefficient of the first level."""
        return self.levels[0].controller.coeff

    @property
    def horizon(self) -> int:
        """Number of steps of the fit; each level's controller counts those of its first phase."""
        return round(self.levels[0].controller.horizon / self.shares[0])

    @horizon.setter
    def horizon(self, steps: int) -> None:
        for level, share in zip(self.levels, self.shares, strict=True):
            level.controller.horizon = max(round(share * steps), 1)


def signed_directions(u: Tensor, n: int, seed: int) -> Tensor:
    """Directions of largest variance, each with both signs, and random ones if these are too few.

    Args:
        u: Rows (N, D).
        n: Number of directions.
        seed: Seed of the random directions.

    Returns:
        Unit rows (n, D).
    """
    centred = u - u.mean(0)
    half = torch.linalg.eigh(centred.t() @ centred).eigenvectors.flip(1).t()[: (n + 1) // 2]
    rows = torch.cat([half, -half])[:n]
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(n - len(rows), u.shape[1], generator=generator).to(rows)
    return torch.cat([rows, ops.unit_rows(random)])
