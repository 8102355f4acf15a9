"""Text contexts of a latent: where it fires most strongly, and a sample of its other firings."""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_experiments.files import rounded
from sae_experiments.metrics.codes import Text
from sae_experiments.sampling import evenly_spaced

#: Characters of an average token.
PER_TOKEN = 4
#: Signs that stand for the white space of a token.
VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def top_rows(text: Text, values: np.ndarray, n: int) -> np.ndarray:
    """Rows of the `n` largest values, at most one per window so that the places differ.

    Args:
        text: Text of the rows, in whole windows.
        values: One latent's activations, (N,).
        n: Largest number of rows.

    Returns:
        Row numbers, strongest first.
    """
    windows = values.reshape(-1, text.length)
    best = windows.argmax(1) + np.arange(0, len(values), text.length)
    best = best[values[best] > 0]
    return best[np.argsort(-values[best], kind="stable")[:n]]


def quantile_rows(values: np.ndarray, n: int) -> np.ndarray:
    """Rows at `n` evenly spaced quantiles of the non-zero values (N,), strongest first."""
    active = np.flatnonzero(values)
    order = active[np.argsort(-values[active], kind="stable")]
    if not len(order):
        return order
    return evenly_spaced(order, n)


def contexts_of(
    text: Text, values: np.ndarray, rows: np.ndarray, before: int, after: int
) -> list[dict[str, Any]]:
    """Text around rows, no further than their window, with the activation at each character.

    A token's activation stands at each of its characters.

    Args:
        text: Text of the rows.
        values: One latent's activations, (N,).
        rows: Rows to show.
        before: Characters shown before a row, or about as many characters of tokens.
        after: The same after a row.

    Returns:
        For each row a dict of `before`, `at` and `after` (text), `acts` (activation per character,
        three significant digits) and `row`, which tells whether two contexts are the same place.
        Of tokens also `tokens`, their texts with spaces made visible, and no `row`, which counts
        characters.
    """
    if text.pieces:
        return [
            _of_tokens(text, values, row, before // PER_TOKEN, after // PER_TOKEN)
            for row in rows.tolist()
        ]
    contexts = []
    for row in rows.tolist():
        window_start = row - row % text.length
        begin = max(row - before, window_start)
        end = min(row + after + 1, window_start + text.length)
        contexts.append(
            {
                "before": _to_string(text.chars[begin:row]),
                "at": _to_string(text.chars[row : row + 1]),
                "after": _to_string(text.chars[row + 1 : end]),
                "acts": [rounded(value, 3) or 0 for value in values[begin:end].tolist()],
                "row": row,
            }
        )
    return contexts


def _of_tokens(text: Text, values: np.ndarray, row: int, before: int, after: int) -> dict[str, Any]:
    """A context of one row, in tokens."""
    window_start = row - row % text.length
    begin = max(row - before, window_start)
    end = min(row + after + 1, window_start + text.length)
    pieces = text.parts(begin, end)
    acts = [rounded(value, 3) or 0 for value in values[begin:end].tolist()]
    at = row - begin
    return {
        "before": "".join(pieces[:at]),
        "at": pieces[at],
        "after": "".join(pieces[at + 1 :]),
        "acts": [act for piece, act in zip(pieces, acts, strict=True) for _ in piece],
        "tokens": [visible(piece) for piece in pieces],
    }


def visible(piece: str) -> str:
    """A token with its white space made visible."""
    for blank, shown in VISIBLE.items():
        piece = piece.replace(blank, shown)
    return piece


def _to_string(points: np.ndarray) -> str:
    return "".join(map(chr, points.tolist()))
