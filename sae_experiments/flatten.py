"""Nested mappings, such as a configuration, as one level of dotted keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(
    tree: Mapping[str, Any], *, lists: bool = False, branches: bool = False
) -> dict[str, Any]:
    """Turn `{"a": {"b": 1}}` into `{"a.b": 1}`. An empty mapping is a value.

    Args:
        tree: Mapping to flatten.
        lists: Also enter lists that hold mappings or lists, by the number of the entry.
        branches: Also return the mappings on the way, under their own keys.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        below = _numbered(value) if lists and isinstance(value, list) else value
        enters = isinstance(below, Mapping) and bool(below)
        if branches or not enters:
            flat[str(key)] = value
        if enters:
            inner = flatten(below, lists=lists, branches=branches)
            flat |= {f"{key}.{name}": leaf for name, leaf in inner.items()}
    return flat


def _numbered(values: list[Any]) -> Any:
    """The entries by number if any of them is nested, else the list itself."""
    if any(isinstance(value, (dict, list)) for value in values):
        return {str(i): value for i, value in enumerate(values)}
    return values
