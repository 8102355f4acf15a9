"""Evenly spread samples of ordered items, such as rows of a batch or windows of a text.

Rows and windows are in the order of the text, so the first n are not a representative sample. Code
that needs a part of them chooses it with these functions.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

#: 2^32 divided by the golden ratio. Its multiples modulo 2^32 spread evenly, and so does every
#: second, third, ... of them.
GOLDEN = 2654435769
MASK = (1 << 32) - 1
#: Places of a sample that are kept for the next call, at most.
KEPT = 1 << 13


def spread(n: int, k: int | None) -> np.ndarray:
    """Choose `k` of `n` rows, one from each of k stretches of nearly equal length.

    The place within the stretch differs between stretches. A plain stride could keep step with a
    period of the rows, such as the positions of a window, and always see the same phase of it.

    Args:
        n: Number of rows.
        k: Number of rows to choose; None, or more than n: all.

    Returns:
        Ascending row numbers, (min(k, n),) int64, which depend on n and k alone.
    """
    if k is None or k >= n:
        return np.arange(n, dtype=np.int64)
    i = np.arange(k + 1, dtype=np.int64)
    ends = i * n // max(k, 1)
    places = (i[:-1] * GOLDEN & MASK) * np.diff(ends) >> 32
    return ends[:-1] + places


def spread_rows(x: Tensor, k: int | None) -> Tensor:
    """The `k` rows of `x` (N, ...) that `spread` chooses; `x` itself if that is all of them."""
    if k is None or k >= len(x):
        return x
    return x.index_select(0, _places(len(x), k, x.device))


def _places(n: int, k: int, device: torch.device) -> Tensor:
    """`spread` on a device; few places are made once, since steps there must not wait for them."""
    return (_kept_places if k <= KEPT else _copied_places)(n, k, device)


def _copied_places(n: int, k: int, device: torch.device) -> Tensor:
    return torch.from_numpy(spread(n, k)).to(device)


_kept_places = cache(_copied_places)


def spread_order(n: int, run: int = 1) -> np.ndarray:
    """An order of `n` items whose first k, for any k, are spread over the whole.

    The same holds for every second or every third of these.

    Args:
        n: Number of items.
        run: Number of neighbours that stay together, in their order. An incomplete run stays at
            the end.

    Returns:
        A permutation of 0..n-1, (n,) int64.
    """
    runs = n // run
    keys = np.arange(runs, dtype=np.int64) * GOLDEN & MASK
    places = np.empty(runs, np.int64)
    places[np.argsort(keys)] = np.arange(runs)
    whole = (places[:, None] * run + np.arange(run)).reshape(-1)
    return np.concatenate([whole, np.arange(runs * run, n, dtype=np.int64)])


def evenly_spaced(items: np.ndarray, n: int | None) -> np.ndarray:
    """At most `n` of the items (N,), evenly spaced from the first to the last (None: all)."""
    if n is None:
        return items
    positions = np.linspace(0, len(items) - 1, min(n, len(items))).round().astype(int)
    return items[np.unique(positions)]
