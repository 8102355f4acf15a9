"""Concept bank: yes-or-no questions about a position of a text, on characters, words and structure.

Labels come from one vectorised pass over the text. A *causal* concept depends on the text up to and
including the position; a *predictive* one depends on the next character. Letters are ASCII letters.
The symbols of a corpus decide which concepts apply to it.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

LEVELS = ("char", "word", "struct")
UPPER = string.ascii_uppercase
LOWER = string.ascii_lowercase
LETTERS = string.ascii_letters
DIGITS = string.digits
VOWELS = "aeiouAEIOU"
#: Character classes of patterns and concepts: name -> its symbols below code point 256.
CLASSES = {
    "vowel": VOWELS,
    "consonant": "".join(c for c in LETTERS if c not in VOWELS),
    "upper": UPPER,
    "letter": LETTERS,
    "digit": DIGITS,
    "newline": "\n",
    "space": " \t\r\n\f\v",
    "punctuation": string.punctuation,
}
#: Class membership is looked up in a table of this many code points; none above is in a class.
TABLE_SIZE = 256


def member(chars: np.ndarray, symbols: str) -> np.ndarray:
    """Mask (N,) of the code points `chars` (N,) that are among `symbols`."""
    table = np.zeros(TABLE_SIZE + 1, dtype=bool)
    table[[ord(s) for s in symbols]] = True
    return table[np.minimum(chars, TABLE_SIZE)]


def shift(values: np.ndarray, lag: int, fill: int | bool = 0) -> np.ndarray:
    """Values (N,) of `lag` positions earlier, and `fill` before the beginning."""
    shifted = np.full_like(values, fill)
    shifted[lag:] = values[: max(len(values) - lag, 0)]
    return shifted


class Scan:
    """State of a reader at every position of a text: counts and locations in the text so far.

    Args:
        chars: Code points of the text, (N,).
        following: Code point that follows each position, (N,).
    """

    def __init__(self, chars: np.ndarray, following: np.ndarray) -> None:
        self.chars = chars
        self.following = following
        self.positions = np.arange(len(chars))
        self.lower = np.where(member(chars, UPPER), chars + 32, chars)

    def of_class(self, name: str) -> np.ndarray:
        """Positions whose character is in the class `name` of `CLASSES`."""
        return member(self.chars, CLASSES[name])

    def ends(self, text: str, *, lower: bool = False) -> np.ndarray:
        """Positions at which `text` ends; with `lower`, in the text in lower case."""
        chars = self.lower if lower else self.chars
        matches = np.ones(len(self.chars), dtype=bool)
        for lag, symbol in enumerate(reversed(text)):
            matches &= shift(chars, lag) == ord(symbol)
        return matches

    def last(self, where: np.ndarray) -> np.ndarray:
        """Latest position up to and including each one at which `where` holds; -1 before any."""
        if not len(self.positions):
            return self.positions
        return np.maximum.accumulate(np.where(where, self.positions, -1))

    def pick(self, values: np.ndarray, index: np.ndarray) -> np.ndarray:
        """`values[index]`, and 0 for an index before the text."""
        return np.where(index >= 0, values[np.maximum(index, 0)], 0)

    @cached_property
    def letter(self) -> np.ndarray:
        """Positions of letters."""
        return self.of_class("letter")

    @cached_property
    def word_start(self) -> np.ndarray:
        """Start of the current or latest word; -1 before the first."""
        return self.last(self.letter & ~shift(self.letter, 1, False))

    @cached_property
    def in_word(self) -> np.ndarray:
        """Number of letters of the current word so far, this one included; 0 outside words."""
        return np.where(self.letter, self.positions - self.word_start + 1, 0)

    @cached_property
    def initial(self) -> np.ndarray:
        """First letter of the current or latest word, in lower case."""
        return self.pick(self.lower, self.word_start)

    @cached_property
    def newline(self) -> np.ndarray:
        """Positions of newlines."""
        return self.chars == ord("\n")

    @cached_property
    def line_start(self) -> np.ndarray:
        """First position of the current line. A newline belongs to the line it ends."""
        return self.last(shift(self.newline, 1, False)).clip(min=0)

    @cached_property
    def column(self) -> np.ndarray:
        """Number of characters of the line so far, this one included."""
        return self.positions - self.line_start + 1

    @cached_property
    def line_before(self) -> np.ndarray:
        """Length of the previous line without its newline; -1 on the first line."""
        end = self.line_start - 1
        return np.where(end >= 0, self.pick(self.column, end) - 1, -1)

    def after_word(self, *words: str) -> np.ndarray:
        """Positions of the first character after one of the words."""
        after = np.zeros(len(self.positions), dtype=bool)
        just_left_a_word = ~self.letter & shift(self.letter, 1, False)
        for word in words:
            word_ends = self.ends(word, lower=True) & (self.in_word == len(word))
            after |= just_left_a_word & shift(word_ends, 1, False)
        return after

    def inside(self, opening: str, closing: str) -> np.ndarray:
        """Positions from the end of `opening` to that of `closing`; nested pairs count as one."""
        return self.last(self.ends(opening)) > self.last(self.ends(closing))

    def unclosed(self) -> np.ndarray:
        """Positions inside a quotation or a parenthesis that was opened on the same line."""
        return self._in_parentheses() | self._in_quotes()

    def _in_parentheses(self) -> np.ndarray:
        line = np.cumsum(shift(self.newline, 1, False))
        opened = self.chars == ord("(")
        closed = self.chars == ord(")")
        depth = np.cumsum(opened.astype(np.int64) - closed)
        depth -= self.pick(depth, self.line_start - 1)
        # A closing parenthesis without an opening one lowers the level that counts as closed. That
        # level is the running minimum of the line; a large step down at each line restarts it.
        step = 2 * len(self.positions) + 1
        closed_depth = np.minimum.accumulate(np.minimum(depth, 0) - step * line) + step * line
        return depth - closed_depth > 0

    def _in_quotes(self) -> np.ndarray:
        quotes = np.cumsum(self.chars == ord('"'))
        quotes_on_line = quotes - self.pick(quotes, self.line_start - 1)
        return quotes_on_line % 2 == 1

    def in_url(self) -> np.ndarray:
        """Positions after `://` or `www.` in the same run of characters other than white space."""
        space = self.of_class("space")
        run_start = self.last(shift(space, 1, True) & ~space)
        latest_marker = self.last(self.ends("://") | self.ends("www."))
        return ~space & (latest_marker >= run_start) & (run_start >= 0)


Label: TypeAlias = Callable[[Scan], np.ndarray]


@dataclass(frozen=True, slots=True)
class Concept:
    """A yes-or-no question about a position."""

    name: str
    """Name of the concept in results."""
    group: str
    """Concepts of one group (a letter each, for instance) count as one in averages over a level."""
    level: str
    """One of `LEVELS`."""
    label: Label
    """Maps a scan of the text to the answers, bool (N,)."""
    causal: bool = True
    """False if the answer depends on the next character."""
    needs: tuple[str, ...] = ()
    """The concept applies to an alphabet that has at least one symbol of each of these strings."""
    about_itself: bool = False
    """True if the answer follows mostly from the row's own character or token."""

    @property
    def matched(self) -> bool:
        """True if negatives must have the same characters as positives.

        Then the character alone gives no information. The exceptions are concepts about the
        character or token itself.
        """
        return not (self.about_itself or (self.level == "char" and self.causal))


def bank(symbols: Sequence[str]) -> list[Concept]:
    """The concepts that apply to a corpus with these symbols."""
    known = set(symbols)
    concepts = [*_character_concepts(), *_word_concepts(), *_structure_concepts()]
    return [c for c in concepts if all(known & set(need) for need in c.needs)]


def label_all(
    concepts: Iterable[Concept], chars: np.ndarray, following: np.ndarray, breaks: np.ndarray
) -> np.ndarray:
    """Label every position of a text with every concept.

    Args:
        concepts: K concepts.
        chars: Code points of the text, (N,).
        following: Code point that follows each position, (N,).
        breaks: Rows at which the text starts anew, 0 among them.

    Returns:
        Labels, bool (K, N).
    """
    concepts = list(concepts)
    bounds = [*breaks.tolist(), len(chars)]
    labels = np.zeros((len(concepts), len(chars)), dtype=bool)
    for begin, end in itertools.pairwise(bounds):
        scan = Scan(chars[begin:end], following[begin:end])
        for row, concept in zip(labels, concepts, strict=True):
            row[begin:end] = concept.label(scan)
    return labels


# ------------------------------------------------------------------------------------- characters

#: Concept -> class of the current character.
CURRENT_CHARACTER = {
    "vowel": "vowel",
    "consonant": "consonant",
    "upper case": "upper",
    "white space": "space",
    "digit": "digit",
}
SENTENCE_ENDS = ".!?"
SINGLE_LETTERS = "etq"
#: Classes of the next character.
NEXT_CHARACTER = ("vowel", "consonant", "space", "punctuation", "upper", "digit", "newline")


def _character_concepts() -> list[Concept]:
    concepts = []
    for name, class_name in CURRENT_CHARACTER.items():
        label = _current_in(CLASSES[class_name])
        concepts.append(Concept(name, name, "char", label, needs=(CLASSES[class_name],)))
    name = "end of sentence"
    label = _current_in(SENTENCE_ENDS)
    concepts.append(Concept(name, name, "char", label, needs=(SENTENCE_ENDS,)))
    for letter in SINGLE_LETTERS:
        label = _current_letter(letter)
        concepts.append(Concept(f"letter {letter}", "letter", "char", label, needs=(letter,)))
    for class_name in NEXT_CHARACTER:
        members = CLASSES[class_name]
        label = _next_in(members)
        name = f"{class_name} next"
        concepts.append(Concept(name, "next", "char", label, causal=False, needs=(members,)))
    return concepts


def _current_in(symbols: str) -> Label:
    return lambda scan: member(scan.chars, symbols)


def _current_letter(letter: str) -> Label:
    return lambda scan: scan.lower == ord(letter)


def _next_in(symbols: str) -> Label:
    return lambda scan: member(scan.following, symbols)


# ------------------------------------------------------------------------------------------ words

WORD_BEGINNINGS = ("th", "in", "wh")
TRIGRAMS = ("ing", "the", "and")
WORDS_BEFORE = (("the",), ("of",), ("and",), ("my", "you"))


def _word_concepts() -> list[Concept]:
    concepts = [
        Concept("word start", "word start", "word", lambda s: s.in_word == 1, needs=(LETTERS,)),
        Concept(
            "fifth letter or later",
            "position in word",
            "word",
            lambda s: s.in_word >= 5,
            needs=(LETTERS,),
        ),
        Concept("word end", "word end", "word", _word_end, causal=False, needs=(LETTERS,)),
        Concept("capitalised word", "capitalised", "word", _capitalised, needs=(UPPER, LOWER)),
    ]
    for text in WORD_BEGINNINGS:
        label = _word_so_far(text)
        concepts.append(Concept(f"word so far: {text}", "prefix", "word", label, needs=tuple(text)))
    for text in TRIGRAMS:
        label = _just_read(text)
        concepts.append(Concept(f"trigram {text}", "trigram", "word", label, needs=tuple(text)))
    for words in WORDS_BEFORE:
        name = f"after the word {' or '.join(words)}"
        label = _after_word(words)
        concepts.append(Concept(name, "after word", "word", label, needs=tuple(words[0])))
    for letter in LOWER:
        name = f"word starts with {letter}"
        label = _word_starts_with(letter)
        needs = (letter + letter.upper(),)
        concepts.append(Concept(name, "starts with", "word", label, needs=needs))
    return concepts


def _word_end(scan: Scan) -> np.ndarray:
    return scan.letter & ~member(scan.following, LETTERS)


def _capitalised(scan: Scan) -> np.ndarray:
    """In a word that began with a capital, from its second letter on."""
    capital_first = scan.pick(scan.of_class("upper"), scan.word_start).astype(bool)
    return (scan.in_word >= 2) & capital_first


def _word_so_far(text: str) -> Label:
    return lambda scan: scan.ends(text, lower=True) & (scan.in_word == len(text))


def _just_read(text: str) -> Label:
    return lambda scan: scan.ends(text, lower=True)


def _after_word(words: Sequence[str]) -> Label:
    return lambda scan: scan.after_word(*words)


def _word_starts_with(letter: str) -> Label:
    """From the third letter of a word on."""
    return lambda scan: (scan.in_word >= 3) & (scan.initial == ord(letter))


# -------------------------------------------------------------------------------------- structure

#: Symbols of wiki markup: a corpus without them has no headings, lists or numbers worth a concept.
WIKI = ("[", "]", "<")


def _structure_concepts() -> list[Concept]:
    line = ("\n",)
    heading_needs = (*WIKI, "\n", "=*")

    def concept(name: str, group: str, label: Label, needs: tuple[str, ...]) -> Concept:
        return Concept(name, group, "struct", label, needs=needs)

    return [
        concept("first 3 characters of a line", "line start", _line_start, line),
        concept("in quotes or brackets", "in quotes", lambda s: s.unclosed(), ('("', "\n")),
        concept("in a tag", "markup", lambda s: s.inside("<", ">"), ("<", ">")),
        concept("in a link", "markup", lambda s: s.inside("[[", "]]"), ("[", "]")),
        concept("in a template", "markup", lambda s: s.inside("{{", "}}"), ("{", "}")),
        concept("in a URL", "markup", lambda s: s.in_url(), (":", "/")),
        concept("in a number", "markup", _in_number, (*WIKI, DIGITS)),
        concept("line after a blank line", "speech", _after_blank_line, line),
        concept("line after a colon", "speech", _after_colon, (*line, ":")),
        concept("after a long line", "verse", lambda s: s.line_before > 40, line),
        concept("column above 40", "column", lambda s: s.column > 40, line),
        Concept("line end next", "line end", "struct", _line_end_next, causal=False, needs=line),
        concept("heading or list", "heading", _heading_or_list, heading_needs),
    ]


def _line_start(scan: Scan) -> np.ndarray:
    return (scan.column <= 3) & ~scan.newline


def _in_number(scan: Scan) -> np.ndarray:
    """From the second digit of a number on."""
    digit = scan.of_class("digit")
    return digit & shift(digit, 1, False)


def _after_blank_line(scan: Scan) -> np.ndarray:
    return (scan.line_before == 0) & ~scan.newline


def _after_colon(scan: Scan) -> np.ndarray:
    """On a line whose previous line ended with a colon: the first line of a speech."""
    last_of_previous_line = scan.pick(scan.chars, scan.line_start - 2)
    return (last_of_previous_line == ord(":")) & (scan.line_start >= 2)


def _line_end_next(scan: Scan) -> np.ndarray:
    return scan.following == ord("\n")


def _heading_or_list(scan: Scan) -> np.ndarray:
    return member(scan.chars[scan.line_start], "=*#:")
