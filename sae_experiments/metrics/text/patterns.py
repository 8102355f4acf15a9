"""Patterns over the last characters, matched as bit sets of text positions in microseconds.

A pattern has for each of the last `LAGS` characters an element (one symbol, a class or anything),
and optionally a state of the reader (a causal concept). A rule is a few patterns, at least one of
which must match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sae_experiments.metrics.text.concepts import CLASSES

LAGS = 6
#: Number of the element that matches anything.
ANY = 0
#: State number of a pattern without a state.
NO_STATE = -1
_BITS_PER_BYTE = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)
_SPELLINGS = {" ": "␣", "\n": "⏎", ".": "\\."}


class Pattern(NamedTuple):
    """Element numbers for the characters 0 to `LAGS` - 1 back, and the number of a state."""

    elements: tuple[int, ...]
    state: int = NO_STATE

    @property
    def length(self) -> int:
        """Number of conditions: elements other than "anything", and the state."""
        return sum(e != ANY for e in self.elements) + (self.state >= 0)

    def with_element(self, lag: int, element: int) -> Pattern:
        """This pattern with another element at `lag`."""
        elements = (*self.elements[:lag], element, *self.elements[lag + 1 :])
        return Pattern(elements, self.state)


class Element(NamedTuple):
    """One element of a pattern."""

    name: str
    """Name in a spelled rule."""
    symbols: frozenset[int]
    """Code points it matches."""
    wider: tuple[int, ...]
    """Numbers of the elements that match all of these symbols and more."""
    shown: str = ""
    """Spelling of a token in a rule; empty for characters and classes."""


def elements_of(symbols: Sequence[str]) -> list[Element]:
    """Elements for an alphabet: anything, every class with two of its symbols, every symbol."""
    points = frozenset(ord(s) for s in symbols)
    sets = [("any", points)]
    for name, members in CLASSES.items():
        in_alphabet = points & {ord(c) for c in members}
        if len(in_alphabet) > 1:
            sets.append((name, in_alphabet))
    sets += [(s, frozenset([ord(s)])) for s in symbols]
    elements = []
    for name, own in sets:
        wider = tuple(j for j, (_, other) in enumerate(sets) if own < other)
        elements.append(Element(name, own, wider))
    return elements


def token_elements(
    classes: Mapping[str, np.ndarray], tokens: np.ndarray, pieces: list[str]
) -> list[Element]:
    """Elements for tokens: anything, every class with two of the tokens, every token of a text.

    Args:
        classes: By name a mask (V,) of the token ids in the class.
        tokens: Ids that occur in the text, (n,).
        pieces: How each id is written in a rule.
    """
    sets = [("any", frozenset(tokens.tolist()))]
    for name, mask in classes.items():
        members = frozenset(tokens[mask[tokens]].tolist())
        if len(members) > 1:
            sets.append((name, members))
    elements = []
    for name, own in sets:
        wider = tuple(j for j, (_, other) in enumerate(sets) if own < other)
        elements.append(Element(name, own, wider))
    for token in tokens.tolist():
        wider = tuple(j for j, (_, members) in enumerate(sets) if token in members)
        elements.append(Element(pieces[token], frozenset([token]), wider, pieces[token]))
    return elements


def pack(mask: np.ndarray) -> np.ndarray:
    """Pack booleans (..., N) into 64-bit words, padded with zeros."""
    packed = np.packbits(mask, axis=-1)
    n_bytes = -(-packed.shape[-1] // 8) * 8
    padded = np.zeros((*packed.shape[:-1], n_bytes), np.uint8)
    padded[..., : packed.shape[-1]] = packed
    return padded.view(np.uint64)


def unpack(bits: np.ndarray, n: int) -> np.ndarray:
    """The first `n` booleans of packed ones, (..., n)."""
    return np.unpackbits(bits.view(np.uint8), axis=-1)[..., :n].astype(bool)


def count(bits: np.ndarray) -> np.ndarray:
    """Number of set bits over the last axis."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(bits).sum(-1, dtype=np.int64)
    return _BITS_PER_BYTE[bits.view(np.uint8)].sum(-1, dtype=np.int64)


class Matcher:
    """Packed positions at which each element at each lag, and each state, matches.

    A lag that reaches over the start of the window matches nothing but "anything".

    Args:
        elements: Elements of the alphabet.
        chars: Code points of the text, (N,).
        offset: Position of each row in its window, (N,).
        states: Labels of the states, bool (S, N).
        rows: Rows to match on, (n,).
    """

    def __init__(
        self,
        elements: Sequence[Element],
        chars: np.ndarray,
        offset: np.ndarray,
        states: np.ndarray,
        rows: np.ndarray,
    ) -> None:
        self.elements = elements
        self.n = len(rows)
        self.states = pack(states[:, rows])
        self._back = [chars[np.maximum(rows - lag, 0)] for lag in range(LAGS)]
        self._visible = [offset[rows] >= lag for lag in range(LAGS)]
        self._any = pack(np.ones(self.n, bool))
        self._bits: dict[tuple[int, int], np.ndarray] = {}

    def element_bits(self, element: int, lag: int) -> np.ndarray:
        """Packed positions at which an element matches at a lag."""
        if element == ANY:
            return self._any
        if (element, lag) not in self._bits:
            symbols = list(self.elements[element].symbols)
            matches = np.isin(self._back[lag], symbols) & self._visible[lag]
            self._bits[element, lag] = pack(matches)
        return self._bits[element, lag]

    def match(self, pattern: Pattern) -> np.ndarray:
        """Packed positions at which the pattern matches."""
        bits = self._any
        if pattern.state >= 0:
            bits = self.states[pattern.state]
        for lag, element in enumerate(pattern.elements):
            if element != ANY:
                bits = bits & self.element_bits(element, lag)
        return bits

    def match_any(self, rule: Sequence[Pattern]) -> np.ndarray:
        """Packed positions at which at least one of the patterns matches."""
        bits = np.zeros_like(self._any)
        for pattern in rule:
            bits = bits | self.match(pattern)
        return bits


class Quality(NamedTuple):
    """Agreement of a set of positions with a target set."""

    precision: float
    recall: float
    f1: float


def quality(predicted: np.ndarray, target: np.ndarray) -> Quality:
    """Precision, recall and F1 of packed positions; 0 for empty sets."""
    hits = int(count(predicted & target))
    n_predicted = int(count(predicted))
    n_target = int(count(target))
    return Quality(
        precision=hits / max(n_predicted, 1),
        recall=hits / max(n_target, 1),
        f1=2 * hits / max(n_predicted + n_target, 1),
    )


def _f1(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """F1 of K sets of packed positions (K, W) against one target (W,)."""
    hits = count(predicted & target)
    return 2 * hits / np.maximum(count(predicted) + int(count(target)), 1)


def generalise(
    matcher: Matcher, literal: Pattern, target: np.ndarray, keep: float
) -> tuple[Pattern, float]:
    """Widen a literal pattern step by step and return the best pattern on the way.

    Each step widens one place, choosing the best F1 among the patterns whose precision is at least
    `keep` of the precision before the step.

    Args:
        matcher: Matches of elements and states.
        literal: Pattern to start from.
        target: Packed positions to describe.
        keep: Share of the precision that a step must keep.

    Returns:
        The pattern of best F1 (the most general one in a tie) and that F1.
    """
    pattern = literal
    start = quality(matcher.match(pattern), target)
    precision = start.precision
    n_target = int(count(target))
    best = (pattern, start.f1)
    while choices := _widened(matcher, pattern):
        bits = np.stack([b for _, b in choices])
        hits, n_predicted = count(bits & target), count(bits)
        precisions = hits / np.maximum(n_predicted, 1)
        f1 = 2 * hits / np.maximum(n_predicted + n_target, 1)
        f1 = np.where(precisions >= keep * precision, f1, -1)
        chosen = int(f1.argmax())
        if f1[chosen] < 0:
            break
        pattern = choices[chosen][0]
        precision = float(precisions[chosen])
        if f1[chosen] >= best[1]:
            best = (pattern, float(f1[chosen]))
    return best


def _widened(matcher: Matcher, pattern: Pattern) -> list[tuple[Pattern, np.ndarray]]:
    """Patterns with one place widened and their packed matches; widest choices of a place first."""
    choices = []
    for lag, element in enumerate(pattern.elements):
        if element == ANY:
            continue
        without_place = matcher.match(pattern.with_element(lag, ANY))
        for wider in matcher.elements[element].wider:
            bits = without_place
            if wider != ANY:
                bits = without_place & matcher.element_bits(wider, lag)
            choices.append((pattern.with_element(lag, wider), bits))
    return choices


def find_rule(
    matcher: Matcher,
    literals: Sequence[Pattern],
    target: np.ndarray,
    *,
    keep: float,
    most: int,
    gain: float,
) -> list[Pattern]:
    """A rule of few patterns whose union has a high F1 on a target.

    Candidates are the generalised literals, the same with a state where that adds `gain` to the F1,
    and each state alone. They are taken greedily as long as each adds `gain` to the F1.

    Args:
        matcher: Matches of elements and states.
        literals: Literal characters at contexts in which a latent fires.
        target: Packed positions to describe.
        keep: Share of its precision that a pattern must keep when one place is widened.
        most: Largest number of patterns.
        gain: F1 that one more pattern, or a state, must add.

    Returns:
        The patterns, in the order in which they were taken.
    """
    general = dict.fromkeys(generalise(matcher, p, target, keep)[0] for p in literals)
    with_state = dict.fromkeys(_with_state(matcher, p, target, gain) for p in general)
    states = dict.fromkeys(Pattern((ANY,) * LAGS, s) for s in range(len(matcher.states)))
    candidates = list(general | with_state | states)
    if not candidates:
        return []
    bits = np.stack([matcher.match(p) for p in candidates])
    covered = np.zeros_like(target)
    rule: list[Pattern] = []
    best_f1 = 0.0
    while len(rule) < most:
        union = bits | covered
        f1 = _f1(union, target)
        chosen = int(f1.argmax())
        if f1[chosen] < best_f1 + gain:
            break
        rule.append(candidates[chosen])
        best_f1 = float(f1[chosen])
        covered = union[chosen]
    return rule


def _with_state(matcher: Matcher, pattern: Pattern, target: np.ndarray, gain: float) -> Pattern:
    """The pattern with its best state, or unchanged if no state adds `gain` to the F1."""
    if not len(matcher.states):
        return pattern
    alone = matcher.match(pattern)
    f1 = _f1(matcher.states & alone, target)
    best = int(f1.argmax())
    if f1[best] >= quality(alone, target).f1 + gain:
        return pattern._replace(state=best)
    return pattern


def literal_at(index: dict[int, int], chars: np.ndarray, length: int, row: int) -> Pattern:
    """Pattern of the literal characters up to a row, no further back than its window.

    Args:
        index: Code point -> number of the element of that one symbol.
        chars: Code points of the text, (N,).
        length: Characters per window.
        row: Row whose character has lag 0.

    Returns:
        The pattern; lags before the window match anything.
    """
    visible = min(row % length + 1, LAGS)
    elements = [index[int(chars[row - lag])] for lag in range(visible)]
    return Pattern((*elements, *[ANY] * (LAGS - visible)))


def spell(rule: Sequence[Pattern], elements: Sequence[Element], states: Sequence[str]) -> str:
    """Spell a rule for people: the last characters in reading order.

    `.` stands for anything, `[class]` for a class, `␣` and `⏎` for white space; `(state)` follows
    the characters. Tokens stand apart.
    """
    return " or ".join(_spell_pattern(p, elements, states) for p in rule)


def _spell_pattern(pattern: Pattern, elements: Sequence[Element], states: Sequence[str]) -> str:
    places = list(pattern.elements)
    while places and places[-1] == ANY:
        places.pop()
    words = [elements[e].shown or _spell_element(elements[e].name) for e in reversed(places)]
    text = (" " if elements[-1].shown else "").join(words)
    state = f"({states[pattern.state]})" if pattern.state >= 0 else ""
    return f"{text} {state}".strip() or "anything"


def _spell_element(name: str) -> str:
    if name == "any":
        return "."
    if len(name) > 1:
        return f"[{name}]"
    return _SPELLINGS.get(name, name)
