"""Batches with a second view of their rows: activations after some characters were replaced."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_experiments.models.hooks import as_sites
from sae_experiments.models.store import Source, Store, collect
from sae_experiments.models.stream import ChunkIndex, Stream
from sae_experiments.saes.base import Batch
from sae_experiments.studies.base import Context
from sae_experiments.studies.language.stores import Stores, Where, rows_of
from sae_experiments.training.loop import seed_of


class SecondView:
    """A second store over the training windows, in which some characters were replaced.

    A row whose own character was replaced is its own second view: only the characters before a
    position may differ.

    Args:
        stores: The rows that batches are made of.
        read: Site that the SAE reads.
        share: Probability with which each character is replaced.
        ctx: Context of the run.
    """

    def __init__(self, stores: Stores, read: Where, share: float, ctx: Context) -> None:
        self.stores = stores
        self.share = share
        self.seed = seed_of(stores.seed, "second view", share)
        train = stores.train
        source = Source(
            model=stores.model,
            tokens_of=lambda starts: self.replaced(starts)[0],
            length=train.length,
            split=train.split,
            key={"lm": train.key["of"], "replaced": share, "seed": self.seed},
            dtype=stores.fit.store_dtype,
            batch=stores.fit.collect_batch,
        )
        sites = list(as_sites(read))
        self.store: Store | Stream
        with ctx.console.stage("collect second view", "window") as tick:
            if isinstance(train, Stream):
                self.store = train.over(source).only(sites)
            elif stores.kind == "memory":
                self.store = Store.in_memory(source, train.starts, sites, tick)
            else:
                self.store = collect(source, train.starts, sites, cache=ctx.cache, tick=tick)
        self.own = torch.cat(
            [
                self.replaced(part)[1]
                for part in np.array_split(train.starts, -(-len(train.starts) // 1024))
            ]
        ).flatten()

    def replaced(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ids of windows with some characters replaced, as a function of each window alone.

        Args:
            starts: Starts of the windows, (n,).

        Returns:
            The ids (n, T), and a boolean (n, T) that is true for those that were replaced.
        """
        length = self.stores.train.length
        ids = self.stores.corpus.windows(self.stores.train.split, starts, length)
        symbols = max(self.stores.corpus.vocabulary, 2)
        chance = [np.random.default_rng([self.seed & 0xFFFFFFFF, int(start)]) for start in starts]
        gone = torch.from_numpy(np.stack([c.random(length) < self.share for c in chance]))
        shift = torch.from_numpy(np.stack([c.integers(1, symbols, length) for c in chance]))
        return torch.where(gone, (ids + shift) % symbols, ids), gone

    def batch_at(self, step: int, read: Where, write: Any) -> Batch:
        """The batch of a step with its second view, in `alt`."""
        batch = self.stores.batch_at(step, read, write)
        index = self.stores.index_at(step)
        alt = rows_of(self.store, read, index).to(batch.x.device)
        numbers = index.rows if isinstance(index, ChunkIndex) else index
        own = self.own[torch.from_numpy(numbers).long()].to(batch.x.device)
        return batch._replace(alt=torch.where(own[:, None], batch.x, alt))
