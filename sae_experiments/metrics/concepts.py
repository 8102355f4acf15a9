"""The concept bank: what a character position can be asked about a text, at the level of characters, words and structure.

Labels come from one pass over the text, vectorised. A *causal* concept depends on what was read up to and including the position; a
*predictive* one on the character that comes next. Letters are ASCII letters. Which concepts apply is decided from the symbols of a corpus.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

LEVELS = ("char", "word", "struct")
UPPER, LETTERS, DIGITS = string.ascii_uppercase, string.ascii_letters, string.digits
#: Character classes of patterns and concepts, by name: the symbols below code point 256 that are in them.
CLASSES = {
    "vowel": "aeiouAEIOU",
    "consonant": "".join(c for c in LETTERS if c not in "aeiouAEIOU"),
    "upper": UPPER,
    "letter": LETTERS,
    "digit": DIGITS,
    "newline": "\n",
    "space": " \t\r\n\f\v",
    "punctuation": string.punctuation,
}


def member(chars: np.ndarray, symbols: str) -> np.ndarray:
    """Where the code points (N,) are among ``symbols``."""
    table = np.zeros(257, dtype=bool)
    table[[ord(s) for s in symbols]] = True
    return table[np.minimum(chars, 256)]


class Scan:
    """The state of a reader at every position of a text of code points (N,): what was read so far, counted and located."""

    def __init__(self, chars: np.ndarray, following: np.ndarray) -> None:
        self.chars, self.following = chars, following
        self.at = np.arange(len(chars))
        self.lower = np.where(member(chars, UPPER), chars + 32, chars)

    def of_class(self, name: str) -> np.ndarray:
        return member(self.chars, CLASSES[name])

    def ends(self, text: str, *, lower: bool = False) -> np.ndarray:
        """Where ``text`` has just been read."""
        chars, found = self.lower if lower else self.chars, np.ones(len(self.chars), dtype=bool)
        for lag, symbol in enumerate(reversed(text)):
            found &= shift(chars, lag) == ord(symbol)
        return found

    def last(self, where: np.ndarray) -> np.ndarray:
        """Position of the latest row up to each one where ``where`` holds; -1 if there is none."""
        return np.maximum.accumulate(np.where(where, self.at, -1)) if len(self.at) else self.at

    def pick(self, values: np.ndarray, index: np.ndarray) -> np.ndarray:
        """``values[index]``, and 0 where the index lies before the text."""
        return np.where(index >= 0, values[np.maximum(index, 0)], 0)

    @cached_property
    def letter(self) -> np.ndarray:
        return self.of_class("letter")

    @cached_property
    def word_start(self) -> np.ndarray:
        """Where the current (or latest) word starts; -1 before the first."""
        return self.last(self.letter & ~shift(self.letter, 1, False))

    @cached_property
    def in_word(self) -> np.ndarray:
        """Number of letters of the current word read so far; 0 outside words."""
        return np.where(self.letter, self.at - self.word_start + 1, 0)

    @cached_property
    def initial(self) -> np.ndarray:
        """First letter of the current or latest word, in lower case."""
        return self.pick(self.lower, self.word_start)

    @cached_property
    def newline(self) -> np.ndarray:
        return self.chars == 10

    @cached_property
    def line_start(self) -> np.ndarray:
        """First position of the current line. A newline belongs to the line it ends."""
        return self.last(shift(self.newline, 1, False)).clip(min=0)

    @cached_property
    def column(self) -> np.ndarray:
        """Characters read since the line began, this one included."""
        return self.at - self.line_start + 1

    @cached_property
    def line_before(self) -> np.ndarray:
        """Length of the line before (its newline not counted); -1 on the first line."""
        end = self.line_start - 1
        return np.where(end >= 0, self.pick(self.column, end) - 1, -1)

    def after_word(self, *words: str) -> np.ndarray:
        """At the first character after one of the words."""
        found, fresh = np.zeros(len(self.at), dtype=bool), ~self.letter & shift(self.letter, 1, False)
        for word in words:
            ended = self.ends(word, lower=True) & (self.in_word == len(word))
            found |= fresh & shift(ended, 1, False)
        return found

    def inside(self, opening: str, closing: str) -> np.ndarray:
        """Since ``opening`` was read and until ``closing`` is; nested brackets count as one."""
        return self.last(self.ends(opening)) > self.last(self.ends(closing))

    def unclosed(self) -> np.ndarray:
        """Inside a quotation or a parenthesis that was opened on this line."""
        opened, closed, line = self.chars == ord("("), self.chars == ord(")"), np.cumsum(shift(self.newline, 1, False))
        level = np.cumsum(opened.astype(np.int64) - closed)
        level -= self.pick(level, self.line_start - 1)
        far = 2 * len(self.at) + 1  # a step down at each line makes the running minimum start anew there
        least = np.minimum.accumulate(np.minimum(level, 0) - far * line) + far * line
        quotes = np.cumsum(self.chars == ord('"'))
        return (level - least > 0) | ((quotes - self.pick(quotes, self.line_start - 1)) % 2 == 1)

    def in_url(self) -> np.ndarray:
        run_start = self.last(shift(self.of_class("space"), 1, True) & ~self.of_class("space"))
        return ~self.of_class("space") & (self.last(self.ends("://") | self.ends("www.")) >= run_start) & (run_start >= 0)


def shift(values: np.ndarray, lag: int, fill: int | bool = 0) -> np.ndarray:
    """``values`` of ``lag`` positions earlier, ``fill`` before the beginning."""
    out = np.full_like(values, fill)
    out[lag:] = values[: max(len(values) - lag, 0)]
    return out


@dataclass(frozen=True, slots=True)
class Concept:
    """A yes-or-no question about a position. Concepts of one ``group`` (a letter each, say) count as one in averages over a level."""

    name: str
    group: str
    level: str
    label: Callable[[Scan], np.ndarray]
    causal: bool = True
    needs: tuple[str, ...] = ()  # at least one symbol of each must be in the alphabet

    @property
    def matched(self) -> bool:
        """Whether its negatives must have the same characters as its positives, so that knowing the character does not help."""
        return not (self.level == "char" and self.causal)


def bank(symbols: Sequence[str]) -> list[Concept]:
    """The concepts that apply to a corpus with these symbols."""
    known = set(symbols)
    return [c for c in (*_characters(), *_words(), *_structure()) if all(known & set(need) for need in c.needs)]


def label_all(concepts: Iterable[Concept], chars: np.ndarray, following: np.ndarray, breaks: np.ndarray) -> np.ndarray:
    """Labels (K, N) of a text that starts anew at each row of ``breaks``."""
    concepts, bounds = list(concepts), [*breaks.tolist(), len(chars)]
    out = np.zeros((len(concepts), len(chars)), dtype=bool)
    for begin, end in itertools.pairwise(bounds):
        scan = Scan(chars[begin:end], following[begin:end])
        for row, concept in zip(out, concepts, strict=True):
            row[begin:end] = concept.label(scan)
    return out


def _characters() -> list[Concept]:
    found = [
        Concept("vowel", "vowel", "char", lambda s: s.of_class("vowel"), needs=(CLASSES["vowel"],)),
        Concept("consonant", "consonant", "char", lambda s: s.of_class("consonant"), needs=(CLASSES["consonant"],)),
        Concept("upper case", "upper case", "char", lambda s: s.of_class("upper"), needs=(UPPER,)),
        Concept("white space", "white space", "char", lambda s: s.of_class("space"), needs=(CLASSES["space"],)),
        Concept("digit", "digit", "char", lambda s: s.of_class("digit"), needs=(DIGITS,)),
        Concept("end of sentence", "end of sentence", "char", lambda s: member(s.chars, ".!?"), needs=(".!?",)),
    ]
    found += [Concept(f"letter {c}", "letter", "char", lambda s, c=c: s.lower == ord(c), needs=(c,)) for c in "etq"]
    for name in ("vowel", "consonant", "space", "punctuation", "upper", "digit", "newline"):
        found.append(Concept(f"{name} next", "next", "char", lambda s, n=name: member(s.following, CLASSES[n]), causal=False, needs=(CLASSES[name],)))
    return found


def _words() -> list[Concept]:
    found = [
        Concept("word start", "word start", "word", lambda s: s.in_word == 1, needs=(LETTERS,)),
        Concept("fifth letter or later", "position in word", "word", lambda s: s.in_word >= 5, needs=(LETTERS,)),
        Concept("word end", "word end", "word", lambda s: s.letter & ~member(s.following, LETTERS), causal=False, needs=(LETTERS,)),
        Concept("capitalised word", "capitalised", "word", _capitalised, needs=(UPPER, string.ascii_lowercase)),
    ]
    found += [
        Concept(f"word so far: {p}", "prefix", "word", lambda s, p=p: s.ends(p, lower=True) & (s.in_word == 2), needs=tuple(p))
        for p in ("th", "in", "wh")
    ]
    found += [Concept(f"trigram {g}", "trigram", "word", lambda s, g=g: s.ends(g, lower=True), needs=tuple(g)) for g in ("ing", "the", "and")]
    for words in (("the",), ("of",), ("and",), ("my", "you")):
        found.append(
            Concept(f"after the word {' or '.join(words)}", "after word", "word", lambda s, w=words: s.after_word(*w), needs=tuple(words[0]))
        )
    for c in string.ascii_lowercase:
        label = lambda s, c=c: (s.in_word >= 3) & (s.initial == ord(c))  # noqa: E731
        found.append(Concept(f"word starts with {c}", "starts with", "word", label, needs=(c + c.upper(),)))
    return found


def _capitalised(s: Scan) -> np.ndarray:
    """In a word that began with a capital, from its second letter on."""
    return (s.in_word >= 2) & s.pick(s.of_class("upper"), s.word_start).astype(bool)


def _structure() -> list[Concept]:
    line, wiki = ("\n",), ("[", "]", "<")
    return [
        Concept("first 3 characters of a line", "line start", "struct", lambda s: (s.column <= 3) & ~s.newline, needs=line),
        Concept("in quotes or brackets", "in quotes", "struct", lambda s: s.unclosed(), needs=('("', "\n")),
        Concept("in a tag", "markup", "struct", lambda s: s.inside("<", ">"), needs=("<", ">")),
        Concept("in a link", "markup", "struct", lambda s: s.inside("[[", "]]"), needs=("[", "]")),
        Concept("in a template", "markup", "struct", lambda s: s.inside("{{", "}}"), needs=("{", "}")),
        Concept("in a URL", "markup", "struct", lambda s: s.in_url(), needs=(":", "/")),
        Concept("in a number", "markup", "struct", lambda s: s.of_class("digit") & shift(s.of_class("digit"), 1, False), needs=(*wiki, DIGITS)),
        Concept("line after a blank line", "speech", "struct", lambda s: (s.line_before == 0) & ~s.newline, needs=line),
        Concept("line after a colon", "speech", "struct", _after_colon, needs=(*line, ":")),
        Concept("after a long line", "verse", "struct", lambda s: s.line_before > 40, needs=line),
        Concept("column above 40", "column", "struct", lambda s: s.column > 40, needs=line),
        Concept("line end next", "line end", "struct", lambda s: s.following == 10, causal=False, needs=line),
        Concept("heading or list", "heading", "struct", lambda s: member(s.chars[s.line_start], "=*#:"), needs=(*wiki, "\n", "=*")),
    ]


def _after_colon(s: Scan) -> np.ndarray:
    """On a line whose line before ended with a colon: the first line of a speech."""
    return (s.pick(s.chars, s.line_start - 2) == ord(":")) & (s.line_start >= 2)
