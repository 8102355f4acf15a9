"""Activations of a language model at its sites, collected once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sae_experiments.cache import cached
from sae_experiments.errors import NonFinite, UserError
from sae_experiments.files import read_json, write_json
from sae_experiments.models.hooks import Kept, Site, Sites, activations, as_sites
from sae_experiments.source import modules_behind, source_digest


class Store:
    """Activations of one split on disk: ``n_windows`` windows of ``length`` characters, one memory-mapped (N, D) file a site.

    Row ``w * length + t`` is position t of window w, whose text starts at ``starts[w]`` of the split. Memory use is bounded by the
    batches read, whatever the size of the store.
    """

    def __init__(self, folder: Path) -> None:
        info = read_json(folder / "store.json")
        self.folder, self.key, self.length, self.split = (
            folder,
            info["key"],
            info["length"],
            info["split"],
        )
        self.starts = np.load(folder / "starts.npy", allow_pickle=False)
        self.n_rows = len(self.starts) * self.length
        self.sites = {Site(*s["site"]): self._open(s) for s in info["sites"]}
        self._kept = {Site(*s["site"]): self._kept_as(s) for s in info["sites"] if "centre" in s}
        self._order: tuple[tuple[int, int, int, int], np.ndarray] | None = None

    def _open(self, s: dict[str, Any]) -> np.ndarray:
        return np.memmap(
            self.folder / s["file"], dtype=s["dtype"], mode="r", shape=(self.n_rows, s["width"])
        )

    def _kept_as(self, s: dict[str, Any]) -> Kept:
        return Kept(
            torch.from_numpy(np.load(self.folder / s["centre"], allow_pickle=False)), s["unit"]
        )

    def width(self, site: Site | Sites) -> int:
        """Width of a site, or of several side by side."""
        return sum(self.sites[s].shape[1] for s in as_sites(site))

    def rows(self, site: Site | Sites, index: np.ndarray | slice) -> Tensor:
        """Rows (n, D) as float32; of several sites, side by side."""
        parts = [self._rows(s, index) for s in as_sites(site)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _rows(self, site: Site, index: np.ndarray | slice) -> Tensor:
        x, kept = torch.from_numpy(_taken(self.sites[site], index)).float(), self._kept.get(site)
        return x if kept is None else torch.add(kept.centre, x, alpha=kept.unit, out=x)

    def index_at(
        self, step: int, *, rows: int, seed: int, first: int = 0, last: int | None = None
    ) -> np.ndarray:
        """Row numbers of batch ``step``: the rows first..last in an order shuffled anew each epoch, a function of (seed, step) alone."""
        n = (last or self.n_rows) - first
        if rows > n:
            raise UserError(
                f"a batch of {rows} rows was asked for, but the store has {n}: collect more windows or use a smaller fit.batch_size"
            )
        per_epoch = n // rows
        epoch, within = divmod(step, per_epoch)
        name = (seed, epoch, first, n)
        if self._order is None or self._order[0] != name:
            order = (
                np.random.default_rng([seed & 0xFFFFFFFF, seed >> 32, epoch])
                .permutation(n)
                .astype(np.int32)
            )
            self._order = (name, order)
        return np.sort(self._order[1][within * rows : (within + 1) * rows]) + first


def _taken(rows: np.ndarray, index: np.ndarray | slice) -> np.ndarray:
    """A copy of some rows: the map is read-only, and a tensor must not be. ``take`` is quicker than an index, as torch is at converting the copy."""
    return np.array(rows[index]) if isinstance(index, slice) else np.take(rows, index, axis=0)


def collect(
    model: nn.Module,
    tokens_of: Callable[[np.ndarray], Tensor],
    starts: np.ndarray,
    sites: Sequence[Site],
    *,
    length: int,
    split: str,
    cache: Path,
    key: Mapping[str, Any],
    dtype: str,
    batch: int,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Store:
    """The store of ``sites`` over the windows that begin at ``starts`` (``tokens_of(starts)`` gives their ids (n, length)).

    Made in the cache under ``key`` unless it is there. Raises :class:`UserError` when an activation is not finite or too large for ``dtype``.
    """
    full = {
        "what": "store",
        "of": dict(key),
        "sites": [str(s) for s in sites],
        "length": length,
        "split": split,
        "dtype": dtype,
        "n": len(starts),
        "starts": hashlib.sha256(np.ascontiguousarray(starts, dtype=np.int64)).hexdigest(),
        "source": source_digest(__name__, alone=modules_behind(tokens_of)),
    }
    device = next(model.parameters()).device

    def make(folder: Path) -> None:
        # Written as files and not through memory maps: a full disk is then an error with a name, where a map would kill the process.
        files: dict[Site, Any] = {}
        widths: dict[Site, int] = {}
        kept: dict[Site, Kept] = {}
        with ExitStack() as stack:
            _collect(folder, files, widths, kept, stack)
        np.save(folder / "starts.npy", starts)
        listed = [
            {"site": list(s), "file": f"{s}.bin", "dtype": dtype, "width": width}
            for s, width in widths.items()
        ]
        for info, site in zip(listed, widths, strict=True):
            if site in kept:
                np.save(folder / f"{site}.centre.npy", kept[site].centre.numpy())
                info |= {"centre": f"{site}.centre.npy", "unit": kept[site].unit}
        write_json(
            folder / "store.json", {"key": full, "length": length, "split": split, "sites": listed}
        )

    def _collect(
        folder: Path,
        files: dict[Site, Any],
        widths: dict[Site, int],
        kept: dict[Site, Kept],
        stack: ExitStack,
    ) -> None:
        for begin in range(0, len(starts), batch):
            part = starts[begin : begin + batch]
            for site, x in activations(model, tokens_of(part).to(device), sites).items():
                x = x.reshape(-1, x.shape[-1]).float()
                if not bool(torch.isfinite(x).all()):
                    raise NonFinite(
                        f"activations at {site} are not finite (window at {part[0]} of {split}): the language model is broken"
                    )
                values = x.cpu()
                if dtype == "float16":
                    how = kept[site] = kept.get(site) or Kept.like(x)
                    values = (values - how.centre) / how.unit
                values = values.numpy().astype(dtype)
                if not np.isfinite(values).all():
                    raise UserError(
                        f"activations at {site} reach {float(x.abs().max()):.3g}, too large for fit.store_dtype={dtype}: use fit.store_dtype=float32"
                    )
                if site not in files:
                    files[site] = stack.enter_context(open(folder / f"{site}.bin", "wb"))  # noqa: SIM115 (the stack closes it)
                    widths[site] = values.shape[1]
                files[site].write(np.ascontiguousarray(values))
            tick(min(begin + batch, len(starts)), len(starts))

    return Store(cached(cache, "stores", full, make))
