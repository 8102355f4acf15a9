"""Latents of a circuit in words: the n-gram that predicts their firing, and their contexts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from sae_experiments.metrics.rules import binarised
from sae_experiments.studies.circuits.comparators import Grams, Specific, most_specific

#: Lengths of the n-grams.
ORDERS = (1, 2, 3)
#: Neighbouring windows that stay together when the text is halved.
DOCUMENT = 8


class Describer:
    """The latents of one SAE on a text.

    A latent counts as on above a share of the 99.9 % quantile of its nonzero magnitudes, as in the
    rules of the metrics.

    Args:
        codes: Codes (N, F).
        ids: Ids of the text, (N,).
        pieces: Text of each id.
        length: Rows per window.
        threshold: Share of the quantile.
    """

    def __init__(
        self,
        codes: sparse.csr_matrix,
        ids: np.ndarray,
        pieces: list[str],
        length: int,
        *,
        threshold: float,
    ) -> None:
        self.ids = ids
        self.pieces = pieces
        self.length = length
        self.values = abs(codes[: len(ids)].tocsc())
        self.on = binarised(self.values, threshold)[0].tocsr()

    @cached_property
    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks (N,) of every second document, and of the others.

        N-grams are chosen on the first half and scored on the second.
        """
        windows = len(self.ids) // self.length
        block = self.length * max(1, min(DOCUMENT, windows // 2))
        even = np.arange(len(self.ids)) // block % 2 == 0
        return even, ~even

    def specific(self, order: int, min_fires: int) -> list[Specific]:
        """Latents that are most specific to an n-gram, at most one latent per n-gram.

        They are in the order of their F1 on the first half of the text, and scored on the second.

        Args:
            order: Length of the n-grams.
            min_fires: Firings on the first half that a latent needs.
        """
        on = self.on[self.halves[0]]
        grams = self._grams(order, 0)
        return self.scored(most_specific(on, grams, n=on.shape[1], min_fires=min_fires))

    def best(self, orders: Sequence[int]) -> list[Specific | None]:
        """The best n-gram of each latent, chosen on one half of the text and scored on the other.

        Args:
            orders: Lengths of the n-grams.

        Returns:
            One entry per latent; None if it never fires on the first half.
        """
        by_order = [self._grams(order, 0).best(self.on[self.halves[0]]) for order in orders]
        best: list[Specific | None] = []
        for options in zip(*by_order, strict=True):
            known = [s for s in options if s]
            best.append(max(known, key=lambda s: s.f1, default=None))
        scored = iter(self.scored([s for s in best if s]))
        return [next(scored) if s else None for s in best]

    def scored(self, specific: Sequence[Specific]) -> list[Specific]:
        """Replace the F1 by that on the second half of the text; NaN if the half is empty."""
        second = self.on[self.halves[1]]
        if not second.shape[0]:
            return [s._replace(f1=math.nan) for s in specific]
        scored: dict[int, Specific] = {}
        for order in sorted({len(s.gram) for s in specific}):
            here = [i for i, s in enumerate(specific) if len(s.gram) == order]
            grams = self._grams(order, 1)
            scored |= zip(here, grams.scored(second, [specific[i] for i in here]), strict=True)
        return [scored[i] for i in range(len(specific))]

    def _grams(self, order: int, half: int) -> Grams:
        return Grams(self.ids[self.halves[half]], self.length, order)

    @cached_property
    def rules(self) -> list[Specific | None]:
        """The best n-gram of each latent, of any of `ORDERS`."""
        return self.best(ORDERS)

    def spell(self, gram: Iterable[int]) -> str:
        """The text of ids, with spaces and line ends made visible."""
        text = "".join(self.pieces[i] for i in gram)
        return text.replace(" ", "\N{OPEN BOX}").replace("\n", "\N{RETURN SYMBOL}")

    def column(self, latent: int) -> np.ndarray:
        """Magnitudes (N,) of one latent."""
        return self.values[:, [latent]].toarray().ravel()

    def contexts(self, latent: int, n: int, before: int, after: int) -> list[dict[str, Any]]:
        """The strongest firings of a latent with the text around them, one per window.

        Args:
            latent: The latent.
            n: Number of contexts.
            before: Symbols shown before the firing, cut at the start of the window.
            after: Symbols shown after the firing.

        Returns:
            The texts `before`, `at` and `after`, and `acts`, one value per character.
        """
        values = self.column(latent)
        best = values.reshape(-1, self.length).argmax(1) + np.arange(0, len(values), self.length)
        best = best[values[best] > 0]
        rows = best[np.argsort(-values[best], kind="stable")[:n]]
        return [self._context(values, int(row), before, after) for row in rows]

    def _context(self, values: np.ndarray, row: int, before: int, after: int) -> dict[str, Any]:
        start = row - row % self.length
        begin, end = max(row - before, start), min(row + after + 1, start + self.length)
        parts = {
            "before": [self.pieces[i] for i in self.ids[begin:row]],
            "at": [self.pieces[self.ids[row]]],
            "after": [self.pieces[i] for i in self.ids[row + 1 : end]],
        }
        pieces = [piece for part in parts.values() for piece in part]
        acts: list[float] = []
        for piece, value in zip(pieces, values[begin:end].tolist(), strict=True):
            acts += [float(f"{value:.3g}")] * len(piece)
        return {name: "".join(part) for name, part in parts.items()} | {"acts": acts}

    def about(
        self,
        latents: Iterable[int],
        features: Mapping[int, Mapping[str, Any]],
        n: int,
        before: int,
        after: int,
    ) -> dict[int, dict[str, Any]]:
        """Rule and contexts of latents.

        Args:
            latents: The latents.
            features: Descriptions by latent, whose rules are preferred to the best n-gram.
            n: Number of contexts.
            before: Symbols of a context before the firing.
            after: Symbols after it.
        """
        described = {}
        for j in latents:
            gram = self.rules[j]
            rule = features.get(j, {}).get("rule")
            if not rule and gram:
                rule = f"{self.spell(gram.gram)} (F1 {gram.f1:.2f})"
            described[j] = {"rule": rule or None, "contexts": self.contexts(j, n, before, after)}
        return described

    def features(
        self, latents: Iterable[int], n: int, before: int, after: int
    ) -> list[dict[str, Any]]:
        """Entries of the feature browser, for texts whose tokens are more than characters.

        Args:
            latents: The latents; those that never fire are left out.
            n: Number of contexts.
            before: Tokens of a context before the firing.
            after: Tokens after it.
        """
        fires = np.diff(self.values.indptr)
        rows = self.values.shape[0]
        described = []
        for j in latents:
            gram = self.rules[j]
            if gram is None:
                continue
            top = self.contexts(j, n, before, after)
            described.append(
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
        return described
