"""All palindromes ``<abc|cba>`` over a small alphabet, as ids, and how they are split."""

from __future__ import annotations

import itertools
import math
import string
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae_experiments.errors import UserError

LETTERS = string.ascii_lowercase
SYMBOLS = LETTERS + "<|>"
HALF = 3
LENGTH = (
    2 * HALF + 3
)  # characters of a string; the model reads all but the last and predicts all but the first
MIRROR = slice(
    HALF + 1, 2 * HALF + 1
)  # predictions (of LENGTH - 1) that are letters of the mirrored half
FLOOR = (
    HALF * math.log(len(LETTERS)) / (LENGTH - 1)
)  # nats a token: the free letters cost log 26 each, all else is certain


def all_strings() -> Tensor:
    """Every string in alphabetical order, as ids (26^3, 9)."""
    free = torch.tensor(list(itertools.product(range(len(LETTERS)), repeat=HALF)))
    begin, bar, end = (torch.full((len(free), 1), SYMBOLS.index(c)) for c in "<|>")
    return torch.cat([begin, free, bar, free.flip(1), end], 1)


def text_of(ids: Tensor) -> str:
    """The characters of a string's ids."""
    return "".join(SYMBOLS[i] for i in ids.tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class Strings:
    """How the strings are split: at ``random`` (a function of the seed), or ``alphabetical``: the last ones, whose first letters are never trained on."""

    split: str
    test_frac: float

    def __post_init__(self) -> None:
        if self.split not in ("random", "alphabetical"):
            raise UserError(f"study.data.split={self.split!r} is not one of random, alphabetical")
        if not 0 <= self.test_frac <= 1:
            raise UserError(f"study.data.test_frac={self.test_frac} must lie between 0 and 1")
        n = len(LETTERS) ** HALF
        if not 0 < round(self.test_frac * n) < n:
            raise UserError(
                f"study.data.test_frac={self.test_frac} leaves an empty split of the {n:,} strings"
            )

    def parts(self, seed: int) -> tuple[Tensor, Tensor]:
        """Train and test strings (N, 9)."""
        strings = all_strings()
        n_test = round(self.test_frac * len(strings))
        if self.split == "random":
            order = np.random.default_rng([seed & 0xFFFFFFFF, seed >> 32]).permutation(len(strings))
            strings = strings[torch.from_numpy(order)]
        return strings[:-n_test], strings[-n_test:]


def rows_at(n: int, step: int, rows: int, seed: int) -> Tensor:
    """Row numbers of batch ``step``: all n in an order shuffled anew each epoch, a function of (seed, step) alone."""
    epoch, within = divmod(step, max(n // rows, 1))
    order = np.random.default_rng([seed & 0xFFFFFFFF, seed >> 32, epoch]).permutation(n)
    return torch.from_numpy(order[within * rows : (within + 1) * rows])
