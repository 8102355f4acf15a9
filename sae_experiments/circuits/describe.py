"""What the latents of a circuit answer to, in words: the n-gram that predicts their firing best, and their strongest contexts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from sae_experiments.circuits.comparators import Grams, Specific
from sae_experiments.metrics.rules import binarised

ORDERS = (1, 2, 3)


class Describer:
    """The latents of one SAE on a text: codes (N, F) of rows whose symbols are ``ids`` (N,), in windows of ``length``; ``pieces`` spells ids.

    A latent counts as on above ``threshold`` times the 99.9 % quantile of its non-zero magnitudes, as in the rules of the metrics.
    """

    def __init__(self, codes: sparse.csr_matrix, ids: np.ndarray, pieces: Sequence[str], length: int, *, threshold: float) -> None:
        self.ids, self.pieces, self.length = ids, pieces, length
        self.values = abs(codes[: len(ids)].tocsc())
        self.on = binarised(self.values, threshold)[0].tocsr()

    def grams(self, order: int) -> Grams:
        """The n-grams of the text."""
        return Grams(self.ids, self.length, order)

    @cached_property
    def rules(self) -> list[Specific | None]:
        """For each latent the n-gram of one to three symbols whose F1 is best."""
        by_order = [self.grams(order).best(self.on) for order in ORDERS]
        return [max((s for s in options if s), key=lambda s: s.f1, default=None) for options in zip(*by_order, strict=True)]

    def spell(self, gram: Iterable[int]) -> str:
        """The text of ids, with spaces and line ends made visible."""
        return "".join(self.pieces[i] for i in gram).replace(" ", "\N{OPEN BOX}").replace("\n", "\N{RETURN SYMBOL}")

    def column(self, latent: int) -> np.ndarray:
        """Magnitudes (N,) of one latent."""
        return self.values[:, [latent]].toarray().ravel()

    def contexts(self, latent: int, n: int, before: int, after: int) -> list[dict[str, Any]]:
        """``{"before", "at", "after", "acts"}`` of the strongest firings, one a window: text no further than the window, a value a character."""
        values = self.column(latent)
        best = values.reshape(-1, self.length).argmax(1) + np.arange(0, len(values), self.length)
        best = best[values[best] > 0]
        return [self._context(values, int(row), before, after) for row in best[np.argsort(-values[best], kind="stable")[:n]]]

    def _context(self, values: np.ndarray, row: int, before: int, after: int) -> dict[str, Any]:
        start = row - row % self.length
        begin, end = max(row - before, start), min(row + after + 1, start + self.length)
        texts = [[self.pieces[i] for i in self.ids[a:b]] for a, b in ((begin, row), (row, row + 1), (row + 1, end))]
        parts = [p for part in texts for p in part]
        acts = [float(f"{v:.3g}") for p, v in zip(parts, values[begin:end].tolist(), strict=True) for _ in p]
        return {**dict(zip(("before", "at", "after"), ("".join(part) for part in texts), strict=True)), "acts": acts}

    def about(self, latents: Iterable[int], features: Mapping[int, Mapping[str, Any]], n: int, before: int, after: int) -> dict[int, dict[str, Any]]:
        """Rule and contexts of latents; the rule is that of the browser's ``features`` where these have one, else the best n-gram."""
        found = {}
        for j in latents:
            gram = self.rules[j]
            rule = features.get(j, {}).get("rule") or (f"{self.spell(gram.gram)} (F1 {gram.f1:.2f})" if gram else None)
            found[j] = {"rule": rule, "contexts": self.contexts(j, n, before, after)}
        return found

    def features(self, latents: Iterable[int], n: int, before: int, after: int) -> list[dict[str, Any]]:
        """What the feature browser shows where the metrics gave nothing: texts of tokens that are more than characters."""
        fires = np.diff(self.values.indptr)
        rows, found = self.values.shape[0], []
        for j in latents:
            gram = self.rules[j]
            if gram is None:
                continue
            top = self.contexts(j, n, before, after)
            found.append({"latent": int(j), "density": float(f"{fires[j] / rows:.4g}"), "max": float(f"{self.column(j).max():.4g}"),
                          "rule": self.spell(gram.gram), "f1": float(f"{gram.f1:.4g}"), "order": len(gram.gram), "top": top})  # fmt: skip
        return found
