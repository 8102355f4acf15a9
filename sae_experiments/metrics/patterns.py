"""Patterns over the last characters, as sets of text positions held in bits: matching one costs microseconds.

A pattern says for each of the last ``LAGS`` characters which symbols may stand there (one symbol, a class, or anything), and may ask for a
state of the reader (a causal concept) on top. A rule is up to a few patterns, one of which must match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sae_experiments.metrics.concepts import CLASSES

LAGS = 6
ANY = 0
_POPULATION = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)


class Pattern(NamedTuple):
    """Element numbers for the characters 0 to LAGS - 1 back, and the number of a state (-1: none)."""

    elements: tuple[int, ...]
    state: int = -1

    @property
    def length(self) -> int:
        """How many things it asks for."""
        return sum(e != ANY for e in self.elements) + (self.state >= 0)


class Element(NamedTuple):
    """What may stand at one place: its name in a rule, its symbols (code points), and more general elements."""

    name: str
    symbols: frozenset[int]
    wider: tuple[int, ...]


def elements_of(symbols: Sequence[str]) -> list[Element]:
    """Anything, every class that has two of the symbols, and every symbol."""
    points = [ord(s) for s in symbols]
    sets = [("any", frozenset(points))]
    for name, members in CLASSES.items():
        here = frozenset(points) & {ord(c) for c in members}
        if len(here) > 1:
            sets.append((name, here))
    sets += [(s, frozenset([ord(s)])) for s in symbols]
    return [Element(n, s, tuple(j for j, (_, other) in enumerate(sets) if s < other)) for n, s in sets]


def pack(mask: np.ndarray) -> np.ndarray:
    """Booleans (..., N) as bits in 64-bit words, padded with zeros."""
    bits = np.packbits(mask, axis=-1)
    padded = np.zeros((*bits.shape[:-1], -(-bits.shape[-1] // 8) * 8), np.uint8)
    padded[..., : bits.shape[-1]] = bits
    return padded.view(np.uint64)


def unpack(bits: np.ndarray, n: int) -> np.ndarray:
    """The first ``n`` booleans of packed ones."""
    return np.unpackbits(bits.view(np.uint8), axis=-1)[..., :n].astype(bool)


def count(bits: np.ndarray) -> np.ndarray:
    """How many bits are set, over the last axis."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(bits).sum(-1, dtype=np.int64)
    return _POPULATION[bits.view(np.uint8)].sum(-1, dtype=np.int64)


class Matcher:
    """Which of the N positions each element matches at each lag, and each state; a lag that reaches over the window's start matches nothing
    but anything."""

    def __init__(self, elements: Sequence[Element], chars: np.ndarray, offset: np.ndarray, states: np.ndarray, rows: np.ndarray) -> None:
        self.elements, self.n = elements, len(rows)
        self.at = {}
        for lag in range(LAGS):
            seen, visible = chars[np.maximum(rows - lag, 0)], offset[rows] >= lag
            for i, e in enumerate(elements):
                self.at[i, lag] = pack(np.ones(self.n, bool) if i == ANY else np.isin(seen, list(e.symbols)) & visible)
        self.states = pack(states[:, rows])

    def match(self, pattern: Pattern) -> np.ndarray:
        """Packed positions where the pattern matches."""
        bits = self.at[ANY, 0] if pattern.state < 0 else self.states[pattern.state]
        for lag, element in enumerate(pattern.elements):
            if element != ANY:
                bits = bits & self.at[element, lag]
        return bits

    def match_any(self, rule: Sequence[Pattern]) -> np.ndarray:
        """Packed positions where one of the patterns matches."""
        bits = np.zeros_like(self.at[ANY, 0])
        for pattern in rule:
            bits = bits | self.match(pattern)
        return bits


class Quality(NamedTuple):
    """How well a set of positions meets a target set."""

    precision: float
    recall: float
    f1: float


def quality(found: np.ndarray, target: np.ndarray) -> Quality:
    """Precision, recall and F1 of packed positions; 0 where there are none."""
    hits, said, wanted = int(count(found & target)), int(count(found)), int(count(target))
    return Quality(hits / max(said, 1), hits / max(wanted, 1), 2 * hits / max(said + wanted, 1))


def generalise(matcher: Matcher, literal: Pattern, target: np.ndarray, keep: float) -> tuple[Pattern, float]:
    """The pattern of best F1 on the way from ``literal`` to more general ones, and that F1.

    One place is widened at a time, to what gives the best F1 among the choices whose precision is at least ``keep`` of the one before.
    """
    wanted, pattern = int(count(target)), literal
    now = quality(matcher.match(pattern), target)
    best = (pattern, now.f1)
    while True:
        choices = _widened(matcher, pattern)
        if not choices:
            return best
        bits = np.stack([b for _, b in choices])
        hits, said = count(bits & target), count(bits)
        precision, f1 = hits / np.maximum(said, 1), 2 * hits / np.maximum(said + wanted, 1)
        f1 = np.where(precision >= keep * now.precision, f1, -1)
        at = int(f1.argmax())
        if f1[at] < 0:
            return best
        pattern, now = choices[at][0], Quality(float(precision[at]), float(hits[at] / max(wanted, 1)), float(f1[at]))
        if now.f1 >= best[1]:
            best = (pattern, now.f1)


def _widened(matcher: Matcher, pattern: Pattern) -> list[tuple[Pattern, np.ndarray]]:
    """Every pattern with one place wider, with the positions it matches; the widest choices of a place first."""
    found = []
    for lag, element in enumerate(pattern.elements):
        if element == ANY:
            continue
        others = matcher.match(Pattern((*pattern.elements[:lag], ANY, *pattern.elements[lag + 1 :]), pattern.state))
        for wider in matcher.elements[element].wider:
            new = Pattern((*pattern.elements[:lag], wider, *pattern.elements[lag + 1 :]), pattern.state)
            found.append((new, others if wider == ANY else others & matcher.at[wider, lag]))
    return found


def find_rule(matcher: Matcher, literals: Sequence[Pattern], target: np.ndarray, *, keep: float, most: int, gain: float) -> list[Pattern]:
    """At most ``most`` patterns whose union has a high F1: from the literals of contexts where a latent fires, and from the states alone.

    Patterns are taken greedily as long as each adds ``gain`` to the F1; a state is added to a pattern where that adds as much.
    """
    found = dict.fromkeys(generalise(matcher, literal, target, keep)[0] for literal in literals)
    found |= dict.fromkeys(_with_state(matcher, p, target, gain) for p in list(found))
    found |= dict.fromkeys(Pattern((ANY,) * LAGS, s) for s in range(len(matcher.states)))
    candidates, rule, best = list(found), [], 0.0
    if not candidates:
        return []
    bits, covered = np.stack([matcher.match(p) for p in candidates]), np.zeros_like(target)
    wanted = int(count(target))
    while len(rule) < most:
        union = bits | covered
        f1 = 2 * count(union & target) / np.maximum(count(union) + wanted, 1)
        at = int(f1.argmax())
        if f1[at] < best + gain:
            break
        rule, best, covered = [*rule, candidates[at]], float(f1[at]), union[at]
    return rule


def _with_state(matcher: Matcher, pattern: Pattern, target: np.ndarray, gain: float) -> Pattern:
    if not len(matcher.states):
        return pattern
    alone = matcher.match(pattern)
    both = matcher.states & alone
    f1 = 2 * count(both & target) / np.maximum(count(both) + int(count(target)), 1)
    at = int(f1.argmax())
    return pattern._replace(state=at) if f1[at] >= quality(alone, target).f1 + gain else pattern


def literal_at(index: dict[int, int], chars: np.ndarray, length: int, row: int) -> Pattern:
    """The characters up to ``row`` as they stand, no further back than the window of ``length``; ``index`` gives each symbol's element."""
    return Pattern(tuple(index[int(chars[row - lag])] if row % length >= lag else ANY for lag in range(LAGS)))


def spell(rule: Sequence[Pattern], elements: Sequence[Element], states: Sequence[str]) -> str:
    """The rule for people: the last characters in reading order, ``.`` for anything, ``[class]``, ``␣`` and ``⏎``; ``(state)`` behind."""
    return " or ".join(_spell(p, elements, states) for p in rule)


def _spell(pattern: Pattern, elements: Sequence[Element], states: Sequence[str]) -> str:
    places = list(pattern.elements)
    while places and places[-1] == ANY:
        places.pop()
    names = [elements[e].name for e in reversed(places)]
    text = "".join("." if n == "any" else f"[{n}]" if len(n) > 1 else {" ": "␣", "\n": "⏎", ".": "\\."}.get(n, n) for n in names)
    state = f"({states[pattern.state]})" if pattern.state >= 0 else ""
    return f"{text} {state}".strip() or "anything"
