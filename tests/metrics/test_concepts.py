"""The concept bank against a reader that goes character by character."""

from __future__ import annotations

import re
import string

import numpy as np
import pytest

from sae_experiments.metrics.text.concepts import Scan, bank, label_all
from support.metric_worlds import play, points

WIKI = """<page>
  <title>Fish & chips</title>
== Heading ==
* See [[fish]] and ([[Potato|chips]] (fried)) at http://x.org/a1 now, 1984. "Quote (a) ) x" end
{{stub|a=12}} the end, of and you
)) odd ( text
"""


def labels(text: str) -> dict[str, np.ndarray]:
    concepts = bank(sorted(set(text)))
    following = points(text[1:] + "\n")
    return dict(
        zip(
            [c.name for c in concepts],
            label_all(concepts, points(text), following, np.array([0])),
            strict=True,
        )
    )


def read(text: str) -> dict[str, list[bool]]:
    """Some of the concepts, one character after the other."""
    found: dict[str, list[bool]] = {}
    word, before, line, lines = "", "", "", [None]
    for i, c in enumerate(text):
        after = text[i + 1] if i + 1 < len(text) else "\n"
        if c in string.ascii_letters:
            word += c
            before = ""
        else:
            before, word = word, ""
        line = c if i and text[i - 1] == "\n" else line + c
        if i and text[i - 1] == "\n":
            lines.append(text[:i].split("\n")[-2])
        last, low = lines[-1], word.lower()
        depth = 0
        for s in line:
            depth = max(depth + (s == "(") - (s == ")"), 0)
        so_far = text[: i + 1]
        spaces = re.split(r"\s", so_far)[-1]
        now = {
            "vowel": c.lower() in "aeiou",
            "white space": c.isspace(),
            "word start": len(word) == 1,
            "fifth letter or later": len(word) >= 5,
            "word end": c.isascii() and c.isalpha() and not after.isalpha(),
            "capitalised word": len(word) >= 2 and word[0].isupper(),
            "word so far: th": low == "th",
            "trigram the": so_far[-3:].lower() == "the",
            "after the word the": before.lower() == "the",
            "after the word my or you": before.lower() in ("my", "you"),
            "word starts with t": len(word) >= 3 and low[0] == "t",
            "space next": after.isspace(),
            "first 3 characters of a line": len(line) <= 3 and c != "\n",
            "column above 40": len(line) > 40,
            "line after a blank line": last == "" and c != "\n",
            "line after a colon": last is not None and last.endswith(":"),
            "after a long line": last is not None and len(last) > 40,
            "line end next": after == "\n",
            "in quotes or brackets": depth > 0 or line.count('"') % 2 == 1,
            "in a tag": so_far.rfind("<") > so_far.rfind(">"),
            "in a link": so_far.rfind("[[") > so_far.rfind("]]"),
            "in a template": so_far.rfind("{{") > so_far.rfind("}}"),
            "in a URL": not c.isspace() and ("://" in spaces or "www." in spaces),
            "heading or list": line[0] in "=*#:",
        }
        for name, value in now.items():
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize(
    "text", [WIKI, play(3000), WIKI[37:] + play(500) + WIKI], ids=["wiki", "play", "mixed"]
)
def test_labels_are_those_of_a_reader_that_goes_character_by_character(text):
    fast, slow = labels(text), read(text)
    shared = fast.keys() & slow.keys()
    assert len(shared) >= 12
    for name in shared:
        wrong = np.flatnonzero(fast[name] != np.array(slow[name]))
        assert not len(wrong), (
            f"{name} at {wrong[:5]}: {text[max(wrong[0] - 20, 0) : wrong[0] + 1]!r}"
        )


def test_causal_concepts_do_not_look_ahead_and_predictive_ones_do():
    text = play(600) + WIKI
    cut = 700
    concepts = bank(sorted(set(text)))
    whole = label_all(concepts, points(text), points(text[1:] + "\n"), np.array([0]))
    other = text[:cut] + "".join(reversed(text[cut:]))
    changed = label_all(concepts, points(other), points(other[1:] + "\n"), np.array([0]))
    for concept, a, b in zip(concepts, whole, changed, strict=True):
        assert not concept.causal or np.array_equal(a[:cut], b[:cut]), concept.name
    assert any(not c.causal for c in concepts)


def test_only_what_the_alphabet_can_show_is_asked():
    text8 = {c.name: c for c in bank(" " + string.ascii_lowercase)}
    assert not any(c.level == "struct" for c in text8.values()) and {
        "upper case",
        "digit",
        "capitalised word",
    }.isdisjoint(text8)
    assert {
        "vowel",
        "white space",
        "space next",
        "word start",
        "word starts with q",
        "after the word the",
    } <= set(text8)
    assert {"in a tag", "in a link", "heading or list", "in a URL"}.isdisjoint(
        c.name for c in bank(sorted(set(play(5000))))
    )
    assert {"in a tag", "in a link", "in a template", "in a URL", "in quotes or brackets"} <= {
        c.name for c in bank(sorted(set(WIKI)))
    }
    assert {c.name for c in bank("~")} == {"punctuation next"}


def test_a_text_starts_anew_after_a_break():
    text = 'the "a (b and the'
    joined = label_all(
        bank(sorted(set(text + "\n"))), points(text * 2), points(text * 2), np.array([0, len(text)])
    )
    assert np.array_equal(joined[:, : len(text)], joined[:, len(text) :])


def test_symbols_beyond_ascii_belong_to_no_class():
    scan = Scan(points("aéß\u4e00 b"), points("éß\u4e00 b "))
    assert scan.letter.tolist() == [True, False, False, False, False, True]


def test_an_empty_text_has_empty_labels():
    concepts = bank(sorted(set(WIKI)))
    assert label_all(concepts, points(""), points(""), np.array([0])).shape == (len(concepts), 0)
