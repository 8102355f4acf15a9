"""Change of a code when its input is perturbed: entry by entry, or as dense matrices.

Shape letters: B rows, D `d_in`, F `d_sae`, n entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sae_experiments.saes import static
from sae_experiments.saes.base import Codes
from sae_experiments.saes.pattern import Pattern


class Answer(NamedTuple):
    """Codes of some rows of a batch before and after a perturbation."""

    rows: Tensor
    """Rows of the batch, (n,)."""
    x: Tensor
    """The perturbed rows, (n, D)."""
    before: Codes
    """Codes of the clean rows."""
    after: Codes
    """Codes of the perturbed rows."""
    latents: Tensor
    """Targets (m,) of the last m rows, moved along their decoder rows; -1: not moved."""
    sign: Tensor
    """Direction (m,) of that step, -1.0, 0.0 or 1.0."""


class Change(Protocol):
    """Change of a code, value after minus value before, for every entry active in either."""

    def detach(self) -> Change:
        """The same change without its graph."""
        ...

    def row_squares(self, n_rows: int) -> Tensor:
        """Squared length (n_rows,) of the change of each of the first rows.

        Args:
            n_rows: Rows to use, from the first on.
        """
        ...

    def total_square(self, n_rows: int) -> Tensor:
        """Sum of the squared changes of the first rows, a scalar."""
        ...

    def moved(self) -> Tensor:
        """Sum of the absolute changes of each latent, (F,), in float32 or float64."""
        ...

    def masses(self) -> Tensor:
        """Sum of `|before| + |after|` of each latent, (F,), in float32 or float64."""
        ...

    def jaccard(self) -> Tensor:
        """Mean over rows of |S and S~| / |S or S~|, a scalar; 1 if no row has an active latent.

        Rows without an active latent do not count.
        """
        ...

    def crosstalk(self, answer: Answer, reach: Tensor, sizes: Tensor | None) -> tuple[Tensor, ...]:
        """Sums of the targeted term over the rows moved along a decoder row.

        Args:
            answer: Codes before and after.
            reach: Length of the step.
            sizes: Lengths of the decoder rows (F,), with which latents count. None: 1.

        Returns:
            Squared distance of the slopes of the targets from 1, and squared slopes of all other
            latents.
        """
        ...


@dataclass(frozen=True, slots=True)
class Entries(Change):
    """The change of sparse codes, for each of n entries.

    The entries of the code after come first, then those that occur only in the code before. Entries
    may be zero in both codes; their mass is 0 and they do not count as active.
    """

    row: Tensor
    """Row of each entry, (n,)."""
    col: Tensor
    """Latent of each entry, (n,)."""
    value: Tensor
    """Value after minus before, (n,)."""
    kept: Tensor
    """Mask of the entries that are active before and after, (n,)."""
    mass: Tensor
    """`|before| + |after|` without a graph, (n,)."""
    shape: tuple[int, int]
    """Rows and latents."""

    def detach(self) -> Entries:
        return replace(self, value=self.value.detach())

    def _of_first(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """Rows and values of the entries in the first rows."""
        if n_rows == self.shape[0]:
            return self.row, self.value
        here = (self.row < n_rows).nonzero().squeeze(1)
        return self.row[here], self.value[here]

    def row_squares(self, n_rows: int) -> Tensor:
        row, value = self._of_first(n_rows)
        return value.new_zeros(n_rows).index_add(0, row, value.square())

    def total_square(self, n_rows: int) -> Tensor:
        return self._of_first(n_rows)[1].square().sum()

    def moved(self) -> Tensor:
        return torch.bincount(self.col, self.value.abs(), minlength=self.shape[1])

    def masses(self) -> Tensor:
        return torch.bincount(self.col, self.mass, minlength=self.shape[1])

    def jaccard(self) -> Tensor:
        rows = self.shape[0]
        union = torch.bincount(self.row, weights=(self.mass > 0).float(), minlength=rows)
        shared = torch.bincount(self.row, weights=self.kept.float(), minlength=rows)
        some = union > 0
        return (shared[some] / union[some]).mean() if bool(some.any()) else union.new_ones(())

    def crosstalk(self, answer: Answer, reach: Tensor, sizes: Tensor | None) -> tuple[Tensor, ...]:
        first = len(answer.rows) - len(answer.latents)
        here = (self.row >= first).nonzero().squeeze(1)
        row = self.row[here] - first
        moved, sign = self.value[here] / reach, answer.sign[row]
        moved = moved if sizes is None else moved * sizes[self.col[here]]
        own = self.col[here] == answer.latents[row]
        slope = ((moved * sign - 1).square() * (own & self.kept[here])).sum()
        return slope, (moved.square() * (~own & (sign != 0))).sum()


@dataclass(frozen=True, slots=True)
class Matrices(Change):
    """The change of codes as matrices of B rows: nothing has a shape that depends on the data."""

    value: Tensor
    """Value after minus before, (B, F)."""
    kept: Tensor
    """Mask of the entries that are active before and after, (B, F)."""
    mass: Tensor
    """`|before| + |after|` without a graph, (B, F)."""

    def detach(self) -> Matrices:
        return replace(self, value=self.value.detach())

    def row_squares(self, n_rows: int) -> Tensor:
        return self.value[:n_rows].square().sum(1)

    def total_square(self, n_rows: int) -> Tensor:
        return self.value[:n_rows].square().sum()

    def moved(self) -> Tensor:
        return self.value.abs().sum(0)

    def masses(self) -> Tensor:
        return self.mass.sum(0)

    def jaccard(self) -> Tensor:
        union = (self.mass > 0).sum(1).float()
        some = union > 0
        share = self.kept.sum(1) / union.clamp_min(1)
        return torch.where(some.any(), share.sum() / some.sum().clamp_min(1), 1.0)

    def crosstalk(self, answer: Answer, reach: Tensor, sizes: Tensor | None) -> tuple[Tensor, ...]:
        first = len(answer.rows) - len(answer.latents)
        moved, sign = self.value[first:] / reach, answer.sign[:, None]
        moved = moved if sizes is None else moved * sizes
        own = torch.arange(moved.shape[1], device=moved.device) == answer.latents[:, None]
        slope = ((moved * sign - 1).square() * (own & self.kept[first:])).sum()
        return slope, (moved.square() * (~own & (sign != 0))).sum()


def changed(before: Codes, after: Codes, scratch: dict[str, Tensor]) -> Change:
    """The change between two codes of the same rows.

    Args:
        before: Codes of the clean rows.
        after: Codes of the perturbed rows.
        scratch: Dictionary that keeps a table between calls; see `places`.
    """
    if static.on():
        z, moved = before.dense(), after.dense()
        mass = (z.abs() + moved.abs()).detach()
        return Matrices(moved - z, (z != 0) & (moved != 0), mass)
    if before.pattern is None or after.pattern is None:
        return _of_dense(before.dense(), after.dense())
    where = places(before.pattern, after.pattern, scratch)
    kept = where >= 0
    old = torch.zeros_like(after.values)
    if len(before.values):
        old = torch.where(kept, before.values.index_select(0, where.clamp_min(0)), 0)
    left = torch.ones_like(before.pattern.col, dtype=torch.bool)
    left[where[kept]] = False
    left = left.nonzero().squeeze(1)
    gone = before.values.index_select(0, left)
    mass = after.values.detach().abs() + old.detach().abs()
    on_both = (old != 0) & (after.values != 0)
    return Entries(
        row=torch.cat([after.pattern.row, before.pattern.row.index_select(0, left)]),
        col=torch.cat([after.pattern.col, before.pattern.col.index_select(0, left)]),
        value=torch.cat([after.values - old, -gone]),
        kept=torch.cat([on_both, torch.zeros_like(left, dtype=torch.bool)]),
        mass=torch.cat([mass, gone.detach().abs()]),
        shape=(before.n_rows, before.pattern.n_cols),
    )


def _of_dense(z: Tensor, moved: Tensor) -> Entries:
    """The change between dense codes (B, F)."""
    row, col = ((z != 0) | (moved != 0)).nonzero().unbind(1)
    shape = (z.shape[0], z.shape[1])
    z, moved = z[row, col], moved[row, col]
    mass = (z.abs() + moved.abs()).detach()
    return Entries(row, col, moved - z, (z != 0) & (moved != 0), mass, shape)


def places(among: Pattern, wanted: Pattern, scratch: dict[str, Tensor]) -> Tensor:
    """Position of each entry of a pattern among those of another one of the same shape.

    Uses a table of all positions that is left as it was and used again in the next step, which
    takes a third of the time of a binary search.

    Args:
        among: Pattern to look in.
        wanted: Pattern of the m entries to look for.
        scratch: Dictionary that keeps the table between calls.

    Returns:
        Positions (m,); -1 for an entry that is not there.
    """
    size, device = among.n_rows * among.n_cols, among.col.device
    table = scratch.get("places")
    if table is None or len(table) != size or table.device != device:
        table = scratch["places"] = torch.full((size,), -1, dtype=torch.int32, device=device)
    table[among.flat] = torch.arange(len(among.col), dtype=torch.int32, device=device)
    positions = table.index_select(0, wanted.flat).long()
    table[among.flat] = -1
    return positions
