"""A begin-of-text token before every window, which the callers of the model do not see."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

#: Names of the key/value cache among the arguments of a model's forward pass.
_CACHES = ("cache", "past_key_values")


class _Latest(NamedTuple):
    """A model's latest forward pass."""

    n_begin: int
    """Positions before the caller's first token."""
    n_read: int
    """Positions in all."""


_LATEST: WeakKeyDictionary[nn.Module, _Latest] = WeakKeyDictionary()


def begin_with(model: nn.Module, token: int) -> None:
    """Make `model` read the begin-of-text token before all that it is given.

    The token's position is in neither the logits nor the activations at sites
    (`models.hooks`), so that callers see the positions of their own tokens alone. With a key/value
    cache that holds something the text goes on, and no token is put before it.

    Args:
        model: A causal language model of transformers; it is changed.
        token: Id of the token.
    """

    def prepend(_model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        kwargs = {**kwargs, "input_ids": args[0]} if args else dict(kwargs)
        caches = [kwargs[name] for name in _CACHES if kwargs.get(name) is not None]
        goes_on = any(cache.get_seq_length() for cache in caches)
        if not goes_on:
            ids = kwargs["input_ids"]
            first = torch.full_like(ids[:, :1], token)
            kwargs["input_ids"] = torch.cat([first, ids], 1)
        _LATEST[model] = _Latest(0 if goes_on else 1, kwargs["input_ids"].shape[1])
        return args[1:], kwargs

    def drop(_model: nn.Module, _args: Any, output: Any) -> Any:
        # With `logits_to_keep` the first position is not among the logits.
        latest = _LATEST[model]
        if latest.n_begin and output.logits.shape[1] == latest.n_read:
            output.logits = output.logits[:, 1:]
        return output

    model.register_forward_pre_hook(prepend, with_kwargs=True)
    model.register_forward_hook(drop)


def n_begin(model: nn.Module) -> int:
    """Number of positions before the caller's first token in the model's latest forward pass."""
    latest = _LATEST.get(model)
    return latest.n_begin if latest else 0
