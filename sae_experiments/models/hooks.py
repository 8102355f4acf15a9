"""Reading and replacing a language model's activations at its sites.

Sites are named `<stream>.<block>`, blocks counted from 1: `resid.3` is the residual stream after
block 3 (`resid.0`: the embeddings), `resid.mid` after block n_layer // 2; `attn_out.2` is what
the attention of block 2 adds to the stream, `mlp_in.2` what its MLP reads (after the norm),
`mlp_act.2` the MLP's hidden activations, `mlp_out.2` what it adds to the stream.

Shape letters: B sequences, T positions, D width, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.models.begin import n_begin
from sae_experiments.models.layouts import (
    CausalLM,
    Layout,
    embeddings,
    layout_of_model,
    unembedding,
)
from sae_experiments.models.norms import HALF

STREAMS = ("resid", "attn_out", "mlp_in", "mlp_act", "mlp_out")
#: Streams that are the input of a module of the layout; the others are outputs.
_INPUTS = ("mlp_in", "mlp_act")

#: Sees an activation (B, T, D) and may return its replacement.
See = Callable[[Tensor], Tensor | None]


class Site(NamedTuple):
    """A place in a language model."""

    stream: str
    """One of `STREAMS`."""
    layer: int
    """Block, counted from 1; 0 only for the residual stream: the embeddings."""

    def __str__(self) -> str:
        return f"{self.stream}.{self.layer}"


Sites = tuple[Site, ...]


def as_sites(where: Site | Sites) -> Sites:
    """One site or several, as a tuple of sites."""
    return (where,) if isinstance(where, Site) else where


def parse_site(text: str, n_layer: int) -> Site:
    """Read the name of a site, such as `resid.mid` or `mlp_act.2`.

    Args:
        text: The name.
        n_layer: Number of blocks of the model.

    Raises:
        UserError: There is no such site; the line names those that exist.
    """
    stream, _, layer = str(text).partition(".")
    number = -1
    if layer == "mid":
        number = n_layer // 2
    elif layer.isdecimal() and layer.isascii():
        number = int(layer)
    lowest = 0 if stream == "resid" else 1
    if stream not in STREAMS or not lowest <= number <= n_layer:
        inside = ", ".join(s for s in STREAMS if s != "resid")
        raise UserError(
            f"site={text!r} does not exist: use resid.0 to resid.{n_layer}, or {inside} with a "
            f"block from 1 to {n_layer}, or .mid"
        )
    return Site(stream, number)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """Transformer blocks of a causal language model whose layout is known."""
    return cast("nn.ModuleList", model.get_submodule(layout_of_model(model).blocks))


class _Stop(Exception):
    """Ends a forward pass once every wanted site has been seen."""


def _module_at(layout: Layout, blocks: nn.ModuleList, site: Site) -> tuple[nn.Module, bool]:
    """The module at a site, and whether the site is its input."""
    if site.stream == "resid":
        return (blocks[site.layer - 1], False) if site.layer else (blocks[0], True)
    path = getattr(layout, site.stream)
    return blocks[site.layer - 1].get_submodule(path), site.stream in _INPUTS


def _hook(model: nn.Module, site: Site, see: See, stack: ExitStack) -> None:
    """Let `see` have the activations (B, T, D) at a site, and replace them, until `stack` ends."""
    layout, blocks = layout_of_model(model), blocks_of(model)
    module, is_input = _module_at(layout, blocks, site)
    shape: list[int] = []

    def of_text(x: Tensor) -> Tensor | None:
        """The positions of the caller's tokens, in whatever form the module has them."""
        rows = x.unflatten(0, shape) if x.ndim == 2 else x
        first = n_begin(model)
        text = rows[:, first:]
        new = see(text.float() if text.dtype in HALF else text)
        if new is None:
            return None
        new = new.to(rows.dtype)
        new = torch.cat([rows[:, :first], new], 1) if first else new
        return new.flatten(0, 1) if x.ndim == 2 else new

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = of_text(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def on_input(_module: nn.Module, args: Any) -> Any:
        new = of_text(args[0])
        return None if new is None else (new, *args[1:])

    if layout.flat and site.stream != "resid":

        def note_shape(_block: nn.Module, args: Any) -> None:
            shape[:] = args[0].shape[:2]

        stack.callback(blocks[site.layer - 1].register_forward_pre_hook(note_shape).remove)
    if is_input:
        stack.callback(module.register_forward_pre_hook(on_input).remove)
    else:
        stack.callback(module.register_forward_hook(on_output).remove)


@contextmanager
def capture(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Within the context, collect the activations of every forward pass.

    Args:
        model: The language model.
        sites: Where to read.

    Yields:
        A dict that each forward pass fills with the activations (B, T, D) at `sites`.
    """
    seen: dict[Site, Tensor] = {}
    with ExitStack() as stack:
        for site in sites:
            _hook(model, site, lambda x, site=site: seen.__setitem__(site, x), stack)
        yield seen


@contextmanager
def patched(model: nn.Module, site: Site, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context, replace the activation x (B, T, D) at `site` by `fn(x)`."""
    with ExitStack() as stack:
        _hook(model, site, fn, stack)
        yield


class Prefix(NamedTuple):
    """A forward pass as far as the first site that is to be replaced.

    Later passes on the same tokens continue from there, with bit-identical results.
    """

    n_blocks: int
    """Number of blocks that need not run again."""
    stream: Tensor | None
    """Output of the last of them, (B, T', D) with the begin token; None before any pass."""
    n_others: int | None
    """Number of other values that the block returns, which no block reads; None: no tuple."""

    def part(self, rows: slice | Tensor) -> Prefix:
        """The prefix of some of the B windows."""
        return self._replace(stream=None if self.stream is None else self.stream[rows])


@contextmanager
def prefix_of(model: nn.Module, sites: Sequence[Site]) -> Iterator[list[Prefix]]:
    """Within the context, collect the prefix of forward passes up to the first of some sites.

    Args:
        model: The language model.
        sites: Sites that are to be replaced in later passes.

    Yields:
        A list whose last entry is the prefix of the last pass.
    """
    n_blocks = min(s.layer if s.stream == "resid" else s.layer - 1 for s in sites)
    prefixes: list[Prefix] = []

    def keep(_block: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            prefixes.append(Prefix(n_blocks, output[0], len(output) - 1))
        else:
            prefixes.append(Prefix(n_blocks, output, None))

    if not n_blocks:
        prefixes.append(Prefix(0, None, None))
        yield prefixes
        return
    handle = blocks_of(model)[n_blocks - 1].register_forward_hook(keep)
    try:
        yield prefixes
    finally:
        handle.remove()


@contextmanager
def resumed(model: nn.Module, prefix: Prefix | None) -> Iterator[None]:
    """Within the context, forward passes continue from a prefix; None: from the start."""
    if prefix is None or not prefix.n_blocks:
        yield
        return
    skipped = blocks_of(model)[: prefix.n_blocks]
    output: Any = prefix.stream
    if prefix.n_others is not None:
        output = (prefix.stream, *[None] * prefix.n_others)
    with ExitStack() as stack:
        for block in skipped:
            own = vars(block).get("forward")  # of a block that a library has wrapped
            vars(block)["forward"] = lambda *args, **options: output
            stack.callback(_restore_forward, block, own)
        yield


def _restore_forward(block: nn.Module, own: Any) -> None:
    """Give a block its forward back: its own attribute, or else its class's."""
    del vars(block)["forward"]
    if own is not None:
        vars(block)["forward"] = own


@contextmanager
def spliced(
    model: nn.Module,
    by_site: Mapping[Site, Tensor],
    rows: Tensor | None = None,
    prefix: Prefix | None = None,
) -> Iterator[None]:
    """Within the context, replace the activations at some sites by given ones.

    Args:
        model: The language model.
        by_site: New activations (B, T, D) by site.
        rows: Rows to replace, (B T,); the others stay as they are. None: all.
        prefix: Prefix from which the passes continue; None: they run from the start.
    """

    def put(old: Tensor, new: Tensor) -> Tensor:
        new = new.to(old.dtype)
        return new if rows is None else torch.where(rows.view(*new.shape[:2], 1), new, old)

    with ExitStack() as stack:
        stack.enter_context(resumed(model, prefix))
        for site, value in by_site.items():
            _hook(model, site, lambda old, new=value: put(old, new), stack)
        yield


def joined(prefixes: Sequence[Prefix]) -> Prefix:
    """Join the prefixes of several passes into one for all of their windows."""
    streams = [p.stream for p in prefixes if p.stream is not None]
    return prefixes[0]._replace(stream=torch.cat(streams) if streams else None)


@torch.no_grad()
def activations(model: nn.Module, tokens: Tensor, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Activations at `sites` for `tokens` (B, T); the forward pass ends at the last of them.

    Returns:
        By site, (B, T, D).
    """
    seen: dict[Site, Tensor] = {}

    def see(site: Site, x: Tensor) -> None:
        seen[site] = x
        if len(seen) == len(sites):
            raise _Stop

    with ExitStack() as stack:
        for site in sites:
            _hook(model, site, lambda x, site=site: see(site, x), stack)
        with suppress(_Stop):
            model(input_ids=tokens, use_cache=False)
    return seen


@torch.no_grad()
def check_layout(model: CausalLM, where: str) -> None:
    """Check on random tokens that a loaded model is what its layout says.

    Every block must add its attention's and its MLP's writes to the stream, and the head of the
    last norm of the last stream must give the logits.

    Args:
        model: The language model.
        where: What was read, for the message.

    Raises:
        UserError: A sum does not hold: an option of the model is not known here.
    """
    n_layer = len(blocks_of(model))
    inside = [Site(s, i + 1) for s in ("attn_out", "mlp_out") for i in range(n_layer)]
    streams = [Site("resid", i) for i in range(n_layer + 1)]
    vocabulary = embeddings(model)
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(vocabulary), (2, 11), generator=chance).to(vocabulary.device)
    with capture(model, [*streams, *inside]) as seen:
        logits = model(input_ids=tokens, use_cache=False).logits.float()
    limit = 1e-3 if vocabulary.dtype == torch.float32 else 5e-2
    norm = model.get_submodule(layout_of_model(model).norm)
    again = unembedding(model)(norm(seen[streams[-1]].to(vocabulary.dtype))).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    pairs = {"the logits": (cap * torch.tanh(again / cap) if cap else again, logits)}
    for i in range(n_layer):
        writes = [seen[Site(s, i + 1)].float() for s in ("attn_out", "mlp_out")]
        total = seen[streams[i]].float() + writes[0] + writes[1]
        pairs[f"the stream after block {i + 1}"] = (total, seen[streams[i + 1]].float())
    for what, (computed, wanted) in pairs.items():
        error = float((computed - wanted).norm() / wanted.norm().clamp_min(1e-12))
        if not error < limit:
            raise UserError(
                f"{where}: {what} of {type(model).__name__} is not what its layout says (relative "
                f"error {error:.2g}): an option in its config.json is not known here"
            )


class Kept(NamedTuple):
    """Half-precision encoding of activations, `(x - centre) / unit`.

    It loses no digits to a large mean or a small scale of the activations.
    """

    centre: Tensor
    """Mean of the rows, (D,) float32."""
    unit: float
    """A power of two, which costs no digits itself."""

    @staticmethod
    def like(x: Tensor) -> Kept:
        """Build the encoding for rows like `x` (N, D): centred, in units close to their spread."""
        centre = x.double().mean(0)
        spread = float((x.double() - centre).square().mean().sqrt())
        unit = 2.0 ** round(math.log2(spread)) if spread > 1e-30 else 1.0
        return Kept(centre.float().cpu(), unit)
