"""Activations of a language model at its sites: collected once and kept, on disk or in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sae_experiments.cache import cached, is_cached
from sae_experiments.errors import NonFinite, UserError
from sae_experiments.files import digest, read_json, write_json
from sae_experiments.models.hooks import Kept, Site, Sites, activations, as_sites
from sae_experiments.source import modules_behind, source_digest


@dataclass(frozen=True, kw_only=True)
class Source:
    """Source of activations: windows of a text, read by a language model."""

    model: nn.Module
    """The language model."""
    tokens_of: Callable[[np.ndarray], Tensor]
    """Maps starts of windows (n,) to token ids (n, T)."""
    length: int
    """Tokens of a window, T."""
    split: str
    """Name of the part of the text."""
    key: Mapping[str, Any]
    """Names the model and the text, for cache keys."""
    dtype: str
    """Precision in which activations are kept, float16 or float32."""
    batch: int
    """Windows per forward pass."""

    def key_of(self, starts: np.ndarray, sites: Sequence[Site]) -> dict[str, Any]:
        """Cache key of the activations at `sites` over the windows that begin at `starts`."""
        places = np.ascontiguousarray(starts, dtype=np.int64)
        return {
            "what": "store",
            "of": dict(self.key),
            "sites": [str(s) for s in sites],
            "length": self.length,
            "split": self.split,
            "dtype": self.dtype,
            "n": len(starts),
            "starts": hashlib.sha256(places.data).hexdigest(),
            "source": source_digest(__name__, alone=modules_behind(self.tokens_of)),
        }

    def widths(self, sites: Sequence[Site], start: int) -> dict[Site, int]:
        """Widths of `sites`, found by reading one window."""
        one = self.tokens_of(np.array([start])).to(next(self.model.parameters()).device)
        return {site: x.shape[-1] for site, x in activations(self.model, one, sites).items()}

    def read(
        self, starts: np.ndarray, sites: Sequence[Site], kept: dict[Site, Kept]
    ) -> Iterator[tuple[int, dict[Site, np.ndarray]]]:
        """Read activations, one forward pass at a time.

        Args:
            starts: Starts of the windows.
            sites: Sites to read.
            kept: Form of the rows of each site in half precision; what it lacks is filled in from
                the first pass.

        Yields:
            The number of windows read so far, and the rows of the last ones by site, in `dtype`.

        Raises:
            NonFinite: An activation is not finite.
            UserError: An activation is too large for `dtype`.
        """
        device = next(self.model.parameters()).device
        for begin in range(0, len(starts), self.batch):
            part = starts[begin : begin + self.batch]
            seen = activations(self.model, self.tokens_of(part).to(device), sites)
            rows = {site: self._as_kept(site, x, kept, int(part[0])) for site, x in seen.items()}
            yield begin + len(part), rows

    def _as_kept(self, site: Site, x: Tensor, kept: dict[Site, Kept], start: int) -> np.ndarray:
        """Activations (B, T, D) as rows (B * T, D) in `dtype`."""
        x = x.reshape(-1, x.shape[-1]).float()
        if not bool(torch.isfinite(x).all()):
            raise NonFinite(
                f"activations at {site} are not finite (window at {start} of {self.split}): "
                "the language model is broken"
            )
        values = x.cpu()
        if self.dtype == "float16":
            form = kept[site] = kept.get(site) or Kept.like(x)
            values = (values - form.centre) / form.unit
        array = values.numpy().astype(self.dtype)
        if not np.isfinite(array).all():
            raise UserError(
                f"activations at {site} reach {float(x.abs().max()):.3g}, too large for "
                f"fit.store_dtype={self.dtype}: use fit.store_dtype=float32"
            )
        return array


class Store:
    """Activations of one split: an (N, D) array per site, in memory or mapped from disk.

    Row `w * length + t` is position t of window w, whose text starts at `starts[w]` of the split.

    Args:
        folder: Folder of a store on disk, whose memory use is bounded by the batches read.
    """

    def __init__(self, folder: Path) -> None:
        info = read_json(folder / "store.json")
        self._fill(
            key=info["key"],
            length=info["length"],
            split=info["split"],
            starts=np.load(folder / "starts.npy", allow_pickle=False),
        )
        self.folder: Path | None = folder
        for s in info["sites"]:
            site, shape = Site(*s["site"]), (self.n_rows, s["width"])
            self.sites[site] = np.memmap(folder / s["file"], s["dtype"], "r", shape=shape)
            if "centre" in s:
                centre = torch.from_numpy(np.load(folder / s["centre"], allow_pickle=False))
                self.kept[site] = Kept(centre, s["unit"])

    def _fill(self, *, key: Mapping[str, Any], length: int, split: str, starts: np.ndarray) -> None:
        self.key = key
        self.length = length
        self.split = split
        self.starts = starts
        self.n_rows = len(starts) * length
        self.sites: dict[Site, np.ndarray] = {}
        self.kept: dict[Site, Kept] = {}
        self._order: tuple[tuple[int, int, int, int], np.ndarray] | None = None

    @classmethod
    def in_memory(
        cls,
        source: Source,
        starts: np.ndarray,
        sites: Sequence[Site],
        tick: Callable[[int, int], None] = lambda done, total: None,
    ) -> Store:
        """Collect a store in memory, with the same rows as a store on disk."""
        store = cls.__new__(cls)
        key = source.key_of(starts, sites)
        store._fill(key=key, length=source.length, split=source.split, starts=starts)
        store.folder = None
        for done, rows in source.read(starts, sites, store.kept):
            for site, values in rows.items():
                if site not in store.sites:
                    store.sites[site] = np.empty((store.n_rows, values.shape[1]), values.dtype)
                end = done * source.length
                store.sites[site][end - len(values) : end] = values
            tick(done, len(starts))
        return store

    @property
    def n_at_once(self) -> int:
        """Maximum number of rows in a batch."""
        return self.n_rows

    def width(self, site: Site | Sites) -> int:
        """Width of a site, or of several side by side."""
        return sum(self.sites[s].shape[1] for s in as_sites(site))

    def rows(self, site: Site | Sites, index: np.ndarray | slice) -> Tensor:
        """Rows (n, D) as float32; of several sites, side by side."""
        parts = [restored(self.sites[s], index, self.kept.get(s)) for s in as_sites(site)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def index_at(
        self, step: int, *, rows: int, seed: int, first: int = 0, last: int | None = None
    ) -> np.ndarray:
        """Row numbers of a batch, a function of (seed, step) alone.

        The order of the rows is shuffled anew each epoch.

        Args:
            step: Number of the batch.
            rows: Rows of a batch.
            seed: Seed of the order.
            first: First row that takes part.
            last: Row after the last one that takes part; None for all.
        """
        n = (last or self.n_rows) - first
        if rows > n:
            raise UserError(
                f"a batch of {rows} rows was asked for, but the store has {n}: "
                "collect more windows or use a smaller fit.batch_size"
            )
        per_epoch = n // rows
        epoch, within = divmod(step, per_epoch)
        name = (seed, epoch, first, n)
        if self._order is None or self._order[0] != name:
            self._order = (name, shuffled(n, seed, epoch))
        return np.sort(self._order[1][within * rows : (within + 1) * rows]) + first


def shuffled(n: int, seed: int, *more: int) -> np.ndarray:
    """A permutation of 0..n-1 (int32) that depends on the numbers alone."""
    state = np.random.default_rng([seed & 0xFFFFFFFF, seed >> 32, *more])
    return state.permutation(n).astype(np.int32)


def restored(array: np.ndarray, index: np.ndarray | slice, kept: Kept | None) -> Tensor:
    """Some rows of an array, as float32 in their own units.

    `take` is faster than indexing, and torch converts the copy faster than NumPy. A copy is needed
    because a memory map is read-only, and a tensor must be writable.
    """
    taken = np.array(array[index]) if isinstance(index, slice) else np.take(array, index, axis=0)
    x = torch.from_numpy(taken).float()
    return x if kept is None else torch.add(kept.centre, x, alpha=kept.unit, out=x)


def collect(
    source: Source,
    starts: np.ndarray,
    sites: Sequence[Site],
    *,
    cache: Path,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Store:
    """The store of `sites` over the windows that begin at `starts`, from the cache if it is there.

    Args:
        source: The model and its text.
        starts: Starts of the windows.
        sites: Sites to read.
        cache: Folder of the cache.
        tick: Called with the number of windows done and the total.

    Raises:
        NonFinite: An activation is not finite.
        UserError: An activation is too large for the precision of the store.
    """
    full = source.key_of(starts, sites)

    def make(folder: Path) -> None:
        # Files, not memory maps: on a full disk a file raises an error, while a map would kill
        # the process.
        files: dict[Site, Any] = {}
        listed: list[dict[str, Any]] = []
        kept: dict[Site, Kept] = {}
        with ExitStack() as stack:
            for done, rows in source.read(starts, sites, kept):
                for site, values in rows.items():
                    if site not in files:
                        path = folder / f"{site}.bin"
                        files[site] = stack.enter_context(open(path, "wb"))
                        width = values.shape[1]
                        listed.append(
                            {
                                "site": list(site),
                                "file": path.name,
                                "dtype": source.dtype,
                                "width": width,
                            }
                        )
                    files[site].write(np.ascontiguousarray(values))
                tick(done, len(starts))
        np.save(folder / "starts.npy", starts)
        for info, site in zip(listed, files, strict=True):
            if site in kept:
                np.save(folder / f"{site}.centre.npy", kept[site].centre.numpy())
                info |= {"centre": f"{site}.centre.npy", "unit": kept[site].unit}
        about = {"key": full, "length": source.length, "split": source.split, "sites": listed}
        write_json(folder / "store.json", about)

    return Store(cached(cache, "stores", full, make))


def bytes_to_collect(
    source: Source, starts: np.ndarray, sites: Sequence[Site], cache: Path
) -> tuple[int, int]:
    """Bytes that a store will take on disk, and bytes of an unfinished one that it replaces.

    Both are 0 where the store is in the cache.
    """
    key = source.key_of(starts, sites)
    if is_cached(cache, "stores", key):
        return 0, 0
    width = sum(source.widths(sites, int(starts[0])).values())
    unfinished = (cache / "stores" / digest(key)).glob("*")
    left = sum(path.stat().st_size for path in unfinished)
    return len(starts) * source.length * width * np.dtype(source.dtype).itemsize, left
