"""Activations collected chunk by chunk while they are read: bounded memory and no disk.

Which rows a batch has is a function of (seed, step) alone. Every epoch has an order of all windows;
a chunk is a stretch of this order, and its rows are shuffled. To go on in the middle of a chunk,
its windows are read again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_experiments.errors import UserError
from sae_experiments.models.hooks import Kept, Site, Sites, as_sites
from sae_experiments.models.store import Source, restored, shuffled

#: Batches that the rows of a chunk are shuffled over, at least.
BATCHES = 64
#: Smallest size of a chunk that can be asked for, in batches. Chunks of one epoch are of nearly
#: equal size, so the smallest one is a little more than half of the largest.
SMALLEST = 160
#: Batches that a whole number of windows may amount to for chunks to consist of whole batches.
WHOLE = 8


#: Called with the number of windows read and in all.
Tick = Callable[[int, int], None]


@dataclass
class Watch:
    """Callbacks of a stream, shared by all its copies."""

    stage: Callable[[str], AbstractContextManager[Tick]] = lambda name: nullcontext(_no_tick)
    """Shows the progress of a stage of this name."""
    check: Callable[[], None] = lambda: None
    """Called after every forward pass of a chunk; may raise an exception to end it."""

    @contextmanager
    def ended_by(self, check: Callable[[], None]) -> Iterator[None]:
        """Within the context, let `check` end the collection of a chunk."""
        before, self.check = self.check, check
        try:
            yield
        finally:
            self.check = before


def _no_tick(done: int, total: int) -> None:
    pass


class ChunkIndex(NamedTuple):
    """Rows of one batch, all from one chunk."""

    rows: np.ndarray
    """Row numbers, ascending, (B,)."""
    chunk: tuple[int, int, int]
    """Seed, epoch and number of the chunk."""


class Stream:
    """Training rows that are collected as they are read.

    Rows are numbered as those of a `Store` over the same windows. If the rows of a few batches fill
    whole windows, every chunk consists of whole batches, and an epoch leaves out less than one
    batch. Otherwise every chunk leaves out less than one batch.

    Args:
        source: The model and its text.
        starts: Starts of the windows.
        sites: Sites to collect.
        chunk_rows: Maximum rows per chunk.
        batch_rows: Rows of a batch.
        kept: Form of the rows of each site in half precision.
        name: Configuration key of `chunk_rows`, for messages.
        watch: Progress of chunks, and when to end one.

    Raises:
        UserError: A chunk would hold fewer than `SMALLEST` batches.
    """

    def __init__(
        self,
        source: Source,
        starts: np.ndarray,
        sites: Sequence[Site],
        *,
        chunk_rows: int,
        batch_rows: int,
        kept: Mapping[Site, Kept],
        name: str = "fit.stream_rows",
        watch: Watch | None = None,
    ) -> None:
        if chunk_rows < SMALLEST * batch_rows:
            raise UserError(
                f"{name}={chunk_rows} must be at least {SMALLEST} batches, "
                f"{SMALLEST * batch_rows} rows: smaller chunks are shuffled too little"
            )
        self.source = source
        self.starts = starts
        self.watch = watch or Watch()
        self.sites = tuple(sites)
        self.kept = dict(kept)
        self.length = source.length
        self.split = source.split
        self.n_rows = len(starts) * self.length
        self.chunk_rows = chunk_rows
        self.batch_rows = batch_rows
        #: First window of every chunk in the order of an epoch, and the end.
        self.bounds = _bounds(len(starts), self.length, chunk_rows, batch_rows)
        self._order: tuple[tuple[int, int], np.ndarray] | None = None
        self._windows: tuple[tuple[int, int, int], np.ndarray] | None = None
        self._shuffled: tuple[tuple[int, int, int], np.ndarray] | None = None
        self._chunk: tuple[tuple[int, int, int], dict[Site, np.ndarray]] | None = None

    @property
    def key(self) -> dict[str, Any]:
        """Identity of the rows and their order, for cache keys."""
        chunks = {"chunk_rows": self.chunk_rows, "batch": self.batch_rows}
        return self.source.key_of(self.starts, self.sites) | {
            "stream": chunks | {"collect_batch": self.source.batch}
        }

    @property
    def n_at_once(self) -> int:
        """Maximum number of rows in a batch: those of the smallest chunk."""
        return int(np.diff(self.bounds).min()) * self.length

    def only(self, sites: Sequence[Site]) -> Stream:
        """The same rows at some of the sites: forward passes end at the last one that is read."""
        other = copy.copy(self)
        other.sites = tuple(site for site in self.sites if site in sites)
        other._chunk = None
        return other

    def over(self, source: Source) -> Stream:
        """The same rows, read from another source over the same windows."""
        other = copy.copy(self)
        other.source = source
        other._chunk = None
        return other

    def index_at(self, step: int, *, rows: int, seed: int) -> ChunkIndex:
        """Rows of a batch, a function of (seed, step) alone.

        Args:
            step: Number of the batch.
            rows: Rows of a batch.
            seed: Seed of the order.
        """
        batches = np.diff(self.bounds) * self.length // rows
        if not batches.all():
            raise UserError(
                f"a batch of {rows} rows was asked for, but a chunk has {self.n_at_once}: "
                "use more windows or a larger fit.stream_rows"
            )
        ends = np.cumsum(batches)
        epoch, within = divmod(step, int(ends[-1]))
        number = int(np.searchsorted(ends, within, side="right"))
        chunk = (seed, epoch, number)
        first = within - int(ends[number] - batches[number])
        places = np.sort(self._places(chunk)[first * rows : (first + 1) * rows])
        windows = self.windows(chunk)[places // self.length]
        return ChunkIndex(windows * self.length + places % self.length, chunk)

    def windows(self, chunk: tuple[int, int, int]) -> np.ndarray:
        """Numbers of the windows of a chunk, ascending."""
        seed, epoch, number = chunk
        if self._order is None or self._order[0] != (seed, epoch):
            self._order = ((seed, epoch), shuffled(len(self.starts), seed, epoch, 0))
        if self._windows is None or self._windows[0] != chunk:
            part = self._order[1][self.bounds[number] : self.bounds[number + 1]]
            self._windows = (chunk, np.sort(part).astype(np.int64))
        return self._windows[1]

    def _places(self, chunk: tuple[int, int, int]) -> np.ndarray:
        """The shuffled rows of a chunk, numbered within it."""
        if self._shuffled is None or self._shuffled[0] != chunk:
            seed, epoch, number = chunk
            n = int(self.bounds[number + 1] - self.bounds[number]) * self.length
            self._shuffled = (chunk, shuffled(n, seed, epoch, 1, number))
        return self._shuffled[1]

    def rows(self, site: Site | Sites, index: ChunkIndex | np.ndarray) -> Tensor:
        """Rows (n, D) as float32; of several sites, side by side.

        Rows of a chunk come from the chunk, which is collected unless it is the last one that was.
        The windows of other rows are read for them alone.
        """
        if isinstance(index, ChunkIndex):
            numbers, windows = index.rows, self.windows(index.chunk)
            arrays = self._collected(index.chunk, windows)
        else:
            numbers, windows = index, np.unique(index // self.length)
            arrays = self._read(windows, as_sites(site))
        places = np.searchsorted(windows, numbers // self.length) * self.length
        places += numbers % self.length
        parts = [restored(arrays[s], places, self.kept.get(s)) for s in as_sites(site)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _collected(
        self, chunk: tuple[int, int, int], windows: np.ndarray
    ) -> dict[Site, np.ndarray]:
        if self._chunk is None or self._chunk[0] != chunk:
            self._chunk = None  # its memory is needed for the next one
            name = f"collect chunk {chunk[2] + 1} of {len(self.bounds) - 1}"
            with self.watch.stage(name) as tick:
                self._chunk = (chunk, self._read(windows, self.sites, tick, self.watch.check))
        return self._chunk[1]

    def _read(
        self,
        windows: np.ndarray,
        sites: Sequence[Site],
        tick: Tick = _no_tick,
        check: Callable[[], None] = lambda: None,
    ) -> dict[Site, np.ndarray]:
        """Rows of some windows by site, in the precision of the store."""
        arrays: dict[Site, np.ndarray] = {}
        for done, rows in self.source.read(self.starts[windows], sites, self.kept):
            for site, values in rows.items():
                if site not in arrays:
                    shape = (len(windows) * self.length, values.shape[1])
                    arrays[site] = np.empty(shape, values.dtype)
                end = done * self.length
                arrays[site][end - len(values) : end] = values
            tick(done, len(windows))
            check()
        return arrays


def _bounds(n: int, length: int, chunk_rows: int, batch_rows: int) -> np.ndarray:
    """First window of every chunk, and the end.

    Args:
        n: Number of windows.
        length: Rows of a window.
        chunk_rows: Maximum rows per chunk.
        batch_rows: Rows of a batch.
    """
    unit = batch_rows // math.gcd(batch_rows, length)
    if unit * length > WHOLE * batch_rows:
        unit = 1
    largest = max(chunk_rows // length, 1)
    if n <= largest:
        return np.array([0, n])
    chunks = -(-n // max(largest - unit, 1))
    even = np.arange(1, chunks) * n // chunks
    return np.concatenate([[0], even // unit * unit, [n]])
