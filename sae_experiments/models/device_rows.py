"""Activations near the device: in its memory, or fetched ahead of time.

Reading rows from a memory map, converting them and copying them takes longer than a step on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from sae_experiments.models.device_text import on_device
from sae_experiments.models.hooks import Site, Sites, as_sites
from sae_experiments.models.store import Store
from sae_experiments.resources import free_memory

#: Share of the device's free memory that rows may take.
SHARE = 0.5
#: Rows that are copied at once.
CHUNK = 1 << 16


class DeviceRows:
    """The rows of some sites of a store on a device, as they are stored.

    Args:
        store: The store.
        sites: Sites to copy.
        device: The device.
    """

    def __init__(self, store: Store, sites: Sequence[Site], device: torch.device) -> None:
        self.device = device
        self.sites = {site: _copied(store.sites[site], device) for site in sites}
        self.kept = {
            site: (store.kept[site].centre.to(device), store.kept[site].unit)
            for site in sites
            if site in store.kept
        }

    @staticmethod
    def fit(store: Store, sites: Sequence[Site], device: torch.device) -> bool:
        """True if the rows take at most `SHARE` of the device's free memory."""
        free = free_memory(device)
        size = sum(store.sites[site].nbytes for site in sites)
        return free is not None and size <= SHARE * free

    def rows(self, site: Site | Sites, index: np.ndarray) -> Tensor:
        """Rows (n, D) as float32; of several sites, side by side."""
        place = on_device(index, self.device)
        parts = [self._restored(s, place) for s in as_sites(site)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _restored(self, site: Site, place: Tensor) -> Tensor:
        x = self.sites[site].index_select(0, place).float()
        if site not in self.kept:
            return x
        centre, unit = self.kept[site]
        return torch.add(centre, x, alpha=unit, out=x)


def _copied(rows: np.ndarray, device: torch.device) -> Tensor:
    """Rows (N, D) on a device; the memory of the processor holds a part of them at a time."""
    first = torch.from_numpy(np.array(rows[:1]))
    out = torch.empty(rows.shape, dtype=first.dtype, device=device)
    for begin in range(0, len(rows), CHUNK):
        part = torch.from_numpy(np.array(rows[begin : begin + CHUNK]))
        out[begin : begin + len(part)].copy_(part)
    return out


class Ahead:
    """A function of a step whose next value is computed in a thread while the device works.

    Args:
        function: Gives tensors in the memory of the processor.
        device: Device to bring it to.
    """

    def __init__(self, function: Callable[[int], tuple[Tensor, ...]], device: torch.device) -> None:
        self.function = function
        self.device = device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._next: tuple[int, Future[tuple[Tensor, ...]]] | None = None

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """The value of a step on the device."""
        if self._next is None or self._next[0] != step:
            self._next = step, self._pool.submit(self._pinned, step)
        value = self._next[1].result()
        self._next = step + 1, self._pool.submit(self._pinned, step + 1)
        return tuple(t.to(self.device, non_blocking=True) for t in value)

    def _pinned(self, step: int) -> tuple[Tensor, ...]:
        value = self.function(step)
        if self.device.type != "cuda":
            return value
        return tuple(t.pin_memory() for t in value)  # a device can read it by itself

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
