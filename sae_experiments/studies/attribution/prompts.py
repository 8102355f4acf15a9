"""Prompts whose graphs are drawn: given as text, or chosen from the held-out windows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError
from sae_experiments.studies.language.lms import Corpus

#: Kinds of automatic prompts.
KINDS = ("frequent trigram", "word completion", "closing quotation", "speaker name")
#: Characters that open and close a quotation alike.
QUOTES = "\"'"
#: Two tokens and the one after them.
Trigram = tuple[str, str, str]
#: Frequent trigrams are this many.
TRIGRAMS = 50
#: Probability of the right next token, for a prompt that is neither trivial nor lost.
CONFIDENCE = (0.2, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpec:
    """Choice of the prompts that get a graph."""

    texts: Sequence[str] | None  # given prompts (null: chosen from the held-out text)
    count: int  # prompts chosen for null
    length: int  # most tokens of a prompt, which are characters for models that read those
    windows: int  # held-out windows to choose from, each of which gives at most one prompt
    kinds: Sequence[str]  # kinds that take turns, of `KINDS`

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("length", 4), ("windows", 1)):
            if getattr(self, name) < least:
                raise UserError(
                    f"study.prompts.{name}={getattr(self, name)} must be at least {least}"
                )
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or not self.kinds:
            raise UserError(
                f"study.prompts.kinds={list(self.kinds)} must be one or more of {', '.join(KINDS)}"
            )


class Prompt(NamedTuple):
    """One prompt."""

    tokens: Tensor
    """Token ids, (1, T)."""
    kind: str
    """One of `KINDS`, `any` or `given`."""


def given(texts: Sequence[str], corpus: Corpus, length: int) -> list[Prompt]:
    """Encode prompts that the user gave as text.

    Args:
        texts: The prompts.
        corpus: The text that the language model reads.
        length: Maximum tokens of a prompt.

    Raises:
        UserError: A prompt is too short, too long, or has a character that the corpus does not
            have.
    """
    what = "characters" if corpus.symbols else "tokens"
    prompts = []
    for text in texts:
        unknown = sorted(set(text) - set(corpus.symbols)) if corpus.symbols else []
        ids = [] if unknown else corpus.encode(text).tolist()
        if not 2 <= len(ids) <= length:
            raise UserError(
                f"study.prompts.texts: {text!r} must have 2 to {length} {what} that the "
                f"corpus has{f', not {unknown}' if unknown else f', not {len(ids)}'}"
            )
        prompts.append(Prompt(torch.tensor([ids]), "given"))
    return prompts


@torch.no_grad()
def choose(
    model: nn.Module, tokens: Tensor, following: Tensor, pieces: Sequence[str], spec: PromptSpec
) -> list[Prompt]:
    """Beginnings of windows that the model continues correctly, and is not quite sure of.

    A frequent trigram ends with the prompt's next token; a word completion ends with two letters
    and goes on with letters; a closing quotation is continued by the quotation mark that closes
    it; a speaker name is a line of letters after an empty one, up to its colon. Kinds that occur
    take turns, and no two prompts share their last trigram.

    Args:
        model: The language model.
        tokens: Held-out windows (W, T).
        following: The tokens after each position, (W, T).
        pieces: Text of every token id.
        spec: Number, length and kinds of the prompts.
    """
    length = min(spec.length, tokens.shape[1])
    x, y = tokens[:, :length], following[:, :length]
    good = _fitting(model, x, y)
    spelling = list(pieces)
    texts = [[spelling[i] for i in window] for window in x.tolist()]
    after = [[spelling[i] for i in window] for window in y.tolist()]
    frequent = _frequent(texts, after)
    places = {kind: _places(kind, texts, after, good, frequent) for kind in spec.kinds}
    occurring = [kind for kind in spec.kinds if any(places[kind])]
    chosen: list[Prompt] = []
    taken: set[Trigram] = set()
    for window in range(len(x) if occurring else 0):
        wanted = occurring[len(chosen) % len(occurring)]
        for t in places[wanted][window]:
            trigram = _trigram(texts[window], t, after[window])
            if trigram not in taken:
                taken.add(trigram)
                chosen.append(Prompt(x[window : window + 1, : t + 1], wanted))
                break
        if len(chosen) == spec.count:
            return chosen
    rest = [Prompt(x[i : i + 1], "any") for i in range(min(len(x), spec.count - len(chosen)))]
    return chosen + rest


def _fitting(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Ends (W, T) of prompts that the model continues correctly, and is not quite sure of."""
    device = next(model.parameters()).device
    log_p = model(input_ids=x.to(device), use_cache=False).logits.log_softmax(-1).cpu()
    sure = log_p.gather(2, y[..., None])[..., 0].exp()
    good = (log_p.argmax(-1) == y) & (sure >= CONFIDENCE[0]) & (sure <= CONFIDENCE[1])
    good[:, : max(x.shape[1] // 2, 2)] = False
    return good


def _trigram(text: Sequence[str], t: int, after: Sequence[str]) -> Trigram:
    """The last two tokens of a prompt that ends at t, and the one after it."""
    return text[t - 1], text[t], after[t]


def _frequent(texts: Sequence[Sequence[str]], after: Sequence[Sequence[str]]) -> set[Trigram]:
    """The most frequent trigrams of windows and what follows each position."""
    counted = Counter(
        _trigram(text, t, following)
        for text, following in zip(texts, after, strict=True)
        for t in range(1, len(text))
    )
    return {trigram for trigram, _ in counted.most_common(TRIGRAMS)}


def _places(
    kind: str,
    texts: Sequence[Sequence[str]],
    after: Sequence[Sequence[str]],
    good: Tensor,
    frequent: set[Trigram],
) -> list[list[int]]:
    """Ends of prompts of one kind in every window, among those that are `good` (W, T)."""
    places = []
    for text, following, allowed in zip(texts, after, good, strict=True):
        ends = allowed.nonzero().squeeze(1).tolist()
        places.append([t for t in ends if _fits(kind, text, t, following, frequent)])
    return places


def _fits(
    kind: str, text: Sequence[str], t: int, after: Sequence[str], frequent: set[Trigram]
) -> bool:
    """True if a window's text up to a position, and the token after it, are of a kind."""
    trigram = _trigram(text, t, after)
    if kind == "frequent trigram":
        return trigram in frequent
    prompt = "".join(text[: t + 1])
    if kind == "word completion":
        return len(prompt) > 1 and (prompt[-2:] + after[t]).isalpha()
    return (
        closes(prompt, after[t]) if kind == "closing quotation" else names_speaker(prompt, after[t])
    )


def closes(text: str, after: str) -> bool:
    """True if a character closes a quotation that the text has opened.

    A quotation opens where a mark follows no letter or digit, so that apostrophes do not.
    """
    if after not in tuple(QUOTES) or not text or text[-1].isspace():
        return False
    opened = re.findall(rf"(?<![^\W_]){after}(?=\S)", text)
    closed = re.findall(rf"(?<=[\w.,;:!?-]){after}(?![^\W_])", text)
    return len(opened) > len(closed)


def names_speaker(text: str, after: str) -> bool:
    """True inside the name of a speaker: a line of letters after an empty one, up to its colon."""
    empty, _, line = text.rpartition("\n\n")
    letters = line.replace(" ", "")
    inside = bool(empty or text.startswith("\n\n")) and len(line) > 1 and "\n" not in line
    return inside and letters.isalpha() and line[0].isupper() and (after.isalpha() or after == ":")
