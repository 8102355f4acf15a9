"""A text as token ids in a memory map, encoded once, with its documents kept apart."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_experiments.cache import cached
from sae_experiments.corpora.corpus import drawn_starts, shifted, windows_of
from sae_experiments.corpora.documents import Piece, Source, SplitSpec, split_sizes
from sae_experiments.errors import UserError
from sae_experiments.files import digest, read_json, write_json
from sae_experiments.source import source_digest

#: Pieces of text that are encoded together.
BATCH = 64

#: Maps texts to token ids.
Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenCorpus:
    """An encoded text."""

    name: str
    """Name of the text in configuration and results."""
    splits: dict[str, np.ndarray]
    """Memory maps of the ids of each split."""
    ends: dict[str, np.ndarray]
    """Ends of the documents in each split; windows stay inside of one."""
    pieces: list[str]
    """Text of every id."""
    provenance: dict[str, Any]
    """Entry of the manifest about the text."""
    key: str
    """Digest of ids, splits and documents."""
    encode_texts: Encode
    """Ids of texts."""
    symbols: tuple[str, ...] = ()
    """Empty: tokens are not characters."""

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return len(self.pieces)

    def bytes_per_token(self, split: str) -> float:
        """Mean number of bytes of UTF-8 per token of a split."""
        return self.provenance["utf8_bytes"][split] / self.provenance["counts"][split]

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text."""
        return np.asarray(self.encode_texts([text])[0], dtype=np.int64)

    def window_starts(self, split: str, length: int) -> np.ndarray:
        """Starts of windows of `length` tokens that do not overlap.

        Each lies inside one document and has a token of that document after it, to predict.

        Raises:
            UserError: No document is long enough.
        """
        of_documents = []
        begin = 0
        for end in self.ends[split].tolist():
            of_documents.append(np.arange(begin, end - length, length, dtype=np.int64))
            begin = end
        starts = np.concatenate(of_documents)
        if not len(starts):
            n = len(self.splits[split])
            raise UserError(
                f"data.{self.name}: no document of the {split} split ({len(of_documents):,} with "
                f"{n:,} tokens) is longer than a window of {length} tokens: use a longer text, "
                "a smaller lm.n_positions, or across=true, which joins documents"
            )
        return starts

    def windows(self, split: str, starts: np.ndarray, length: int) -> torch.Tensor:
        """Windows of `length` ids that begin at `starts` (n,), int64 (n, length)."""
        return windows_of(self.splits[split], starts, length)

    def batch_at(
        self, split: str, step: int, *, rows: int, length: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (the inputs shifted by one), int64 (rows, length).

        Windows begin anywhere, at offsets drawn from (seed, step) alone; they may hold the end of
        one document and the beginning of the next.

        Raises:
            UserError: The split is shorter than a window.
        """
        starts = self.starts_at(split, step, rows=rows, length=length, seed=seed)
        return shifted(self.windows(split, starts, length + 1))

    def starts_at(self, split: str, step: int, *, rows: int, length: int, seed: int) -> np.ndarray:
        """Offsets (rows,) of the windows of a batch, drawn from (seed, step) alone.

        Raises:
            UserError: The split is shorter than a window and its target.
        """
        size, what = len(self.splits[split]), f"the {split} split of {self.name}"
        return drawn_starts(size, length, f"{what} has {size:,} tokens", rows, [seed, step])


def encoded(
    spec: SplitSpec,
    source: Source,
    encode: Encode,
    pieces: list[str],
    *,
    tokenizer: Mapping[str, Any],
    cache: Path,
) -> TokenCorpus:
    """Encode a text unless it is in the cache.

    Args:
        spec: Rules by which documents become windows and splits.
        source: The text.
        encode: Ids of texts.
        pieces: Text of every id.
        tokenizer: Everything that determines the ids, for the cache key.
        cache: Folder of the cache.

    Raises:
        UserError: The text cannot be read, or is too short to be split.
    """
    key = {
        "what": "tokens",
        "text": source.key,
        "tokenizer": tokenizer,
        "separator": spec.separator if spec.across else None,
        "val_frac": spec.val_frac,
        "test_frac": spec.test_frac,
        "code": source_digest(alone=[__name__, Piece.__module__]),
    }
    folder = cached(
        cache, "corpora", key, lambda part: _write(part, spec, source, encode, len(pieces))
    )
    meta = read_json(folder / "meta.json")
    ids = np.memmap(folder / "ids.bin", dtype=meta["dtype"], mode="r")
    ends = np.load(folder / "ends.npy", allow_pickle=False)
    splits, ends_of, begin = {}, {}, 0
    for split, count in meta["counts"]:
        splits[split] = ids[begin : begin + count]
        inside = ends[(ends > begin) & (ends < begin + count)] - begin
        ends_of[split] = np.append(inside, count)
        begin += count
    about = {
        "symbols": len(pieces),
        "unit": "token",
        "counts": dict(meta["counts"]),
        "utf8_bytes": meta["utf8_bytes"],
        "documents": {split: len(e) for split, e in ends_of.items()},
    }
    return TokenCorpus(
        name=spec.name,
        splits=splits,
        ends=ends_of,
        pieces=pieces,
        provenance={**source.origin, **about},
        key=digest(meta),
        encode_texts=encode,
    )


def _write(folder: Path, spec: SplitSpec, source: Source, encode: Encode, vocabulary: int) -> None:
    dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
    written = hashlib.sha256()
    counts: dict[str | None, int] = {}
    sizes: dict[str | None, int] = {}
    ends: list[int] = []
    total = 0
    with open(folder / "ids.bin", "wb") as f:
        for split, documents in source.parts():
            before = total
            for text, ids, last in _encoded(_joined(documents, spec), encode):
                data = np.asarray(ids, dtype=np.int64)
                if len(data) and not 0 <= data.min() <= data.max() < vocabulary:
                    raise UserError(
                        f"data.{spec.name}: the tokenizer gives id {data.max()}, but the model has "
                        f"{vocabulary} ids"
                    )
                block = data.astype(dtype).tobytes()
                f.write(block)
                written.update(block)
                sizes[split] = sizes.get(split, 0) + len(text.encode("utf-8", "surrogatepass"))
                total += len(data)
                if last:
                    ends.append(total)
            counts[split] = total - before
    shares, lengths = _shares(spec, counts, sizes)
    np.save(folder / "ends.npy", np.unique(np.asarray(ends, dtype=np.int64)))
    meta = {"dtype": dtype.name, "counts": list(lengths.items()), "utf8_bytes": shares}
    meta |= {"ids_sha256": written.hexdigest(), "ends_sha256": digest(ends)}
    write_json(folder / "meta.json", meta)


def _joined(documents: Iterator[Piece], spec: SplitSpec) -> Iterator[Piece]:
    """The documents, or one document of them all with the separator in between."""
    if not spec.across:
        yield from documents
        return
    for piece in documents:
        yield Piece(piece.text, False)
        if piece.last:
            yield Piece(spec.separator, False)
    yield Piece("", True)


def _encoded(
    documents: Iterator[Piece], encode: Encode
) -> Iterator[tuple[str, Sequence[int], bool]]:
    """Text, ids and `last` of every piece."""
    while batch := list(itertools.islice(documents, BATCH)):
        for piece, ids in zip(batch, encode([p.text for p in batch]), strict=True):
            yield piece.text, ids, piece.last


def _shares(
    spec: SplitSpec, counts: Mapping[str | None, int], sizes: Mapping[str | None, int]
) -> tuple[dict[str, float], dict[str, int]]:
    """Bytes and tokens of each split; a text without splits is cut by its fractions."""
    if None not in counts:
        named = {split: n for split, n in counts.items() if split is not None}
        return {split: float(sizes.get(split, 0)) for split in named}, named
    n = counts[None]
    lengths = split_sizes(spec.name, spec.val_frac, spec.test_frac, n, "tokens")
    per_token = sizes.get(None, 0) / n
    return {split: per_token * length for split, length in lengths.items()}, lengths
