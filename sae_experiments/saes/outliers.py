"""Outlier rows: so far from all others that a few of them hold much of the variance.

In many language models the first positions of a window have activations that are a hundred times
as long as the others (Sun et al. 2024, "Massive Activations in Large Language Models").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae_experiments.saes.types import Batch

#: A row is an outlier if it is further from the median row than this many times the median distance
FAR = 5.0
#: and than this many times the distance within which the share `MOST` of all rows lie.
FAR_BEYOND_MOST = 3.0
MOST = 0.95
#: Rows that the median row and the distances are taken from, at most about.
SAMPLE = 8192


class Region(NamedTuple):
    """Ordinary rows: in every block of columns at most `limits` from `centre`."""

    centre: Tensor
    """The median row, (D,)."""
    limits: Tensor
    """Largest distance from it, for each block of columns, (blocks,)."""

    @classmethod
    def of(cls, rows: Tensor, blocks: int = 1) -> Region:
        """Determine the region from rows.

        At most 5 % of the rows lie outside, so that a heavy tail does not count as outliers. Where
        95 % of the rows are equal, every row is ordinary.

        Args:
            rows: (N, D).
            blocks: Equal parts of the columns, each judged by itself (the sites of a crosscoder).
        """
        sample = rows[:: max(1, len(rows) // SAMPLE)]
        centre = sample.median(0).values
        limits = []
        for distances in _distances(sample, centre, blocks):
            most = distances.kthvalue(max(1, round(MOST * len(distances)))).values
            limit = torch.maximum(FAR * distances.median(), FAR_BEYOND_MOST * most)
            limits.append(torch.where(most > 0, limit, torch.inf))
        return cls(centre, torch.stack(limits))

    def contains(self, rows: Tensor) -> Tensor:
        """Boolean (N,): true for ordinary rows among rows (N, D)."""
        distances = torch.stack(_distances(rows, self.centre, len(self.limits)))
        # Rows that are not finite are no outliers: the checks that name them must see them.
        far = (distances > self.limits[:, None]) & torch.isfinite(distances)
        return ~far.any(0)


def _distances(rows: Tensor, centre: Tensor, blocks: int) -> list[Tensor]:
    """Distances (N,) of rows (N, D) from `centre`, for each block of columns."""
    return [part.norm(dim=1) for part in (rows - centre).tensor_split(blocks, 1)]


class Outliers(NamedTuple):
    """Outliers among the rows that an SAE is initialised from."""

    rows: int
    """Rows looked at."""
    outliers: int
    """Outliers among them, by input or target."""
    variance_frac: float
    """Their share of the variance of the targets, about the median row."""


class OrdinaryRows:
    """Rows that an SAE is fitted to: those whose input and target are both ordinary.

    Args:
        x: Inputs (N, D) that the rule looks at.
        y: Targets (N, O); x itself for an autoencoder.
        blocks: Equal parts of the columns, each judged by itself.
    """

    def __init__(self, x: Tensor, y: Tensor, blocks: int = 1) -> None:
        self.inputs = Region.of(x, blocks)
        self.targets = self.inputs if y is x else Region.of(y, blocks)
        kept = self.keep(x, y)
        squared = (y - self.targets.centre).square().sum(1)
        total = float(squared.sum())
        self.counts = Outliers(
            rows=len(x),
            outliers=int((~kept).sum()),
            variance_frac=float(squared[~kept].sum()) / total if total > 0 else 0.0,
        )

    def keep(self, x: Tensor, y: Tensor) -> Tensor:
        """Boolean (N,): true for rows to fit. All are if none would be left."""
        kept = self.inputs.contains(x)
        if y is not x:
            kept &= self.targets.contains(y)
        return kept if bool(kept.any()) else torch.ones_like(kept)

    def of_inputs(self, x: Tensor) -> Tensor:
        """The ordinary ones among inputs (N, D); x itself if all are."""
        kept = self.inputs.contains(x)
        return x if bool(kept.all()) or not bool(kept.any()) else x[kept]

    def of_pairs(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The ordinary ones among inputs and targets; x and y themselves if all are."""
        kept = self.keep(x, y)
        if bool(kept.all()):
            return x, y
        inputs = x[kept]
        return inputs, inputs if y is x else y[kept]

    def of_batch(self, batch: Batch) -> Batch:
        """The batch without its outliers; the same one if it has none.

        In `downstream` the outliers stay as they are. An outlying second view is replaced by the
        row itself.
        """
        alt = self._second_view(batch)
        kept = self.keep(batch.x, batch.y)
        if bool(kept.all()):
            return batch._replace(alt=alt)
        index = kept.nonzero().squeeze(1)
        return _rows_of(batch._replace(alt=alt), index, index)

    def of_batch_in_place(self, batch: Batch) -> Batch:
        """The batch with the last ordinary row before it in place of each outlier.

        Its size stays as it is, and no number is read. In `downstream` the outliers stay as they
        are.
        """
        kept = self.inputs.contains(batch.x)
        if batch.y is not batch.x:
            kept = kept & self.targets.contains(batch.y)
        place = torch.arange(len(kept), device=kept.device)
        first = torch.where(kept, place, len(kept) - 1).amin()
        before = torch.where(kept, place, -1).cummax(0).values
        index = torch.where(before < 0, first, before)
        index = torch.where(kept.any(), index, place)
        return _rows_of(batch._replace(alt=self._second_view(batch)), index, kept)

    def _second_view(self, batch: Batch) -> Tensor | None:
        """The second view, with the row itself in place of an outlier."""
        alt = batch.alt
        if alt is None:
            return None
        return torch.where(self.inputs.contains(alt)[:, None], alt, batch.x)


def _rows_of(batch: Batch, index: Tensor, kept: Tensor) -> Batch:
    """The rows (n,) of a batch; in `downstream` all but the `kept` ones stay as they are."""
    x = batch.x.index_select(0, index)
    rest = batch.downstream
    return Batch(
        x,
        x if batch.y is batch.x else batch.y.index_select(0, index),
        None if batch.alt is None else batch.alt.index_select(0, index),
        None if rest is None else rest._replace(raw=batch.y, kept=kept),
    )
