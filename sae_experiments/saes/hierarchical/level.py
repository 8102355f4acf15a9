"""One level of a hierarchical SAE: a dictionary with a threshold, a steered L1 penalty and an exact calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.saes import ops
from sae_experiments.saes.base import SAE, Batch, Codes
from sae_experiments.saes.standard import Standard

#: Bins of the histogram that brackets a quantile.
BINS = 4096


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` for matrices, at the speed of the fast products also in the backward pass."""
    return ops.decode(left, None, right)


class Level(Standard):
    """``z = a 1[a > theta]`` with ``a = W_enc (x - b_dec) + b_enc``, also in training; the L1 coefficient follows the L0 that was asked for.

    theta is 0 until it is calibrated at the end of a phase and stays as it is through the next, so that a level that goes on learning
    starts from the sparsity it ended with. ``aim`` times the L0 that is asked for is steered at, the threshold trims the rest.
    """

    def __init__(self, *, aim: float, **kwargs: Any) -> None:
        super().__init__(coeff=None, **kwargs)
        self.controller.aim = aim

    def support(self, pre: Tensor) -> Tensor:
        return SAE.support(self, pre)

    @property
    def learns(self) -> bool:
        """Whether this phase trains the level."""
        return self.W_dec.requires_grad

    def dense(self, x: Tensor) -> Tensor:
        """The dense code (B, F), differentiable."""
        bias = self.bias()
        pre = self.encoder_matmul(x, bias)
        return ops.entries(x, self.W_enc, bias, pre, self.support(pre))

    def columns(self, x: Tensor, latents: Tensor) -> Tensor:
        """Differentiable pre-activations of a few latents, (B, n)."""
        return matmul(x, self.W_enc[latents].t()) + self.bias()[latents]

    def penalty(self, values: Tensor, ramp: float) -> Tensor:
        """``lambda mean_B sum_j z_j`` of a dense code; decoder rows have length 1."""
        return self.controller.coeff * ramp * values.sum() / len(values)

    def settle(self) -> None:
        """Renormalise the decoder, unless the level is frozen: a frozen level keeps its very bits."""
        if self.learns:
            self.W_dec.data.div_(self.W_dec.data.norm(dim=1, keepdim=True).clamp_min_(1e-8))

    def calibrate(self, chunks: Callable[[], Iterable[Tensor]], rows: int) -> None:
        """Set the threshold so that the target L0 is met on the ``rows`` rows of ``chunks()`` (B, D).

        A level that steering left too sparse (in a very short fit) has no positive entries to spare: its biases rise by one number instead.
        """

        def strengths() -> Iterator[Tensor]:
            bias = self.bias()
            for chunk in chunks():
                yield self.encoder_matmul(chunk, bias)

        wanted = exact_threshold(strengths, round(rows * self.controller.target))
        self.threshold.fill_(max(wanted, 0.0))
        if wanted < 0:
            self.b_enc.data.sub_(wanted)


def exact_threshold(chunks: Callable[[], Iterable[Tensor]], n: int) -> float:
    """The value that exactly ``n`` entries of ``chunks()`` lie above (ties aside); the largest entry for n = 0, or where all are equal.

    A histogram brackets the quantile, then the entries within its bin are sorted. Unlike keeping the n largest this needs no memory for them,
    and at a sparsity of 70 % they are nearly a third of all.
    """
    ends = [torch.stack(c.aminmax()) for c in chunks()]
    low, high = float(min(e[0] for e in ends)), float(max(e[1] for e in ends))
    if n < 1 or not high > low:
        return high
    counts = torch.zeros(BINS, dtype=torch.int64)
    for chunk in chunks():
        counts += torch.histc(chunk, BINS, low, high).cpu().long()
    place = int(
        (counts.flip(0).cumsum(0).flip(0) >= n).nonzero().max()
    )  # the last bin with n entries in it and above
    # A margin of one bin either side: histc rounds, and an entry on an edge may be counted next door.
    width = (high - low) / BINS
    bottom, top = low + width * (place - 1), low + width * (place + 2)
    inside, higher = [], 0
    for chunk in chunks():
        inside.append(chunk[(chunk > bottom) & (chunk <= top)])
        higher += int(torch.count_nonzero(chunk > top))
    least = torch.cat(inside).sort(descending=True).values[n - higher - 1]
    # The least of the n largest must stay active, and active means strictly above the threshold.
    return float(torch.nextafter(least, least.new_tensor(-torch.inf)))


class Joined(Codes):
    """The codes of several levels side by side, without copying them into one matrix until somebody asks."""

    def __init__(self, parts: list[Tensor], widths: list[int]) -> None:
        empty = [
            parts[0].new_zeros(len(parts[0]), w) if i >= len(parts) else parts[i]
            for i, w in enumerate(widths)
        ]
        self.parts = [Codes(p) for p in empty]
        self.pattern = None

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return torch.cat([p.values for p in self.parts], 1)

    @property
    def fires(self) -> Tensor:  # type: ignore[override]
        return torch.cat([p.fires for p in self.parts])

    @property
    def l0(self) -> float:
        return sum(p.l0 for p in self.parts)

    def detach(self) -> Joined:
        return Joined(
            [p.values.detach() for p in self.parts], [p.values.shape[1] for p in self.parts]
        )


class Passed(NamedTuple):
    """One training pass through both levels: their codes, and what the top says about the bottom's."""

    z: tuple[Tensor, Tensor]
    code: Tensor  # u, the bottom code as the top reads it (B, m1)
    predicted: Tensor  # v, what the top says it is
    gate: Tensor | None
    mixed: Tensor


class Seen(NamedTuple):
    """What a step leaves for the controllers and the record, detached; ``gate`` (B, m1) is None where there was none."""

    batch: Batch
    codes: Joined
    recon: Tensor
    gate: Tensor | None


class Weights(NamedTuple):
    """Weights of the loss terms; every term is free of units. Names as in ``conf/sae/hierarchical.yaml``."""

    top: float
    bottom: float
    code: float
    orthogonality: float
    mutual_information: float
    gate: float
    anchor: float

    @staticmethod
    def checked(given: dict[str, float]) -> Weights:
        """From a mapping of exactly these names to numbers that are not negative."""
        if unknown := set(given) ^ set(Weights._fields):
            raise UserError(
                f"sae.model.weights: {', '.join(sorted(unknown))} is missing or unknown; the terms are {', '.join(Weights._fields)}"
            )
        for name, value in given.items():
            if not value >= 0:
                raise UserError(f"sae.model.weights.{name}={value} must not be negative")
        return Weights(**given)


class Controllers:
    """What the fit sets on an SAE's controller, for those of both levels."""

    fixed = False

    def __init__(self, levels: Sequence[Level], shares: Sequence[float]) -> None:
        self.levels, self.shares = levels, shares

    @property
    def coeff(self) -> float:
        """The coefficient of the first level."""
        return self.levels[0].controller.coeff

    @property
    def horizon(self) -> int:
        """Steps of the whole fit; a level's controller works on the scale of the phase that trains it first."""
        return round(self.levels[0].controller.horizon / self.shares[0])

    @horizon.setter
    def horizon(self, steps: int) -> None:
        for level, share in zip(self.levels, self.shares, strict=True):
            level.controller.horizon = max(round(share * steps), 1)


def widths_of(
    d_in: int, d_sae: int, d_out: int | None, top_frac: float, levels: str
) -> tuple[int, ...]:
    """Latents of the bottom and (unless ``levels`` is "bottom") of the top. Raises :class:`UserError` for sizes that cannot work."""
    if levels not in ("both", "bottom", "top"):
        raise UserError(f"sae.model.levels={levels!r} is not one of both, bottom, top")
    for name, value in (("d_in", d_in), ("d_sae", d_sae)):
        if value < 1:
            raise UserError(f"sae: {name}={value} must be at least 1")
    if d_out not in (None, d_in):
        raise UserError(
            f"sae: a hierarchical SAE rebuilds what it reads: d_in={d_in} and d_out={d_out} must be equal"
        )
    if not 0 < top_frac < 1 or not 1 <= round(top_frac * d_sae) < d_sae:
        raise UserError(
            f"sae.model.top_frac={top_frac} leaves a level without latents at d_sae={d_sae}"
        )
    m2 = round(top_frac * d_sae)
    return (d_sae - m2,) if levels == "bottom" else (d_sae - m2, m2)


def active_of(
    widths: Sequence[int], sparsity: Sequence[float], target_l0: float | None
) -> list[float]:
    """Active latents asked for in each level."""
    if len(sparsity) != 2 or not all(0 < s < 1 for s in sparsity):
        raise UserError(f"sae.model.sparsity={list(sparsity)} must be two numbers between 0 and 1")
    active = [(1 - s) * m for s, m in zip(sparsity, widths, strict=False)]
    if target_l0 is None:
        return active
    if not target_l0 > 0 or any(
        a * target_l0 / sum(active) >= m for a, m in zip(active, widths, strict=True)
    ):
        raise UserError(
            f"sae.target_l0={target_l0} cannot be met by levels of {', '.join(map(str, widths))} latents at sparsity={list(sparsity)}"
        )
    return [a * target_l0 / sum(active) for a in active]


def signed_directions(u: Tensor, n: int, seed: int) -> Tensor:
    """``n`` unit rows: the directions of largest variance of rows (N, D), each with both signs; random ones where these do not suffice."""
    centred = u - u.mean(0)
    half = torch.linalg.eigh(centred.t() @ centred).eigenvectors.flip(1).t()[: (n + 1) // 2]
    rows = torch.cat([half, -half])[:n]
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [rows, ops.unit_rows(torch.randn(n - len(rows), u.shape[1], generator=generator).to(rows))]
    )
