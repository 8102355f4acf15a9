"""Prompts whose graphs are drawn: given as text, or chosen from the held-out windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_experiments.errors import UserError

#: Kinds of automatic prompts, in the order in which they take turns.
KINDS = ("frequent trigram", "word completion")
#: Frequent trigrams are this many.
TRIGRAMS = 50
#: Probability of the right next character, for a prompt that is neither trivial nor lost.
CONFIDENCE = (0.2, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpec:
    """Which prompts get a graph."""

    texts: Sequence[str] | None  # given prompts (null: chosen from the held-out text)
    count: int  # prompts chosen for null
    length: int  # most characters of a prompt
    windows: int  # held-out windows to choose from, each of which gives at most one prompt

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("length", 4), ("windows", 1)):
            if getattr(self, name) < least:
                raise UserError(
                    f"study.prompts.{name}={getattr(self, name)} must be at least {least}"
                )


class Prompt(NamedTuple):
    """One prompt."""

    tokens: Tensor
    """Token ids, (1, T)."""
    kind: str
    """One of `KINDS`, `any` or `given`."""


def given(texts: Sequence[str], symbols: Sequence[str], length: int) -> list[Prompt]:
    """Prompts that were typed.

    Args:
        texts: The prompts.
        symbols: The character of every token id.
        length: Most characters of a prompt.

    Raises:
        UserError: One is empty, too long, or has a character that the corpus does not have.
    """
    index = {symbol: i for i, symbol in enumerate(symbols)}
    prompts = []
    for text in texts:
        unknown = sorted(set(text) - set(index))
        if unknown or not 2 <= len(text) <= length:
            raise UserError(
                f"study.prompts.texts: {text!r} must have 2 to {length} characters that the "
                f"corpus has{f', not {unknown}' if unknown else ''}"
            )
        prompts.append(Prompt(torch.tensor([[index[c] for c in text]]), "given"))
    return prompts


@torch.no_grad()
def choose(
    model: nn.Module, tokens: Tensor, following: Tensor, symbols: Sequence[str], spec: PromptSpec
) -> list[Prompt]:
    """Beginnings of windows that the model continues correctly, and is not quite sure of.

    A frequent trigram ends with the prompt's next character; a word completion has a letter before,
    at and after the end. Kinds take turns, and no two prompts share their last trigram.

    Args:
        model: The language model.
        tokens: Held-out windows (W, T).
        following: The characters after each position, (W, T).
        symbols: The character of every token id.
        spec: Number and length of the prompts.
    """
    length = min(spec.length, tokens.shape[1])
    x, y = tokens[:, :length], following[:, :length]
    device = next(model.parameters()).device
    log_p = model(input_ids=x.to(device), use_cache=False).logits.log_softmax(-1).cpu()
    right = log_p.argmax(-1) == y
    sure = log_p.gather(2, y[..., None])[..., 0].exp()
    good = right & (sure >= CONFIDENCE[0]) & (sure <= CONFIDENCE[1])
    good[:, : max(length // 2, 2)] = False
    trigrams = torch.stack([x[:, :-1], x[:, 1:], y[:, 1:]], -1).tolist()
    counted = Counter(tuple(t) for window in trigrams for t in window)
    frequent = {t for t, _ in counted.most_common(TRIGRAMS)}

    def kind_of(trigram: tuple[int, ...]) -> set[str]:
        letters = all(symbols[i].isalpha() for i in trigram)
        kinds = {"frequent trigram"} if trigram in frequent else set()
        return kinds | ({"word completion"} if letters else set())

    chosen: list[Prompt] = []
    taken: set[tuple[int, ...]] = set()
    for window, allowed in enumerate(good):
        wanted = KINDS[len(chosen) % len(KINDS)]
        for t in allowed.nonzero().squeeze(1).tolist():
            trigram = tuple(trigrams[window][t - 1])
            if wanted in kind_of(trigram) and trigram not in taken:
                taken.add(trigram)
                chosen.append(Prompt(x[window : window + 1, : t + 1], wanted))
                break
        if len(chosen) == spec.count:
            return chosen
    rest = [Prompt(x[i : i + 1], "any") for i in range(min(len(x), spec.count - len(chosen)))]
    return chosen + rest
