"""Concepts of a text in tokens, labelled by what the tokens spell.

Concepts about lines and quotations are those of characters, read at a token's last character; the
others look at the token's own text and at the character before it.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from sae_experiments.metrics.codes import Text
from sae_experiments.metrics.text.concepts import SENTENCE_ENDS, Concept, Scan, shift
from sae_experiments.metrics.text.contexts import visible

#: Tokens that are concepts themselves: the most frequent ones of a text.
N_FREQUENT = 12
PUNCTUATION = set(string.punctuation)
#: Positions in a window that count as late: the last quarter.
LATE = 0.75
WORDS_BEFORE = ("the", "of", "and")


def token_classes(pieces: Sequence[str]) -> dict[str, np.ndarray]:
    """Classes of tokens by what they spell.

    Args:
        pieces: Text of every id.

    Returns:
        By name a mask (V,) of ids.
    """
    tests: dict[str, Callable[[str], bool]] = {
        "word start": lambda p: p[:1].isspace() and p.strip()[:1].isalpha(),
        "word part": lambda p: p[:1].isalpha(),
        "capitalised": lambda p: p.strip()[:1].isupper(),
        "upper": lambda p: len(p.strip()) > 1 and p.strip().isupper(),
        "digit": lambda p: any(c.isdigit() for c in p),
        "punctuation": lambda p: bool(p.strip()) and not set(p.strip()) - PUNCTUATION,
        "sentence end": lambda p: any(c in SENTENCE_ENDS for c in p),
        "newline": lambda p: "\n" in p,
        "white space": lambda p: p.isspace(),
    }
    return {name: np.array([test(p) for p in pieces], bool) for name, test in tests.items()}


class TokenScan:
    """State of a reader at every token of a text that goes on without a break.

    Args:
        text: The text.
        classes: Classes of its ids, see `token_classes`.
        begin: First row.
        end: Row after the last.
    """

    def __init__(self, text: Text, classes: dict[str, np.ndarray], begin: int, end: int) -> None:
        self.ids = text.chars[begin:end].astype(np.int64)
        self.following = text.following[begin:end].astype(np.int64)
        self.classes = classes
        self.offset = text.offset[begin:end] / text.length
        self._parts = text.parts(begin, end)
        self._after = text.spell(int(self.following[-1]))

    def of_class(self, name: str) -> np.ndarray:
        """Tokens in a class."""
        return self.classes[name][self.ids]

    def next_in(self, name: str) -> np.ndarray:
        """Tokens that are followed by a token of a class."""
        return self.classes[name][self.following]

    @cached_property
    def last_char(self) -> np.ndarray:
        """Index of each token's last character in the concatenated text, (N,)."""
        return np.cumsum([len(part) for part in self._parts]) - 1

    @cached_property
    def chars(self) -> Scan:
        """The reader of the characters that the tokens spell."""
        text = "".join([*self._parts, self._after])
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
        n = int(self.last_char[-1]) + 1
        return Scan(points[:n], points[1 : n + 1])

    def at_last(self, per_char: np.ndarray) -> np.ndarray:
        """Values at each token's last character."""
        return per_char[self.last_char]

    @cached_property
    def first_of_word(self) -> np.ndarray:
        """Tokens that begin a word: they bring their own white space, or follow no letter."""
        after_letter = shift(self.at_last(self.chars.letter), 1, False)
        return self.of_class("word start") | (self.of_class("word part") & ~after_letter)

    @cached_property
    def first_of_line(self) -> np.ndarray:
        """Tokens after one that ends with a newline."""
        return shift(self.at_last(self.chars.newline), 1, False) & ~self.of_class("newline")

    @cached_property
    def first_of_sentence(self) -> np.ndarray:
        """Tokens that begin a word after the end of a sentence, white space in between."""
        ended = shift(self.of_class("sentence end"), 1, False)
        ended_before = shift(self.of_class("sentence end"), 2, False)
        blank_between = shift(self.of_class("white space"), 1, False)
        return self.first_of_word & (ended | (ended_before & blank_between))


def token_bank(text: Text) -> list[Concept]:
    """The concepts of a text in tokens; each of its frequent tokens is a concept as well."""

    def concept(name: str, level: str, label: Any, group: str = "", **more: Any) -> Concept:
        return Concept(name, group or name, level, label, **more)

    own = ("capitalised", "upper", "digit", "punctuation", "sentence end", "white space")
    concepts = [concept(name, "char", _of_class(name)) for name in own]
    concepts += [
        concept(f"{name} next", "char", _next_in(name), "next", causal=False)
        for name in ("word start", "word part", "capitalised", "digit", "punctuation", "newline")
    ]
    concepts += [
        concept("first token of a word", "word", lambda s: s.first_of_word, about_itself=True),
        concept("later token of a word", "word", _later_of_word, about_itself=True),
    ]
    for word in WORDS_BEFORE:
        concepts.append(concept(f"after the word {word}", "word", _after(word), "after word"))
    ids, counts = np.unique(text.chars, return_counts=True)
    for token in ids[np.argsort(-counts, kind="stable")[:N_FREQUENT]].tolist():
        name = f"token {visible(text.spell(token))}"
        concepts.append(concept(name, "word", _is(token), "frequent token", about_itself=True))
    return [
        *concepts,
        concept("first token of a line", "struct", lambda s: s.first_of_line, "line start"),
        concept("first token of a sentence", "struct", lambda s: s.first_of_sentence),
        concept("in quotes or brackets", "struct", _unclosed),
        concept("in a URL", "struct", lambda s: s.at_last(s.chars.in_url()), "markup"),
        concept("on an indented line", "struct", _indented, "code"),
        concept("column above 40", "struct", lambda s: s.at_last(s.chars.column) > 40),
        concept("late in the window", "struct", lambda s: s.offset >= LATE, "position"),
    ]


def label_tokens(concepts: Iterable[Concept], text: Text) -> np.ndarray:
    """Label every token of a text with every concept.

    Args:
        concepts: K concepts, see `token_bank`.
        text: The text in tokens.

    Returns:
        Labels, bool (K, N).
    """
    concepts = list(concepts)
    classes = token_classes(text.pieces)
    bounds = [*text.breaks.tolist(), len(text.chars)]
    labels = np.zeros((len(concepts), len(text.chars)), dtype=bool)
    for i, begin in enumerate(bounds[:-1]):
        scan: Any = TokenScan(text, classes, begin, bounds[i + 1])
        for row, concept in zip(labels, concepts, strict=True):
            row[begin : bounds[i + 1]] = concept.label(scan)
    return labels


def _of_class(name: str) -> Callable[[TokenScan], np.ndarray]:
    return lambda scan: scan.of_class(name)


def _next_in(name: str) -> Callable[[TokenScan], np.ndarray]:
    return lambda scan: scan.next_in(name)


def _is(token: int) -> Callable[[TokenScan], np.ndarray]:
    return lambda scan: scan.ids == token


def _after(word: str) -> Callable[[TokenScan], np.ndarray]:
    """Tokens that begin a word, where the word before is `word`."""

    def label(scan: TokenScan) -> np.ndarray:
        chars = scan.chars
        ends = chars.ends(word, lower=True) & (chars.in_word == len(word))
        return scan.first_of_word & shift(scan.at_last(ends), 1, False)

    return label


def _later_of_word(scan: TokenScan) -> np.ndarray:
    return scan.of_class("word part") & ~scan.first_of_word


def _unclosed(scan: TokenScan) -> np.ndarray:
    return scan.at_last(scan.chars.unclosed())


def _indented(scan: TokenScan) -> np.ndarray:
    chars = scan.chars
    first = chars.pick(chars.chars, chars.line_start)
    blank = (first == ord(" ")) | (first == ord("\t"))
    return scan.at_last(blank & (chars.column > 1))
