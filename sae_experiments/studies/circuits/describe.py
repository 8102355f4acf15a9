"""What the latents of a circuit answer to, in words: the n-gram that predicts their firing best, and their strongest contexts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from sae_experiments.metrics.rules import binarised
from sae_experiments.studies.circuits.comparators import Grams, Specific, most_specific

ORDERS = (1, 2, 3)
DOCUMENT = 8  # neighbouring windows that stay together when the text is halved


class Describer:
    """The latents of one SAE on a text: codes (N, F) of rows whose symbols are ``ids`` (N,), in windows of ``length``; ``pieces`` spells ids.

    A latent counts as on above ``threshold`` times the 99.9 % quantile of its non-zero magnitudes, as in the rules of the metrics.
    """

    def __init__(
        self,
        codes: sparse.csr_matrix,
        ids: np.ndarray,
        pieces: Sequence[str],
        length: int,
        *,
        threshold: float,
    ) -> None:
        self.ids, self.pieces, self.length = ids, pieces, length
        self.values = abs(codes[: len(ids)].tocsc())
        self.on = binarised(self.values, threshold)[0].tocsr()

    @cached_property
    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows (bool, (N,)) of every second document, which n-grams are found on, and of the others, which they are scored on."""
        windows = len(self.ids) // self.length
        block = self.length * max(1, min(DOCUMENT, windows // 2))
        even = np.arange(len(self.ids)) // block % 2 == 0
        return even, ~even

    def specific(self, order: int, min_fires: int) -> list[Specific]:
        """Latents most specific to one n-gram, no two to the same; found on one half of the text, in the order of the F1 there, scored on the other."""
        first = self.halves[0]
        return self.scored(
            most_specific(
                self.on[first], self._grams(order, 0), n=self.on.shape[1], min_fires=min_fires
            )
        )

    def best(self, orders: Sequence[int]) -> list[Specific | None]:
        """For each latent its best n-gram of one of the orders, found on one half of the text and scored on the other; None: it never fires there."""
        by_order = [self._grams(order, 0).best(self.on[self.halves[0]]) for order in orders]
        found = [
            max((s for s in options if s), key=lambda s: s.f1, default=None)
            for options in zip(*by_order, strict=True)
        ]
        scored = iter(self.scored([s for s in found if s]))
        return [next(scored) if s else None for s in found]

    def scored(self, found: Sequence[Specific]) -> list[Specific]:
        """F1 on the half of the text that n-grams are not found on; NaN where the text is a single window."""
        second, known = self.on[self.halves[1]], {}
        if not second.shape[0]:
            return [s._replace(f1=math.nan) for s in found]
        for order in sorted({len(s.gram) for s in found}):
            here = [i for i, s in enumerate(found) if len(s.gram) == order]
            known |= dict(
                zip(
                    here,
                    self._grams(order, 1).scored(second, [found[i] for i in here]),
                    strict=True,
                )
            )
        return [known[i] for i in range(len(found))]

    def _grams(self, order: int, half: int) -> Grams:
        return Grams(self.ids[self.halves[half]], self.length, order)

    @cached_property
    def rules(self) -> list[Specific | None]:
        """For each latent its best n-gram of one to three symbols."""
        return self.best(ORDERS)

    def spell(self, gram: Iterable[int]) -> str:
        """The text of ids, with spaces and line ends made visible."""
        return (
            "".join(self.pieces[i] for i in gram)
            .replace(" ", "\N{OPEN BOX}")
            .replace("\n", "\N{RETURN SYMBOL}")
        )

    def column(self, latent: int) -> np.ndarray:
        """Magnitudes (N,) of one latent."""
        return self.values[:, [latent]].toarray().ravel()

    def contexts(self, latent: int, n: int, before: int, after: int) -> list[dict[str, Any]]:
        """``{"before", "at", "after", "acts"}`` of the strongest firings, one a window: text no further than the window, a value a character."""
        values = self.column(latent)
        best = values.reshape(-1, self.length).argmax(1) + np.arange(0, len(values), self.length)
        best = best[values[best] > 0]
        return [
            self._context(values, int(row), before, after)
            for row in best[np.argsort(-values[best], kind="stable")[:n]]
        ]

    def _context(self, values: np.ndarray, row: int, before: int, after: int) -> dict[str, Any]:
        start = row - row % self.length
        begin, end = max(row - before, start), min(row + after + 1, start + self.length)
        texts = [
            [self.pieces[i] for i in self.ids[a:b]]
            for a, b in ((begin, row), (row, row + 1), (row + 1, end))
        ]
        parts = [p for part in texts for p in part]
        acts = [
            float(f"{v:.3g}")
            for p, v in zip(parts, values[begin:end].tolist(), strict=True)
            for _ in p
        ]
        return {
            **dict(zip(("before", "at", "after"), ("".join(part) for part in texts), strict=True)),
            "acts": acts,
        }

    def about(
        self,
        latents: Iterable[int],
        features: Mapping[int, Mapping[str, Any]],
        n: int,
        before: int,
        after: int,
    ) -> dict[int, dict[str, Any]]:
        """Rule and contexts of latents; the rule is that of the browser's ``features`` where these have one, else the best n-gram."""
        found = {}
        for j in latents:
            gram = self.rules[j]
            rule = features.get(j, {}).get("rule") or (
                f"{self.spell(gram.gram)} (F1 {gram.f1:.2f})" if gram else None
            )
            found[j] = {"rule": rule, "contexts": self.contexts(j, n, before, after)}
        return found

    def features(
        self, latents: Iterable[int], n: int, before: int, after: int
    ) -> list[dict[str, Any]]:
        """What the feature browser shows where the metrics gave nothing: texts of tokens that are more than characters."""
        fires = np.diff(self.values.indptr)
        rows, found = self.values.shape[0], []
        for j in latents:
            gram = self.rules[j]
            if gram is None:
                continue
            top = self.contexts(j, n, before, after)
            found.append(
                {
                    "latent": int(j),
                    "density": float(f"{fires[j] / rows:.4g}"),
                    "max": float(f"{self.column(j).max():.4g}"),
                    "rule": self.spell(gram.gram),
                    "f1": float(f"{gram.f1:.4g}"),
                    "order": len(gram.gram),
                    "top": top,
                }
            )
        return found
