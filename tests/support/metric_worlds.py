"""Small worlds with known answers for the metrics that read text: a made text, and activations
and SAEs that are functions of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_experiments.metrics.base import EvalContext, LMSplice, Rows
from sae_experiments.models.hooks import Site
from sae_experiments.models.store import Source, Store, collect
from sae_experiments.saes.base import SAE

CPU, SITE = torch.device("cpu"), Site("resid", 1)
LENGTH = 32
WORDS = (
    "the and you my of thing where what kind eat tale stone water bring quiet in him win great"
    " people island never upon walk"
)


class TextStore:
    """What a Store shows: windows of text, one activation (D,) a character."""

    def __init__(self, x: Tensor, starts: np.ndarray, length: int) -> None:
        self.x, self.starts, self.length, self.n_rows = x, starts, length, len(x)

    def rows(self, site: Site, index: Any) -> Tensor:
        return self.x[index]

    def width(self, site: Site) -> int:
        return self.x.shape[1]


class Given(SAE):
    """An SAE whose encoder is ``ReLU(x W_enc^T + b_enc)`` with weights as given; the identity
    unless told otherwise.
    """

    def __init__(
        self,
        w_enc: Tensor | None = None,
        w_dec: Tensor | None = None,
        b_enc: Tensor | None = None,
        d_in: int = 4,
    ) -> None:
        rows = torch.eye(d_in) if w_enc is None else w_enc.float()
        super().__init__(d_in=rows.shape[1], d_sae=len(rows))
        self.W_enc.data.copy_(rows)
        self.W_dec.data.copy_(rows if w_dec is None else w_dec)
        if b_enc is not None:
            self.b_enc.data.copy_(b_enc)


class Chunked(EvalContext):
    """A ctx that gives 37 rows at a time."""

    def chunks(self, limit: int | None = None, size: int = 4096) -> Iterator[Rows]:
        return super().chunks(limit, 37)


def points(text: str) -> np.ndarray:
    return np.array([ord(c) for c in text], dtype=np.uint32)


def play(n: int, seed: int = 0) -> str:
    """``n`` characters that look like a play: names, short speeches, capitals, all vowels and
    many words.
    """
    chance = random.Random(seed)
    words = WORDS.split()
    out = ""
    while len(out) < n:
        out += chance.choice(["ROMEO", "JULIET", "First Citizen"]) + ":\n"
        for _ in range(chance.randint(1, 4)):
            line = " ".join(chance.choice(words) for _ in range(chance.randint(3, 11)))
            out += line[0].upper() + line[1:] + chance.choice(".!?,;") + "\n"
        out += "\n"
    return out[:n]


def ctx(
    text: str,
    features: Callable[[str], Sequence[np.ndarray]],
    sae: SAE | None = None,
    *,
    kind: type[EvalContext] = EvalContext,
    model: Any = None,
    **kwargs: Any,
) -> EvalContext:
    """A ctx over ``text`` in windows; ``features(text)`` gives the columns of the activations."""
    symbols = sorted(set(text))
    ids = np.array([symbols.index(c) for c in text])
    starts = np.arange(0, len(text) - LENGTH, LENGTH)
    x = torch.from_numpy(np.stack(features(text), axis=1).astype(np.float32))[
        : len(starts) * LENGTH
    ]

    def tokens(at: np.ndarray) -> tuple[Tensor, Tensor]:
        found = torch.from_numpy(np.stack([ids[s : s + LENGTH + 1] for s in at]))
        return found[:, :-1], found[:, 1:]

    return kind(
        sae=sae or Given(d_in=x.shape[1]),
        device=CPU,
        read=SITE,
        write=SITE,
        held_out=TextStore(x, starts, LENGTH),
        lm=LMSplice(model, SITE, tokens),
        symbols=symbols,
        **kwargs,
    )


def validation_store(
    trained: Any, corpus: Any, sites: Sequence[Site], cache: Path, starts: np.ndarray | None = None
) -> Store:
    """Activations of windows of a validation text, 16 characters each; of the first 40 if None."""
    if starts is None:
        starts = np.arange(0, 40 * 16, 16)
    source = Source(
        model=trained.model,
        tokens_of=lambda starts: corpus.windows("val", starts, 16),
        length=16,
        split="val",
        key=trained.key,
        dtype="float32",
        batch=16,
    )
    return collect(source, starts, sites, cache=cache)


def validation_tokens(corpus: Any) -> Callable[[np.ndarray], tuple[Tensor, ...]]:
    """Ids and next ids of windows of a validation text, as `LMSplice.tokens` gives them."""
    return lambda at: tuple(corpus.windows("val", at + shift, 16) for shift in (0, 1))


def on_validation_text(
    sae: SAE, trained: Any, corpus: Any, held_out: Store, site: Site, **kwargs: Any
) -> EvalContext:
    """A ctx of an SAE of one site of a trained model, on the text of `validation_store`."""
    return EvalContext(
        sae=sae,
        device=CPU,
        read=site,
        write=site,
        held_out=held_out,
        lm=LMSplice(trained.model, site, validation_tokens(corpus)),
        **kwargs,
    )
