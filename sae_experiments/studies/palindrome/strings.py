"""All palindromes `<abc|cba>` over a small alphabet, as ids, and their split."""

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
#: Letters of a half.
HALF = 3
#: Characters of a string. The model reads all but the last and predicts all but the first.
LENGTH = 2 * HALF + 3
#: Predictions, of LENGTH - 1, that are letters of the mirrored half.
MIRROR = slice(HALF + 1, 2 * HALF + 1)
#: Least loss in nats per token: a free letter costs log 26, and all else is certain.
FLOOR = HALF * math.log(len(LETTERS)) / (LENGTH - 1)


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
    """Split of the strings into training and test strings."""

    split: str
    """`random`, by the seed, or `alphabetical`: the last ones are tested, whose first letters are
    never trained on."""
    test_frac: float
    """Share of the test strings."""

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
    """Row numbers of a batch, a function of seed and step: the order is shuffled in every epoch.

    Args:
        n: Number of rows in all.
        step: Number of the batch.
        rows: Rows per batch.
        seed: Seed of the order.
    """
    epoch, within = divmod(step, max(n // rows, 1))
    order = np.random.default_rng([seed & 0xFFFFFFFF, seed >> 32, epoch]).permutation(n)
    return torch.from_numpy(order[within * rows : (within + 1) * rows])
