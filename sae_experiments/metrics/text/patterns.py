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
    """One condition per lag (the number of an element), and optionally the number of a state.

    Entry i of `elements` is matched with the character i positions back, for i < `LAGS`.
    """

    elements: tuple[int, ...]
    state: int = NO_STATE

    @property
    def length(self) -> int:
        """Number of conditions: elements other than "anything", and the state."""
        return sum(e != ANY for e in self.elements) + (self.state >= 0)


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
        most = max((len(e.wider) for e in elements), default=0)
        #: Numbers of the wider elements of each element, filled up with -1.
        self.wider = np.full((len(elements), most), -1)
        for i, element in enumerate(elements):
            self.wider[i, : len(element.wider)] = element.wider
        self._back = [chars[np.maximum(rows - lag, 0)] for lag in range(LAGS)]
        self._visible = [offset[rows] >= lag for lag in range(LAGS)]
        # Matches that were asked for, in a table that grows; its first row matches everywhere.
        self._table = pack(np.ones((1, self.n), bool))
        self._n_known = 1
        self._place = np.full((len(elements), LAGS), -1)
        self._place[ANY] = 0

    def element_bits(self, elements: np.ndarray, lags: np.ndarray) -> np.ndarray:
        """Packed positions (n, W) at which n elements match, each at a lag."""
        place = self._place[elements, lags]
        if (place < 0).any():
            unknown = dict.fromkeys(zip(elements[place < 0], lags[place < 0], strict=True))
            for element, lag in unknown:
                self._add(int(element), int(lag))
            place = self._place[elements, lags]
        return self._table[place]

    def _add(self, element: int, lag: int) -> None:
        """Add the matches of an element at a lag to the table."""
        symbols = list(self.elements[element].symbols)
        matches = np.isin(self._back[lag], symbols) & self._visible[lag]
        if self._n_known == len(self._table):
            self._table = np.concatenate([self._table, np.empty_like(self._table)])
        self._table[self._n_known] = pack(matches)
        self._place[element, lag] = self._n_known
        self._n_known += 1

    def match(self, patterns: Sequence[Pattern]) -> np.ndarray:
        """Packed positions (K, W) at which each of K patterns matches."""
        elements = np.array([p.elements for p in patterns], np.int64).reshape(-1, LAGS)
        bits = np.repeat(self._table[:1], len(patterns), axis=0)
        for i, pattern in enumerate(patterns):
            if pattern.state >= 0:
                bits[i] = self.states[pattern.state]
        for lag in range(LAGS):
            some = np.flatnonzero(elements[:, lag] != ANY)
            bits[some] &= self.element_bits(elements[some, lag], np.full(len(some), lag))
        return bits

    def match_any(self, rule: Sequence[Pattern]) -> np.ndarray:
        """Packed positions (W,) at which at least one of the patterns matches."""
        return np.bitwise_or.reduce(self.match(rule), axis=0)


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
    """F1 of sets of packed positions (..., W) against one target (W,)."""
    hits = count(predicted & target)
    return 2 * hits / np.maximum(count(predicted) + int(count(target)), 1)


class _Choices(NamedTuple):
    """All ways to widen one place of each of K patterns, C in all.

    They are in the order of patterns, then lags, then the wider elements of the place.
    """

    pattern: np.ndarray
    """Number of the pattern, (C,)."""
    lag: np.ndarray
    """Place that is widened, (C,)."""
    wider: np.ndarray
    """Element that it gets, (C,)."""
    bits: np.ndarray
    """Packed positions at which the widened pattern matches, (C, W)."""


def generalise(
    matcher: Matcher, literals: Sequence[Pattern], target: np.ndarray, keep: float
) -> list[Pattern]:
    """Widen literal patterns step by step, and return the best pattern on the way of each.

    Each step widens one place, choosing the best F1 among the patterns whose precision is at least
    `keep` of the precision before the step. All patterns make their steps together.

    Args:
        matcher: Matches of elements and states.
        literals: K patterns without a state to start from.
        target: Packed positions to describe, (W,).
        keep: Share of the precision that a step must keep.

    Returns:
        For each literal the pattern of best F1 (the most general one in a tie).
    """
    elements = np.array([p.elements for p in literals], np.int64).reshape(-1, LAGS)
    n_target = int(count(target))
    precision, best_f1 = _agreement(matcher.match(literals), target, n_target)
    best = elements.copy()
    going = np.arange(len(elements))
    while len(going):
        choices = _widened(matcher, elements[going])
        precisions, f1 = _agreement(choices.bits, target, n_target)
        kept = precisions >= keep * precision[going[choices.pattern]]
        # A column per choice, so that the first of equals is found within each pattern.
        starts = np.searchsorted(choices.pattern, np.arange(len(going)))
        column = np.arange(len(f1)) - starts[choices.pattern]
        table = np.full((len(going), int(column.max(initial=0)) + 1), -1.0)
        table[choices.pattern, column] = np.where(kept, f1, -1)
        found = table.argmax(1)
        chosen = (starts + found)[table[np.arange(len(going)), found] >= 0]
        going = going[choices.pattern[chosen]]
        elements[going, choices.lag[chosen]] = choices.wider[chosen]
        precision[going] = precisions[chosen]
        better = f1[chosen] >= best_f1[going]
        best_f1[going[better]] = f1[chosen][better]
        best[going[better]] = elements[going[better]]
    return [Pattern(tuple(row)) for row in best.tolist()]


def _agreement(
    bits: np.ndarray, target: np.ndarray, n_target: int
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and F1 (K,) of packed positions (K, W) against a target of `n_target` positions."""
    n_predicted = count(bits)
    hits = count(bits & target)
    return hits / np.maximum(n_predicted, 1), 2 * hits / np.maximum(n_predicted + n_target, 1)


def _widened(matcher: Matcher, elements: np.ndarray) -> _Choices:
    """All patterns with one place widened, of patterns of elements (K, LAGS)."""
    lags = np.arange(LAGS)
    own = matcher.element_bits(elements.ravel(), np.tile(lags, len(elements)))
    own = own.reshape(*elements.shape, -1)
    # Matches of each pattern without one place: those of the places before it and after it.
    without = np.full_like(own, ~np.uint64(0))
    for lag in range(1, LAGS):
        np.bitwise_and(without[:, lag - 1], own[:, lag - 1], out=without[:, lag])
    after = own[:, LAGS - 1].copy()
    for lag in range(LAGS - 2, -1, -1):
        without[:, lag] &= after
        after &= own[:, lag]
    choices = matcher.wider[elements]
    pattern, lag, place = np.nonzero((choices >= 0) & (elements != ANY)[..., None])
    wider = choices[pattern, lag, place]
    bits = matcher.element_bits(wider, lag)
    bits &= without[pattern, lag]
    return _Choices(pattern, lag, wider, bits)


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
    general = dict.fromkeys(generalise(matcher, literals, target, keep))
    with_state = dict.fromkeys(_with_states(matcher, list(general), target, gain))
    states = dict.fromkeys(Pattern((ANY,) * LAGS, s) for s in range(len(matcher.states)))
    candidates = list(general | with_state | states)
    if not candidates:
        return []
    bits = matcher.match(candidates)
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


def _with_states(
    matcher: Matcher, patterns: Sequence[Pattern], target: np.ndarray, gain: float
) -> list[Pattern]:
    """Each pattern with its best state, or unchanged if no state adds `gain` to its F1."""
    if not len(matcher.states):
        return list(patterns)
    alone = matcher.match(patterns)
    f1_alone = _f1(alone, target)
    f1 = _f1(matcher.states & alone[:, None], target)
    best = f1.argmax(1)
    better = f1.max(1, initial=0) >= f1_alone + gain
    return [
        pattern._replace(state=int(state)) if use else pattern
        for pattern, state, use in zip(patterns, best, better, strict=True)
    ]


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
    the characters. Tokens are separated.
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
