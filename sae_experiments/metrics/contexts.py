"""Where a latent fires, as text for people: its top contexts and a sample of all others by strength."""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_experiments.metrics.codes import Text


def top_rows(text: Text, values: np.ndarray, n: int) -> np.ndarray:
    """The rows of the ``n`` largest values (N,), strongest first, one a window so that they are different places."""
    best = values.reshape(-1, text.length).argmax(1) + np.arange(0, len(values), text.length)
    best = best[values[best] > 0]
    return best[np.argsort(-values[best], kind="stable")[:n]]


def quantile_rows(values: np.ndarray, n: int) -> np.ndarray:
    """Rows at ``n`` evenly spaced quantiles of the non-zero values, strongest first."""
    active = np.flatnonzero(values)
    order = active[np.argsort(-values[active], kind="stable")]
    return order[np.unique(np.linspace(0, len(order) - 1, min(n, len(order))).round().astype(int))] if len(order) else order


def contexts_of(text: Text, values: np.ndarray, rows: np.ndarray, before: int, after: int) -> list[dict[str, Any]]:
    """``{"before", "at", "after", "acts", "row"}`` for each row: text no further than the window, the value at every character of it (three
    significant digits), and the row, which tells whether two contexts are from the same place."""
    found = []
    for row in rows.tolist():
        start = row - row % text.length
        begin, end = max(row - before, start), min(row + after + 1, start + text.length)
        parts = [_string(text.chars[a:b]) for a, b in ((begin, row), (row, row + 1), (row + 1, end))]
        acts = [float(f"{v:.3g}") if v else 0 for v in values[begin:end].tolist()]
        found.append({"before": parts[0], "at": parts[1], "after": parts[2], "acts": acts, "row": row})
    return found


def _string(points: np.ndarray) -> str:
    return "".join(map(chr, points.tolist()))
