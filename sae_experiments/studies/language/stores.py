"""The activations of a cell: rows to train on, to calibrate on and to evaluate on, and batches."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_experiments.corpora.corpus import CharCorpus
from sae_experiments.corpora.tokens import TokenCorpus
from sae_experiments.errors import UserError, of_type
from sae_experiments.fitting.fit import Sample
from sae_experiments.fitting.spec import FitSpec
from sae_experiments.models.device_rows import Ahead, DeviceRows
from sae_experiments.models.gpt2 import TrainedLM
from sae_experiments.models.hooks import Site, Sites, as_sites, blocks_of, capture, patched
from sae_experiments.models.layouts import layout_of_model
from sae_experiments.models.local import TokenText
from sae_experiments.models.store import Source, Store, bytes_to_collect, collect
from sae_experiments.models.stream import ChunkIndex, Stream, Watch
from sae_experiments.models.windows import whole_windows
from sae_experiments.quality_warnings import Warned, of_rows
from sae_experiments.resources import Need, announce
from sae_experiments.saes import ops
from sae_experiments.saes.base import Batch
from sae_experiments.saes.types import Downstream
from sae_experiments.sampling import spread_order
from sae_experiments.studies.base import Context
from sae_experiments.training.loop import seed_of

#: One site, or several side by side.
Where = Site | Sites
#: Neighbouring held-out windows that stay together.
DOCUMENT = 8


class Stores:
    """Training, calibration and held-out rows of one language model.

    Training and calibration windows are disjoint; held-out windows are of another split, or of
    another part of the validation split. They are ordered so that the first n of them, for any n,
    are spread over the whole split (see `sampling.spread_order`); eight neighbours at a time stay
    together, which is what metrics take for a document. Training and calibration rows are in the
    order of the text.
    """

    def __init__(
        self,
        fit: FitSpec,
        sites: Sequence[Site],
        corpus: CharCorpus | TokenCorpus | TokenText,
        lm: TrainedLM,
        seed: int,
        ctx: Context,
        *,
        held_out: str = "val",
    ) -> None:
        self.fit = fit
        self.corpus = corpus
        self.model = lm.model
        self.seed = seed
        self.device = ctx.device
        #: Seed of the order of the batches; the windows are those of `seed`.
        self.order = seed
        began = time.monotonic()
        parts = self._parts(lm, held_out)
        #: Place of the rows while they are used: disk, memory or stream.
        self.kind = kind_of(fit, list(parts.values()), sites, ctx.cache)
        announce_memory(self.kind, fit, list(parts.values()), sites, ctx)
        self.calibration = self._collected("calibration", parts, sites, ctx)
        self.held_out = self._collected("held-out", parts, sites, ctx)
        self.train: Store | Stream
        if self.kind == "stream":
            self.train = Stream(
                *parts["train"],
                sites,
                chunk_rows=fit.chunk_rows,
                batch_rows=fit.train.batch_size,
                kept=self.calibration.kept,
                watch=Watch(lambda name: ctx.console.stage(name, "window")),
            )
        else:
            self.train = self._collected("train", parts, sites, ctx)
        self._effects: dict[Site, Callable[..., dict[str, Tensor]]] = {}
        #: Training rows of a pass near the device; None: they are read when they are needed.
        self.near: DeviceRows | Ahead | None = None
        self.seconds = time.monotonic() - began

    def _parts(self, lm: TrainedLM, held_out: str) -> dict[str, Part]:
        """Windows for training, calibration and evaluation; also sets `split`."""
        fit, corpus = self.fit, self.corpus
        length = lm.model.config.n_positions
        train, calibration = split_windows(
            corpus.window_starts("train", length),
            length,
            fit.train_rows,
            fit.calibration_rows,
            seed_of(self.seed, "windows"),
        )
        windows = {
            name: corpus.window_starts(name, length) for name in corpus.splits if name != "train"
        }
        #: Split of the text that the held-out windows lie in.
        self.split, held = held_out_starts(windows, held_out, length, fit.held_out_rows)

        def source(split: str) -> Source:
            return Source(
                model=lm.model,
                tokens_of=lambda starts: corpus.windows(split, starts, length),
                length=length,
                split=split,
                key={"lm": lm.key, "text": corpus.key},
                dtype=fit.store_dtype,
                batch=fit.collect_batch,
            )

        return {
            "train": (source("train"), train),
            "calibration": (source("train"), calibration),
            "held-out": (source(self.split), held),
        }

    def _collected(
        self, name: str, parts: Mapping[str, Part], sites: Sequence[Site], ctx: Context
    ) -> Store:
        """The activations of one part, collected on disk or in memory."""
        with ctx.console.stage(f"collect {name}", "window") as tick:
            if self.kind == "disk":
                return collect(*parts[name], sites, cache=ctx.cache, tick=tick)
            return Store.in_memory(*parts[name], sites, tick)

    def for_pass(self, read: Where, write: Where) -> Stores:
        """The same stores for a fit that reads and rebuilds these sites alone."""
        other = copy.copy(self)
        if isinstance(self.train, Stream):
            other.train = self.train.only([*as_sites(read), *as_sites(write)])
        return other

    def bring_near(self, read: Where, write: Where) -> None:
        """With `fit.backend=device`: rows onto the device where they fit, else a step ahead."""
        if isinstance(self.train, Stream) or self.fit.backend != "device":
            return
        sites = list(dict.fromkeys([*as_sites(read), *as_sites(write)]))
        if DeviceRows.fit(self.train, sites, self.device):
            self.near = DeviceRows(self.train, sites, self.device)
        else:
            self.near = Ahead(self._host_rows(read, write), self.device)

    def _host_rows(self, read: Where, write: Where) -> Callable[[int], tuple[Tensor, ...]]:
        """Function that reads the rows of a step into the memory of the processor."""
        places = [read] if read == write else [read, write]

        def rows(step: int) -> tuple[Tensor, ...]:
            index = self.index_at(step)
            return tuple(rows_of(self.train, place, index) for place in places)

        return rows

    def close(self) -> None:
        """Let go of rows near the device."""
        if isinstance(self.near, Ahead):
            self.near.close()
        self.near = None

    @property
    def read_from(self) -> str:
        """Place that the rows of a pass are read from, for the log."""
        names = {DeviceRows: "the device's memory", Ahead: f"{self.kind}, ahead of time"}
        return names.get(type(self.near), self.kind)

    def short(self) -> list[Warned]:
        """Warnings about texts with fewer rows than were asked for."""
        asked = {
            "train_rows": self.train,
            "calibration_rows": self.calibration,
            "held_out_rows": self.held_out,
        }
        return [
            w
            for name, store in asked.items()
            for w in of_rows(f"fit.{name}", store.n_rows, getattr(self.fit, name))
        ]

    def identity(self, read: Where, write: Where) -> dict[str, Any]:
        """Identity of the rows of two sites, for cache keys, whatever else the stores hold."""
        parts = {
            k: {n: v for n, v in store.key.items() if n != "sites"}
            for k, store in (("train", self.train), ("calibration", self.calibration))
        }
        return parts | {
            "read": [str(s) for s in as_sites(read)],
            "write": [str(s) for s in as_sites(write)],
        }

    def tokens(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ids of held-out windows and of the characters that follow each position, (n, T) both."""
        length = self.held_out.length
        ids = self.corpus.windows(self.split, starts, length)
        return ids, self.corpus.windows(self.split, starts + 1, length)

    def ordered(self, order: int) -> Stores:
        """The same stores for a fit from another seed, which orders batches and initial rows."""
        other = copy.copy(self)
        other.order = order
        return other

    def index_at(self, step: int) -> np.ndarray | ChunkIndex:
        """The training rows of one step."""
        return self.train.index_at(
            step, rows=self.fit.train.batch_size, seed=seed_of(self.order, "rows")
        )

    def batch_at(self, step: int, read: Where, write: Where) -> Batch:
        """Shuffled rows of one step, as raw float32 activations on the device."""
        if isinstance(self.near, Ahead):
            parts = self.near(step)
            return Batch(parts[0], parts[-1])
        return self._batch(self.index_at(step), read, write)

    def windows_at(self, step: int, read: Where, write: Site) -> Batch:
        """Whole windows of one step, with the effect of a reconstruction on the language model.

        They have about as many rows as a plain batch.
        """
        length = self.train.length
        n = max(1, self.fit.train.batch_size // length)
        windows = np.random.default_rng([self.order, step]).choice(
            len(self.train.starts), n, replace=False
        )
        batch = self._batch(
            (windows[:, None] * length + np.arange(length)).reshape(-1), read, write
        )
        tokens = self.corpus.windows("train", self.train.starts[windows], length).to(self.device)
        effect = self._effects.setdefault(write, partial(effect_of, self.model, write))
        recordable = not layout_of_model(self.model).waits
        return batch._replace(downstream=Downstream(effect, tokens, recordable=recordable))

    def _batch(self, index: np.ndarray | ChunkIndex, read: Where, write: Where) -> Batch:
        x = self._rows(index, read)
        return Batch(x, x if read == write else self._rows(index, write))

    def _rows(self, index: np.ndarray | ChunkIndex, where: Where) -> Tensor:
        if isinstance(self.near, DeviceRows):
            return self.near.rows(where, of_type(index, np.ndarray))
        return rows_of(self.train, where, index).to(self.device, non_blocking=True)

    @property
    def sample_rows(self) -> tuple[int, int]:
        """Rows to initialise from, and to calibrate on."""
        return min(self.fit.init_rows, self.train.n_at_once), self.calibration.n_rows

    def sample(self, read: Where, write: Where) -> Sample:
        """Rows to initialise from (training rows) and to calibrate on (never trained on)."""
        # Of a stream they are from the first chunk that the fit reads, which is collected once.
        purpose = "init" if isinstance(self.train, Store) else "rows"
        rows, _ = self.sample_rows
        index = self.train.index_at(0, rows=rows, seed=seed_of(self.order, purpose))
        x, y = (rows_of(self.train, where, index).to(self.device) for where in (read, write))
        return Sample(x, y, self.calibration.rows(read, slice(None)).to(self.device))


#: Source of windows, and the starts of the windows.
Part = tuple[Source, np.ndarray]


def rows_of(rows: Store | Stream, where: Where, index: np.ndarray | ChunkIndex) -> Tensor:
    """Rows (n, D) that the `index_at` of the same store or stream chose."""
    if isinstance(rows, Stream):
        return rows.rows(where, index)
    return rows.rows(where, of_type(index, np.ndarray))


def kind_of(fit: FitSpec, parts: Sequence[Part], sites: Sequence[Site], cache: Path) -> str:
    """Storage of the rows: `fit.store`, or for `auto` a stream if the disk is too small.

    Args:
        fit: Holds `store` and the share of the free disk that stores may take.
        parts: Windows to collect.
        sites: Sites to collect.
        cache: Folder of the cache, on the disk in question.
    """
    if fit.store != "auto":
        return fit.store
    asked, unfinished = np.sum(
        [bytes_to_collect(source, starts, sites, cache) for source, starts in parts], axis=0
    )
    place = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free + unfinished
    return "stream" if asked > fit.disk_share * free else "disk"


def announce_memory(
    kind: str, fit: FitSpec, parts: Sequence[Part], sites: Sequence[Site], ctx: Context
) -> None:
    """Announce the memory that rows will take, if it is much.

    Args:
        kind: Storage of the rows: disk, memory or stream.
        fit: Sizes and precision.
        parts: Training, calibration and held-out windows.
        sites: Sites to collect.
        ctx: Context of the run, for its console.

    Raises:
        UserError: There is not enough memory.
    """
    if kind == "disk":
        return
    source, starts = parts[0]
    width = sum(source.widths(sites, int(starts[0])).values())
    size = width * np.dtype(fit.store_dtype).itemsize
    train, *others = (len(starts) * source.length for _, starts in parts)
    at_once = min(train, fit.chunk_rows) if kind == "stream" else train
    need = Need({"training rows": size * at_once, "other rows": size * sum(others)})
    fix = "use fewer rows (fit.train_rows, fit.held_out_rows) or fit.store=disk"
    what = f"fit.store={kind} over {len(sites)} sites"
    announce(what, need, fix, device=torch.device("cpu"), say=ctx.console.say)


def effect_of(model: nn.Module, site: Site, tokens: Tensor, recon: Tensor) -> dict[str, Tensor]:
    """Effect of a reconstruction on the language model; differentiable in the reconstruction.

    Args:
        model: The language model.
        site: Site at which the reconstruction replaces the activation.
        tokens: Token ids (B, T).
        recon: Reconstruction (B T, D).

    Returns:
        `kl`, the mean of KL(p || p') of the next character; and `later`, the mean over later blocks
        of the error in the residual stream, relative to the stream's variance.
    """
    n_layer = len(blocks_of(model))
    first = site.layer + (site.stream == "resid")
    later = [Site("resid", layer) for layer in range(max(first, 1), n_layer + 1)]
    with whole_windows():
        with torch.no_grad(), capture(model, later) as clean:
            logits = model(input_ids=tokens, use_cache=False).logits
            log_p = logits.float().log_softmax(-1)
        with patched(model, site, lambda x: recon.view_as(x)), capture(model, later) as changed:
            log_q = model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum") / tokens.numel()
    errors = [
        (changed[s] - clean[s]).square().sum() / (clean[s] - clean[s].mean((0, 1))).square().sum()
        for s in later
    ]
    return {"kl": kl, "later": ops.total(errors) / len(errors) if errors else kl * 0}


def held_out_starts(
    windows: Mapping[str, np.ndarray], held_out: str, length: int, rows: int
) -> tuple[str, np.ndarray]:
    """Windows that SAEs are evaluated on, in the order that `Stores` describes.

    The rows that a search sees and those that its winner is reported on are disjoint: the
    validation and the test split, or the two halves of the validation split if there is no test
    split.

    Args:
        windows: Starts of the windows of each split.
        held_out: `val`, `search` or `test`.
        length: Symbols per window.
        rows: Rows that the windows should have (at least one window, at most all).

    Returns:
        The split, and the starts.

    Raises:
        UserError: The text is too short for a window in each half.
    """
    own = "test" in windows
    split = "test" if held_out == "test" and own else "val"
    starts = windows[split]
    if held_out != "val" and not own:
        if len(starts) < 3:
            raise UserError(
                f"held_out={held_out}: there is no test split, and the validation split has fewer "
                f"than three windows of {length}: use a longer text, a test_frac or a smaller "
                "lm.n_positions"
            )
        # The window between the halves is in neither: its first character is what the last window
        # before it predicts.
        half = len(starts) // 2
        starts = starts[:half] if held_out == "search" else starts[half + 1 :]
    return split, starts[spread_order(len(starts), DOCUMENT)][: max(1, rows // length)]


def split_windows(
    starts: np.ndarray, length: int, train_rows: int, calibration_rows: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint windows for training and calibration, drawn at random and then sorted.

    Args:
        starts: Starts of all windows, (n,).
        length: Rows per window.
        train_rows: Rows to train on, at most.
        calibration_rows: Rows to calibrate on, at most; they get at most a tenth of all windows.
        seed: Seed of the draw.

    Raises:
        UserError: There are fewer than two windows.
    """
    starts = np.random.default_rng(seed).permutation(starts)
    if len(starts) < 2:
        raise UserError(
            f"a training split holds fewer than two windows of {length}: use a longer text or a "
            "smaller lm.n_positions"
        )
    n_calibration = max(1, min(calibration_rows // length, len(starts) // 10))
    n_train = max(1, min(train_rows // length, len(starts) - n_calibration))
    return np.sort(starts[n_calibration : n_calibration + n_train]), np.sort(starts[:n_calibration])
