"""A begin-of-text token before every window, which the callers of the model do not see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

#: Names of the key/value cache among the arguments of a model's forward pass.
_CACHES = ("cache", "past_key_values")


@dataclass
class _Begin:
    """Begin-of-text token of a model, and its latest forward pass."""

    token: int
    """Its id."""
    held_back: bool = False
    """True while nothing is put before the input."""
    n_begin: int = 0
    """Positions before the caller's first token in the latest pass."""
    n_read: int = 0
    """Positions in all in the latest pass."""


_BEGINS: WeakKeyDictionary[nn.Module, _Begin] = WeakKeyDictionary()


def begin_with(model: nn.Module, token: int) -> None:
    """Make `model` read the begin-of-text token before all that it is given.

    The token's position is in neither the logits nor the activations at sites (`models.hooks`), so
    that callers see the positions of their own tokens alone. If the key/value cache is not empty,
    the input continues a text, and no token is added.

    Args:
        model: A causal language model of transformers; it is changed.
        token: Id of the token.
    """
    begin = _BEGINS[model] = _Begin(token)

    def prepend(reader: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        kwargs = {**kwargs, "input_ids": args[0]} if args else dict(kwargs)
        caches = [kwargs[name] for name in _CACHES if kwargs.get(name) is not None]
        goes_on = begin.held_back or any(cache.get_seq_length() for cache in caches)
        if not goes_on:
            kwargs["input_ids"] = with_begin(reader, kwargs["input_ids"])
        begin.n_begin = 0 if goes_on else 1
        begin.n_read = kwargs["input_ids"].shape[1]
        return args[1:], kwargs

    def drop(_model: nn.Module, _args: Any, output: Any) -> Any:
        # With `logits_to_keep` the first position is not among the logits.
        if begin.n_begin and output.logits.shape[1] == begin.n_read:
            output.logits = output.logits[:, 1:]
        return output

    model.register_forward_pre_hook(prepend, with_kwargs=True)
    model.register_forward_hook(drop)


def with_begin(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Token ids (B, T) with the model's begin-of-text token before them, if it has one."""
    begin = _BEGINS.get(model)
    if begin is None:
        return tokens
    return torch.cat([torch.full_like(tokens[:, :1], begin.token), tokens], 1)


@contextmanager
def as_given(model: nn.Module) -> Iterator[None]:
    """Within the context, the model reads its input without a begin-of-text token."""
    begin = _BEGINS.get(model)
    if begin is None:
        yield
        return
    begin.held_back = True
    try:
        yield
    finally:
        begin.held_back = False


def n_begin(model: nn.Module) -> int:
    """Number of positions before the caller's first token in the model's latest forward pass."""
    begin = _BEGINS.get(model)
    return begin.n_begin if begin else 0
