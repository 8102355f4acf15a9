"""Concepts of tokens say what a slow reader of the text says."""

from __future__ import annotations

import numpy as np
import pytest

from sae_experiments.metrics.codes import Text
from sae_experiments.metrics.text.patterns import spell, token_elements
from sae_experiments.metrics.text.token_concepts import label_tokens, token_bank, token_classes

WORDS = ["The", " king", " said", ":", "\n", '"', "Go", "!", " We", " g", "o", " to", " the"]
WORDS += [" house", ".", " 12", " of", "  indented", " x"]


def text_of(tokens: list[str], *, length: int = 8, breaks: tuple[int, ...] = (0,)) -> Text:
    pieces = list(dict.fromkeys([*WORDS, *tokens]))
    ids = np.array([pieces.index(token) for token in tokens])
    n = len(ids) // length * length
    following = np.append(ids[1:], 0)
    return Text(ids[:n], following[:n], length, np.array(breaks), pieces)


@pytest.fixture(scope="module")
def text() -> Text:
    chance = np.random.default_rng(0)
    return text_of([WORDS[i] for i in chance.integers(0, len(WORDS), 320)], breaks=(0, 128))


def labels(text: Text) -> dict[str, np.ndarray]:
    concepts = token_bank(text)
    return {c.name: row for c, row in zip(concepts, label_tokens(concepts, text), strict=True)}


def test_labels_are_those_of_a_reader_who_goes_token_by_token(text):
    found = labels(text)
    for begin, end in ((0, 128), (128, len(text.chars))):
        read = ""
        for row in range(begin, end):
            piece, before = text.spell(int(text.chars[row])), read
            read += piece
            new_word = piece[:1].isspace() or not before[-1:].isalpha()
            first = piece.strip()[:1].isalpha() and "\n" not in piece and new_word
            assert found["first token of a word"][row] == first, (row, piece)
            assert found["later token of a word"][row] == (piece[:1].isalpha() and not first)
            assert found["first token of a line"][row] == (before.endswith("\n") and piece != "\n")
            line = read.rpartition("\n")[2]
            if piece != "\n":
                assert found["in quotes or brackets"][row] == (line.count('"') % 2 == 1)
                assert found["column above 40"][row] == (len(line) > 40)
            words = before.lower().split(" ")
            last = "".join(c if c.isalpha() else " " for c in before).split(" ")[-1].lower()
            if first and words:
                assert found["after the word the"][row] == (last == "the"), (row, before[-12:])
    after = np.array([text.spell(int(i)) for i in text.following])
    assert (found["newline next"] == (after == "\n")).all()
    late = np.arange(len(text.chars)) % text.length >= 6
    assert (found["late in the window"] == late).all()


def test_frequent_tokens_are_concepts_with_visible_spaces(text):
    ids, counts = np.unique(text.chars, return_counts=True)
    best = text.spell(int(ids[counts.argmax()]))
    names = [c.name for c in token_bank(text) if c.group == "frequent token"]
    assert len(names) == 12 and names[0] == f"token {best.replace(' ', '␣').replace(chr(10), '⏎')}"


def test_concepts_about_the_token_itself_need_no_matched_negatives(text):
    matched = {c.name: c.matched for c in token_bank(text)}
    assert not matched["capitalised"] and not matched["first token of a word"]
    assert matched["after the word the"] and matched["word start next"]


def test_elements_of_tokens_lie_in_their_classes(text):
    classes, tokens = token_classes(text.pieces), np.unique(text.chars)
    elements = token_elements(classes, tokens, [p.replace(" ", "␣") for p in text.pieces])
    by_name = {e.name: e for e in elements}
    king = by_name["␣king"]
    names = {elements[i].name for i in king.wider}
    assert names == {"any", "word start"} and len(king.symbols) == 1
    assert {elements[i].name for i in by_name["The"].wider} >= {"any", "capitalised", "word part"}
    from sae_experiments.metrics.text.patterns import LAGS, Pattern

    at = [elements.index(by_name[n]) for n in ("␣king", "capitalised")]
    pattern = Pattern((*at, *[0] * (LAGS - 2)))
    assert spell([pattern], elements, []) == "[capitalised] ␣king"
