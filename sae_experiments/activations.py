"""Reading and replacing a language model's activations, and a store of them on disk.

Sites are named ``<stream>.<block>``, blocks counted from 1: ``resid.3`` is the residual stream after block 3 (``resid.0``: the
embeddings), ``resid.mid`` after block n_layer // 2; ``mlp_in.2`` is what the MLP of block 2 reads (after its layer norm), ``mlp_act.2``
its hidden activations after the non-linearity, ``mlp_out.2`` what it writes. Shape letters: B sequences, T positions, D width, N rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sae_experiments.io import NonFinite, UserError, cached, read_json, write_json
from sae_experiments.layouts import layout_of_model
from sae_experiments.source import modules_behind, source_digest

STREAMS = ("resid", "mlp_in", "mlp_act", "mlp_out")


class Site(NamedTuple):
    """A place in the model: ``stream`` and 1-based ``layer`` (0 only for the residual stream: the embeddings)."""

    stream: str
    layer: int

    def __str__(self) -> str:
        return f"{self.stream}.{self.layer}"


Sites = tuple[Site, ...]


def as_sites(where: Site | Sites) -> Sites:
    """One site or several, as a tuple of sites."""
    return (where,) if isinstance(where, Site) else where


def parse_site(text: str, n_layer: int) -> Site:
    """``"resid.mid"`` or ``"mlp_act.2"`` as a :class:`Site`; a :class:`UserError` names what exists otherwise."""
    stream, _, layer = str(text).partition(".")
    number = n_layer // 2 if layer == "mid" else int(layer) if layer.isdecimal() and layer.isascii() else -1
    lowest = 0 if stream == "resid" else 1
    if stream not in STREAMS or not lowest <= number <= n_layer:
        raise UserError(
            f"site={text!r} does not exist: use resid.0 to resid.{n_layer}, or mlp_in, mlp_act, mlp_out with a block from 1 to {n_layer}, or .mid"
        )
    return Site(stream, number)


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The transformer blocks of a causal language model whose layout is known."""
    return model.get_submodule(layout_of_model(model).blocks)


class _Stop(Exception):
    """Ends a forward pass once every wanted site has been seen."""


def _hook(model: nn.Module, site: Site, fn: Callable[[Tensor], Tensor | None]) -> Any:
    """Register ``fn`` at a site: it sees the activation (B, T, D) and may return a replacement."""
    blocks = blocks_of(model)

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = fn(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def on_input(_module: nn.Module, args: Any) -> Any:
        new = fn(args[0])
        return None if new is None else (new, *args[1:])

    if site.stream == "resid":
        return blocks[0].register_forward_pre_hook(on_input) if site.layer == 0 else blocks[site.layer - 1].register_forward_hook(on_output)
    layout, block = layout_of_model(model), blocks[site.layer - 1]
    if site.stream == "mlp_in":
        return block.get_submodule(layout.up).register_forward_pre_hook(on_input)
    down = block.get_submodule(layout.down)  # what it reads is the hidden activation
    return down.register_forward_pre_hook(on_input) if site.stream == "mlp_act" else down.register_forward_hook(on_output)


@contextmanager
def capture(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Within the context, every forward pass fills the yielded dict with the activations (B, T, D) at ``sites``."""
    found: dict[Site, Tensor] = {}
    with ExitStack() as stack:
        for site in sites:
            handle = _hook(model, site, lambda x, site=site: found.__setitem__(site, x))
            stack.callback(handle.remove)
        yield found


@contextmanager
def patched(model: nn.Module, site: Site, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context, the activation (B, T, D) at ``site`` is replaced by ``fn`` of it."""
    handle = _hook(model, site, fn)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def activations(model: nn.Module, tokens: Tensor, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Activations at ``sites`` for ``tokens`` (B, T); the forward pass ends at the last of them."""
    found: dict[Site, Tensor] = {}

    def see(site: Site, x: Tensor) -> None:
        found[site] = x
        if len(found) == len(sites):
            raise _Stop

    with ExitStack() as stack:
        for site in sites:
            stack.callback(_hook(model, site, lambda x, site=site: see(site, x)).remove)
        with suppress(_Stop):
            model(input_ids=tokens, use_cache=False)
    return found


class Kept(NamedTuple):
    """How activations stand in a file of half precision: ``(x - centre) / unit``, so that neither a large mean nor a small unit costs digits."""

    centre: Tensor  # (D,) float32
    unit: float  # a power of two, which costs none by itself

    @staticmethod
    def like(x: Tensor) -> Kept:
        """For rows like ``x`` (N, D): about their mean, in units of about their spread."""
        centre = x.double().mean(0)
        spread = float((x.double() - centre).square().mean().sqrt())
        return Kept(centre.float().cpu(), 2.0 ** round(math.log2(spread)) if spread > 1e-30 else 1.0)


class Store:
    """Activations of one split on disk: ``n_windows`` windows of ``length`` characters, one memory-mapped (N, D) file a site.

    Row ``w * length + t`` is position t of window w, whose text starts at ``starts[w]`` of the split. Memory use is bounded by the
    batches read, whatever the size of the store.
    """

    def __init__(self, folder: Path) -> None:
        info = read_json(folder / "store.json")
        self.folder, self.key, self.length, self.split = folder, info["key"], info["length"], info["split"]
        self.starts = np.load(folder / "starts.npy", allow_pickle=False)
        self.n_rows = len(self.starts) * self.length
        self.sites = {Site(*s["site"]): self._open(s) for s in info["sites"]}
        self._kept = {Site(*s["site"]): self._kept_as(s) for s in info["sites"] if "centre" in s}
        self._order: tuple[tuple[int, int, int, int], np.ndarray] | None = None

    def _open(self, s: dict[str, Any]) -> np.ndarray:
        return np.memmap(self.folder / s["file"], dtype=s["dtype"], mode="r", shape=(self.n_rows, s["width"]))

    def _kept_as(self, s: dict[str, Any]) -> Kept:
        return Kept(torch.from_numpy(np.load(self.folder / s["centre"], allow_pickle=False)), s["unit"])

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

    def index_at(self, step: int, *, rows: int, seed: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """Row numbers of batch ``step``: the rows first..last in an order shuffled anew each epoch, a function of (seed, step) alone."""
        n = (last or self.n_rows) - first
        if rows > n:
            raise UserError(f"a batch of {rows} rows was asked for, but the store has {n}: collect more windows or use a smaller fit.batch_size")
        per_epoch = n // rows
        epoch, within = divmod(step, per_epoch)
        name = (seed, epoch, first, n)
        if self._order is None or self._order[0] != name:
            order = np.random.default_rng([seed & 0xFFFFFFFF, seed >> 32, epoch]).permutation(n).astype(np.int32)
            self._order = (name, order)
        return np.sort(self._order[1][within * rows : (within + 1) * rows]) + first


def _taken(rows: np.ndarray, index: np.ndarray | slice) -> np.ndarray:
    """A copy of some rows: the map is read-only, and a tensor must not be. ``take`` is quicker than an index, as torch is at converting the copy."""
    return np.array(rows[index]) if isinstance(index, slice) else np.take(rows, index, axis=0)


def collect(
    model: nn.Module, tokens_of: Callable[[np.ndarray], Tensor], starts: np.ndarray, sites: Sequence[Site], *, length: int, split: str,
    cache: Path, key: Mapping[str, Any], dtype: str, batch: int, tick: Callable[[int, int], None] = lambda done, total: None,
) -> Store:  # fmt: skip
    """The store of ``sites`` over the windows that begin at ``starts`` (``tokens_of(starts)`` gives their ids (n, length)).

    Made in the cache under ``key`` unless it is there. Raises :class:`UserError` when an activation is not finite or too large for ``dtype``.
    """
    full = {"what": "store", "of": dict(key), "sites": [str(s) for s in sites], "length": length, "split": split, "dtype": dtype, "n": len(starts),
            "starts": hashlib.sha256(np.ascontiguousarray(starts, dtype=np.int64)).hexdigest(),
            "source": source_digest(__name__, alone=modules_behind(tokens_of))}  # fmt: skip
    device = next(model.parameters()).device

    def make(folder: Path) -> None:
        # Written as files and not through memory maps: a full disk is then an error with a name, where a map would kill the process.
        files: dict[Site, Any] = {}
        widths: dict[Site, int] = {}
        kept: dict[Site, Kept] = {}
        with ExitStack() as stack:
            _collect(folder, files, widths, kept, stack)
        np.save(folder / "starts.npy", starts)
        listed = [{"site": list(s), "file": f"{s}.bin", "dtype": dtype, "width": width} for s, width in widths.items()]
        for info, site in zip(listed, widths, strict=True):
            if site in kept:
                np.save(folder / f"{site}.centre.npy", kept[site].centre.numpy())
                info |= {"centre": f"{site}.centre.npy", "unit": kept[site].unit}
        write_json(folder / "store.json", {"key": full, "length": length, "split": split, "sites": listed})

    def _collect(folder: Path, files: dict[Site, Any], widths: dict[Site, int], kept: dict[Site, Kept], stack: ExitStack) -> None:
        for begin in range(0, len(starts), batch):
            part = starts[begin : begin + batch]
            for site, x in activations(model, tokens_of(part).to(device), sites).items():
                x = x.reshape(-1, x.shape[-1]).float()
                if not bool(torch.isfinite(x).all()):
                    raise NonFinite(f"activations at {site} are not finite (window at {part[0]} of {split}): the language model is broken")
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
