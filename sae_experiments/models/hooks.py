"""Reading and replacing a language model's activations, and a store of them on disk.

Sites are named ``<stream>.<block>``, blocks counted from 1: ``resid.3`` is the residual stream after block 3 (``resid.0``: the
embeddings), ``resid.mid`` after block n_layer // 2; ``mlp_in.2`` is what the MLP of block 2 reads (after its layer norm), ``mlp_act.2``
its hidden activations after the non-linearity, ``mlp_out.2`` what it writes. Shape letters: B sequences, T positions, D width, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.models.layouts import layout_of_model

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
    number = (
        n_layer // 2
        if layer == "mid"
        else int(layer)
        if layer.isdecimal() and layer.isascii()
        else -1
    )
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
        return (
            blocks[0].register_forward_pre_hook(on_input)
            if site.layer == 0
            else blocks[site.layer - 1].register_forward_hook(on_output)
        )
    layout, block = layout_of_model(model), blocks[site.layer - 1]
    if site.stream == "mlp_in":
        return block.get_submodule(layout.up).register_forward_pre_hook(on_input)
    down = block.get_submodule(layout.down)  # what it reads is the hidden activation
    return (
        down.register_forward_pre_hook(on_input)
        if site.stream == "mlp_act"
        else down.register_forward_hook(on_output)
    )


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
        return Kept(
            centre.float().cpu(), 2.0 ** round(math.log2(spread)) if spread > 1e-30 else 1.0
        )
