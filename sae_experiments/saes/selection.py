"""Selection of the active entries of a code: exact top-k per row and per batch.

With `static.shapes()` the functions give patterns of a fixed size, see `saes.static`.

Shape letters: B rows, F columns (one per latent), n active entries.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae_experiments.saes import static
from sae_experiments.saes.pattern import Pattern, positions

#: Entries of a matrix that are processed together, so that they stay in the processor's cache.
TILE = 1 << 21
#: Entries sampled for the first guess of a threshold.
SAMPLE = 1 << 18


def top_k(pre: Tensor, k: int) -> Pattern:
    """Select the k largest entries of every row; among equal values the first columns win.

    The columns are cut into groups, and the largest entry of each group is computed, which is one
    cheap pass. The k-th largest of these maxima is a lower bound of the row's k-th largest entry,
    because k groups hold an entry at least as large. Hardly more than k entries of a row lie above
    that bound, whatever the rows look like, and the exact selection is made among these alone.

    Args:
        pre: Matrix (B, F).
        k: Entries to select per row.
    """
    if static.on():
        return static.top_k(pre, k)
    n_rows, n_cols = pre.shape
    group_size = 1  # at least 4k groups are left
    while n_cols // (2 * group_size) >= 4 * k:
        group_size *= 2
    if group_size == 1 or not n_rows:
        return _top_k_direct(pre, k)
    chunk = max(1, TILE // n_cols)
    candidates = []
    for i, part in enumerate(pre.split(chunk)):
        candidates.append(_candidates(part, k, group_size).add_(i * chunk * n_cols))
    flat = _top_of_candidates(pre, torch.cat(candidates), k)
    if flat.numel() != n_rows * k:  # NaN compares with nothing
        return _top_k_direct(pre, k)
    crow = torch.arange(0, n_rows * k + 1, k, dtype=torch.int32, device=pre.device)
    pattern = Pattern(crow, torch.remainder(flat, n_cols).int(), n_cols)
    pattern.__dict__["flat"] = flat
    return pattern


def _candidates(pre: Tensor, k: int, group_size: int) -> Tensor:
    """Flat positions of the entries that may be among the k largest of their row."""
    n_groups = pre.shape[1] // group_size
    maxima = pre[:, : n_groups * group_size].unflatten(1, (group_size, n_groups)).amax(1)
    bound = kth_largest(maxima, k)
    if not _numpy_knows(pre):
        return positions(pre >= bound)
    # NumPy compares in two thirds of torch's time.
    return torch.from_numpy(np.flatnonzero(pre.numpy() >= bound.numpy()))


def _top_of_candidates(pre: Tensor, flat: Tensor, k: int) -> Tensor:
    """Keep the k largest candidates of every row, the first columns among equal values.

    Args:
        pre: Matrix (B, F).
        flat: Ascending flat positions of the candidates.
        k: Entries to keep per row.

    Returns:
        Ascending flat positions: k for every row, unless a row holds NaN.
    """
    n_rows, n_cols = pre.shape
    row = torch.div(flat, n_cols, rounding_mode="floor")
    counts = torch.bincount(row, minlength=n_rows)
    ends = counts.cumsum(0)
    width = int(counts.max())
    values = pre.view(-1).index_select(0, flat)
    if width < k:
        kth = values.new_full((n_rows,), torch.nan)
    else:
        # The candidates of each row side by side, padded with -inf to the widest row.
        narrow = torch.full((n_rows, width), -torch.inf, dtype=pre.dtype, device=pre.device)
        shift = torch.arange(n_rows, device=pre.device) * width - (ends - counts)
        place = torch.arange(flat.numel(), device=pre.device).add_(shift.index_select(0, row))
        narrow.view(-1).index_copy_(0, place, values)
        kth = kth_largest(narrow, k).squeeze(1)
    kth = kth.index_select(0, row)
    keep = values >= kth
    if int(torch.count_nonzero(keep)) > n_rows * k:
        # Values equal to the k-th largest: drop the rightmost ones of each row.
        ties = values == kth
        excess = torch.bincount(row.masked_select(keep), minlength=n_rows) - k
        seen = ties.cumsum(0)
        ties_to_the_right = seen.index_select(0, ends - 1).index_select(0, row) - seen
        keep &= ~ties | (ties_to_the_right >= excess.index_select(0, row))
    return flat.masked_select(keep)


def _numpy_knows(values: Tensor) -> bool:
    """True for a tensor on the CPU of a type that NumPy has."""
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)


def _above(values: Tensor, low: float) -> Tensor:
    """Positions of the entries of a flat tensor that are larger than `low`."""
    if _numpy_knows(values):
        return torch.from_numpy(np.flatnonzero(values.numpy() > low))
    return positions(values > low)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest entry of every row of (R, C), as (R, 1); NaN is larger than any number."""
    if not _numpy_knows(values):
        return values.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    # NumPy's partition is vectorised: a tenth of the time of torch's topk on a CPU.
    place = values.shape[1] - k
    ordered = np.partition(values.detach().numpy(), place, axis=1)
    return torch.from_numpy(ordered[:, place : place + 1])


def _top_k_direct(values: Tensor, k: int) -> Pattern:
    """Compute `top_k` from all entries, without candidates."""
    return Pattern.from_mask(top_mask(values, k))


def top_mask(values: Tensor, k: int) -> Tensor:
    """Boolean mask (B, F) of the k largest entries of every row of `values` (B, F).

    Among equal values the first columns win.
    """
    if static.on():
        return static.top_mask(values, k)
    kth = kth_largest(values, k)
    n_wanted = len(values) * k
    mask = values >= kth
    if int(torch.count_nonzero(mask)) == n_wanted:
        return mask
    mask = values > kth
    ties = values == kth
    mask |= ties & (ties.cumsum(1) <= (k - mask.sum(1))[:, None])
    if int(torch.count_nonzero(mask)) == n_wanted:
        return mask
    # NaN compares with nothing. Any selection will do: the loss will report the NaN.
    return torch.zeros_like(mask).scatter_(1, values.topk(k, dim=1, sorted=False).indices, True)


def batch_top_k(pre: Tensor, n: int, guess: float | None = None) -> tuple[Pattern, float]:
    """Select the n largest positive entries of the whole matrix, fewer if fewer are positive.

    Among equal values the first in memory order win.

    Args:
        pre: Matrix (B, F).
        n: Entries to select.
        guess: Smallest value kept in the last step. It saves a selection over all of (B, F):
            entries above a little less than it are extracted first. The result does not depend
            on it.

    Returns:
        The pattern, and the smallest value kept.
    """
    flat_pre = pre.view(-1)
    if guess is None and flat_pre.numel() > SAMPLE:
        guess = _guessed_threshold(flat_pre, n)
    lows = [0.9 * guess, 0.5 * guess, 0.0] if guess and guess > 0 else [0.0]
    flat = _above(flat_pre, lows[0])
    for low in lows[1:]:
        if flat.numel() >= n:
            break
        flat = _above(flat_pre, low)
    values = flat_pre.index_select(0, flat)
    if flat.numel() <= n:
        smallest = float(values.min()) if flat.numel() else 0.0
        return Pattern.from_flat(flat, *pre.shape), smallest
    nth = kth_largest(values[None], n)[0, 0]
    keep = values > nth
    ties = (values == nth).nonzero().squeeze(1)
    keep[ties[: n - int(torch.count_nonzero(keep))]] = True
    return Pattern.from_flat(flat.masked_select(keep), *pre.shape), float(nth)


def _guessed_threshold(values: Tensor, n: int) -> float:
    """Estimate the n-th largest entry of a flat tensor from a regular sample."""
    sample = values[:: values.numel() // SAMPLE | 1]  # an odd stride visits all columns
    below = len(sample) - round(len(sample) * n / values.numel())
    return float(sample.kthvalue(max(below, 1)).values)
