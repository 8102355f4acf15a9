"""Character corpora: texts that are located, verified, encoded once and read as windows.

Downloads are in `corpora.download`.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sae_experiments import cache, errors, files
from sae_experiments.cache import cached, clearing
from sae_experiments.corpora import download as fetch
from sae_experiments.corpora import standin
from sae_experiments.corpora.documents import (
    Piece,
    Source,
    check_fractions,
    cut_text,
    split_sizes,
)
from sae_experiments.errors import UserError
from sae_experiments.files import digest, read_json, write_json
from sae_experiments.source import source_digest

#: Bytes that are encoded at a time, so that the memory does not grow with the corpus.
BLOCK = 1 << 22
#: First bytes of files that are not UTF-8 text. UTF-32's mark begins with UTF-16's, so it is first.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive",
    b"BZh91AY&SY": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
}
#: By encoding: of four consecutive bytes, those that are mostly control characters.
CONTROLS = {
    "UTF-16LE": [False, True, False, True],
    "UTF-16BE": [True, False, True, False],
    "UTF-32LE": [False, True, True, True],
    "UTF-32BE": [True, True, True, False],
}
CHOICES = {
    "encoding": ("latin-1", "utf-8"),
    "stand_in": ("auto", "never", "always"),
    "stand_in_alphabet": tuple(standin.FORMS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSpec:
    """Sources of a character corpus, its checksums, and its splits.

    Raises:
        UserError: A value is invalid.
    """

    name: str
    """Name of the corpus in results."""
    sources: list[dict[str, Any]]
    """Downloads, tried in order: url, bytes, sha256 or md5, archive (null, zip or gz), member."""
    bytes: int | None
    """Size of the whole text."""
    sha256: str | None
    """Checksum of the whole text."""
    md5: str | None = None
    """Checksum of the whole text, if no sha256 of it is known."""
    local_names: list[str]
    """File names of the whole text in the folder SAE_DATA_DIR; `<name>-head-<n>` there holds its
    first n bytes."""
    head: int | None
    """Use the first n bytes only, as a corpus of its own; None: all."""
    heads: dict[str, int | None] = field(default_factory=dict)
    """Sizes by name, from which a preset chooses `head`."""
    head_sha256: dict[int, str] = field(default_factory=dict)
    """Checksums, by size, of heads that may come as files of their own."""
    file: str | None
    """A file that is used as it is, in place of the corpus."""
    encoding: str
    """utf-8: a symbol per character; latin-1: a symbol per byte."""
    val_frac: float
    """Share of the text for validation."""
    test_frac: float
    """Share of the text for the test."""
    seeds: list[int]
    """Seeds of its cells, if a run names none."""
    stand_in: str
    """Use of a stand-in for a text that cannot be obtained: auto, never or always."""
    stand_in_alphabet: str
    """Alphabet of the stand-in, one of `standin.FORMS`."""
    recipe: dict[str, Any]
    """Fields of `TrainConfig` for a language model on this corpus."""

    def __post_init__(self) -> None:
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise UserError(
                    f"data.{self.name}.{key}={getattr(self, key)} is not one of "
                    f"{', '.join(allowed)}"
                )
        check_fractions(self.name, self.val_frac, self.test_frac)
        if self.head is not None:
            self._check_head(self.head)
        for source in self.sources:
            self._check_source(source)

    def _check_head(self, head: int) -> None:
        most = self.bytes if self.file is None else None
        too_large = most is not None and isinstance(head, int) and head > most
        if not isinstance(head, int) or head < 1 or too_large:
            limit = f" up to {most:,}" if most else ""
            raise UserError(
                f"data.{self.name}.head={head} must be a number of bytes{limit}, or null for all"
            )

    def _check_source(self, source: Mapping[str, Any]) -> None:
        kind = source.get("archive")
        complete = source.get("url") and source.get("bytes") and kind in (None, "gz", "zip")
        if not complete or (kind == "zip" and not source.get("member")):
            raise UserError(
                f"data.{self.name}.sources: {dict(source)} needs url, bytes, archive (null, gz or "
                "zip) and, for a zip, member"
            )
        checksums = (source.get("sha256"), source.get("md5"), self.sha256, self.md5)
        if self.bytes is None or not any(checksums):
            raise UserError(
                f"data.{self.name}.sources: {source['url']} cannot be verified; give bytes and a "
                "sha256 (or md5) of the text"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """Size and checksums of the whole text, as `download.verify` takes them."""
        return {"size": self.bytes, "sha256": self.sha256, "md5": self.md5}


class Text(NamedTuple):
    """A text that is available locally."""

    path: Path
    """File of the text."""
    source: str
    """Source of the text, as the provenance records it."""
    kind: str
    """`corpus`, `file` (of the user) or `stand-in`."""
    verified: bool
    """True if a checksum was compared."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CharCorpus:
    """A corpus as ids of its characters."""

    name: str
    """Name of the corpus in results."""
    splits: dict[str, np.ndarray]
    """Memory map of the ids of each split."""
    symbols: list[str]
    """Character of each id, in the order of code points."""
    provenance: dict[str, Any]
    """Entry of the manifest about the text."""
    key: str
    """Digest of ids and splits, wherever the text came from."""

    @property
    def vocabulary(self) -> int:
        """Number of symbols."""
        return len(self.symbols)

    @property
    def pieces(self) -> tuple[str, ...]:
        """Text of every token id: empty, since ids are single characters."""
        return ()

    def window_starts(self, split: str, length: int) -> np.ndarray:
        """Starts of windows of a split, see `window_starts`."""
        return window_starts(len(self._split(split)), length)

    def encode(self, text: str) -> np.ndarray:
        """Ids of the characters of `text`.

        Raises:
            UserError: A character does not occur in the corpus.
        """
        known = self._points()
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = np.searchsorted(known, points).clip(max=len(known) - 1)
        if (wrong := np.flatnonzero(known[ids] != points)).size:
            raise UserError(
                f"the corpus {self.name} has no character {text[wrong[0]]!r} (at position "
                f"{wrong[0]} of the text to encode)"
            )
        return ids.astype(self.splits["train"].dtype)

    def decode(self, ids: Any) -> str:
        """The text of `ids`: a list, an array or a tensor, which is flattened.

        Raises:
            UserError: An id is out of range.
        """
        array = np.asarray(ids.detach().cpu() if isinstance(ids, torch.Tensor) else ids)
        array = array.reshape(-1).astype(np.int64)
        if array.size and not 0 <= array.min() <= array.max() < len(self.symbols):
            raise UserError(
                f"the corpus {self.name} has symbols 0 to {len(self.symbols) - 1}, not "
                f"{array.min()} to {array.max()}"
            )
        return self._points()[array].tobytes().decode("utf-32-le", "surrogatepass")

    def batch_at(
        self, split: str, step: int, *, rows: int, length: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (the inputs shifted by one), int64 (rows, length).

        Their offsets are drawn from (seed, step) alone.
        """
        starts = self.starts_at(split, step, rows=rows, length=length, seed=seed)
        return shifted(self.windows(split, starts, length + 1))

    def starts_at(self, split: str, step: int, *, rows: int, length: int, seed: int) -> np.ndarray:
        """Offsets (rows,) of the windows of a batch, drawn from (seed, step) alone.

        Raises:
            UserError: The split is shorter than a window and its target.
        """
        size, what = len(self._split(split)), f"the {split} split of {self.name}"
        return drawn_starts(size, length, f"{what} has {size:,} characters", rows, [seed, step])

    def windows(self, split: str, starts: np.ndarray, length: int) -> torch.Tensor:
        """The windows of `length` ids that begin at `starts`, int64 (n, length).

        Raises:
            UserError: A window does not fit into the split.
        """
        ids, starts = self._split(split), np.asarray(starts, dtype=np.int64)
        if starts.size and not 0 <= starts.min() <= starts.max() <= len(ids) - length:
            raise UserError(
                f"windows of {length} at {starts.min()} to {starts.max()} are not inside the "
                f"{len(ids):,} characters of {split}"
            )
        return windows_of(ids, starts, length)

    def _split(self, split: str) -> np.ndarray:
        if split not in self.splits:
            raise UserError(
                f"the corpus {self.name} has no split {split!r}; it has {', '.join(self.splits)}"
            )
        return self.splits[split]

    def _points(self) -> np.ndarray:
        return np.array([ord(symbol) for symbol in self.symbols], dtype="<u4")


def windows_of(ids: np.ndarray, starts: np.ndarray, length: int) -> torch.Tensor:
    """Windows of `length` ids that begin at `starts` (n,), int64 (n, length)."""
    views = np.lib.stride_tricks.sliding_window_view(ids, length)
    return torch.from_numpy(views[np.asarray(starts, dtype=np.int64)].astype(np.int64))


def shifted(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (n, T), the inputs shifted by one, from windows (n, T + 1)."""
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def drawn_starts(n: int, length: int, told: str, rows: int, seed: list[int]) -> np.ndarray:
    """Offsets (rows,) of random windows of a text that leave room for a target.

    Args:
        n: Number of symbols of the text.
        length: Symbols per window.
        told: The text and its size, for the message.
        rows: Windows to draw.
        seed: What the draw depends on.

    Raises:
        UserError: The text is shorter than a window and its target.
    """
    if n <= length:
        raise UserError(f"{told}: too few for windows of {length} and their targets")
    chance = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    return chance.integers(0, n - length, size=rows)


def window_starts(n: int, length: int) -> np.ndarray:
    """Starts of the non-overlapping windows of a text; each has a symbol after it to predict.

    Args:
        n: Number of symbols of the text.
        length: Symbols per window.

    Raises:
        UserError: The text is too short for one window.
    """
    starts = np.arange(0, n - length, length, dtype=np.int64)
    if not len(starts):
        raise UserError(
            f"a split of {n} characters holds no window of {length}: use a longer text or a "
            "smaller lm.n_positions"
        )
    return starts


def source_of(corpus: CharCorpus, spec: CorpusSpec) -> Source:
    """The text of a corpus for a tokenizer, one document per split.

    Args:
        corpus: The corpus.
        spec: Its specification; symbols of `latin-1` are bytes, which are read as UTF-8.
    """

    def text(split: str) -> str:
        decoded = corpus.decode(corpus.splits[split])
        if spec.encoding == "latin-1":
            return decoded.encode("latin-1").decode("utf-8", "replace")
        return decoded

    def parts() -> Iterator[tuple[str | None, Iterator[Piece]]]:
        for split in corpus.splits:
            yield split, cut_text(text(split))

    keep = ("symbols", "counts")
    origin = {k: v for k, v in corpus.provenance.items() if k not in keep}
    return Source({"corpus": corpus.key, "encoding": spec.encoding}, origin, parts)


def load_corpus(
    spec: CorpusSpec,
    *,
    cache: Path,
    offline: bool = False,
    say: Callable[[str], None] = print,
    _network: fetch.Network = fetch.NETWORK,
) -> CharCorpus:
    """Find a corpus and encode it.

    The text is searched for in this order: `spec.file`, the folder SAE_DATA_DIR, the cache, the
    network; the last resort is a stand-in.

    Args:
        spec: The corpus.
        cache: Folder of the cache.
        offline: Download nothing.
        say: Prints a line.

    Raises:
        UserError: A file is missing, too short or fails its checksum; or the text cannot be
            obtained and `spec.stand_in` is `never`.
    """
    remedy = standin.remedy(spec.name, (spec.local_names or [spec.name])[0], spec.facts, spec.head)

    def stand_in(reason: str) -> Text:
        asked = spec.head or spec.bytes or standin.LIMIT
        path = standin.stand_in(
            cache, spec.name, spec.stand_in_alphabet, asked, reason=reason, remedy=remedy, say=say
        )
        return Text(path, "stand-in", "stand-in", False)

    if spec.stand_in == "always":
        return _encoded(spec, stand_in("stand_in=always"), cache)
    if (text := _local(spec)) is not None:
        return _encoded(spec, text, cache)
    if (corpus := _remembered(spec, cache)) is not None:
        return corpus
    if spec.file is not None:
        raise UserError(f"data.{spec.name}.file={spec.file} is not a file")
    try:
        path, url = fetch.cached_text(
            cache,
            spec.name,
            spec.sources,
            spec.facts,
            network=None if offline else _network,
            say=say,
        )
        text = Text(path, url, "corpus", True)
    except fetch.UnreachableError as reason:
        if spec.stand_in == "never":
            raise UserError(
                f"data.{spec.name}.stand_in=never, and the text cannot be had ({reason}): {remedy}"
            ) from None
        text = stand_in(str(reason))
    except fetch.BrokenError as fault:
        raise UserError(f"data.{spec.name}: {fault}. Without the network: {remedy}") from None
    return _encoded(spec, text, cache)


def _local(spec: CorpusSpec) -> Text | None:
    """The file that the user names or keeps in SAE_DATA_DIR, if there is one.

    Raises:
        UserError: A file is not what it should be; it is never passed over.
    """
    if spec.file is not None:
        path = Path(spec.file).expanduser()
        return Text(path, path.name, "file", False) if path.is_file() else None
    if not (setting := os.environ.get("SAE_DATA_DIR")):
        return None
    folder = Path(setting).expanduser()
    if not folder.is_dir():
        raise UserError(f"SAE_DATA_DIR={setting} is not a folder; correct it or unset it")
    for path in (folder / name for name in spec.local_names):
        if path.is_file():
            _check(spec, path, **spec.facts)
            return Text(path, path.name, "corpus", bool(spec.sha256 or spec.md5))
    return None if spec.head is None else _local_head(spec, spec.head, folder)


def _local_head(spec: CorpusSpec, head: int, folder: Path) -> Text | None:
    """The smallest file `<name>-head-<n>` in a folder that holds the first `head` bytes."""
    sizes = []
    for stem in {spec.name, *spec.local_names}:
        for path in folder.glob(f"{escape(stem)}-head-*"):
            size = path.name.rpartition("-")[2]
            if size.isdecimal() and int(size) >= head:
                sizes.append((int(size), path))
    if not sizes:
        return None
    size, path = min(sizes)
    _check(spec, path, size=size, sha256=spec.head_sha256.get(head), head=head)
    return Text(path, path.name, "corpus", head in spec.head_sha256)


def _check(spec: CorpusSpec, path: Path, **facts: Any) -> None:
    """Raise `UserError` for a file with another size or checksum."""
    try:
        fetch.verify(path, str(path), **facts)
    except fetch.BrokenError as error:
        raise UserError(
            f"data.{spec.name}: {error}; replace it, or use it as it is with "
            f"data.{spec.name}.file={path}"
        ) from None


def _encoded(spec: CorpusSpec, text: Text, cache: Path) -> CharCorpus:
    """Encode a text, unless these very bytes were encoded before, and note its source."""
    whole = text.path.stat().st_size
    stand_in = text.kind == "stand-in"
    size = whole if stand_in or spec.head is None else spec.head
    if whole == 0:
        raise UserError(f"data.{spec.name}: {text.path} is empty")
    if size > whole:
        raise UserError(
            f"data.{spec.name}.head={size} is more than the {whole:,} bytes of {text.path}; ask "
            "for fewer, or null for the whole text"
        )
    sha256 = fetch.checksum(text.path, head=None if size == whole else size)
    cut = stand_in or spec.head is not None
    folder = cached(
        cache,
        "corpora",
        _key(spec, sha256, cut),
        lambda f: _write(f, spec, text.path, size, sha256, cut),
    )
    known = sha256 == (spec.sha256 if spec.head is None else spec.head_sha256.get(spec.head))
    origin = {
        "corpus": _label(spec, text, sha256, known),
        "source": text.source,
        "sha256": sha256,
        "bytes": size,
        "stand_in": stand_in,
        "verified": text.verified or known,
    }
    if not stand_in:
        pointer = _pointer(spec, cache)
        with clearing(pointer.parent):
            write_json(pointer, origin)
    return _open(spec, folder, origin)


def _label(spec: CorpusSpec, text: Text, sha256: str, known: bool) -> str:
    """Name of a text in the provenance; a user's own text never passes for the corpus."""
    own = text.kind == "file" and not known
    name = f"{spec.name}-file-{sha256[:8]}" if own else spec.name
    return name if spec.head is None else f"{name}-head-{spec.head}"


def _remembered(spec: CorpusSpec, cache: Path) -> CharCorpus | None:
    """The corpus as it was encoded when its text was last at hand; None if it never was.

    A text that has been removed since does not stop a run from going on.
    """

    def gone(folder: Path) -> None:
        raise LookupError("the encoded text was deleted or damaged, and its source is not at hand")

    if not _pointer(spec, cache).exists():
        return None
    origin = read_json(_pointer(spec, cache))
    key = _key(spec, origin["sha256"], spec.head is not None)
    try:
        return _open(spec, cached(cache, "corpora", key, gone), origin)
    except LookupError:
        return None


def _pointer(spec: CorpusSpec, cache: Path) -> Path:
    """File with the provenance of the text that a spec last led to."""
    file = None if spec.file is None else str(Path(spec.file).expanduser().absolute())
    fracs = [spec.val_frac, spec.test_frac]
    name = digest([spec.name, spec.head, file, spec.facts, spec.encoding, *fracs])
    return cache / "corpora" / "last" / f"{name}.json"


def _key(spec: CorpusSpec, sha256: str, cut: bool) -> dict[str, Any]:
    """Cache key of an encoded text, wherever it came from."""
    code = source_digest(files, errors, cache, alone=[__name__, Piece.__module__])
    return {
        "code": code,
        "text": sha256,
        "cut": cut,
        "encoding": spec.encoding,
        "val_frac": spec.val_frac,
        "test_frac": spec.test_frac,
    }


def _open(spec: CorpusSpec, folder: Path, origin: dict[str, Any]) -> CharCorpus:
    """The encoded corpus in a folder of the cache."""
    meta = read_json(folder / "meta.json")
    ids = np.memmap(folder / "ids.bin", dtype=meta["dtype"], mode="r")
    splits: dict[str, np.ndarray] = {}
    at = 0
    for split, count in meta["counts"]:
        splits[split] = ids[at : at + count]
        at += count
    provenance = {**origin, "symbols": len(meta["symbols"]), "counts": dict(meta["counts"])}
    return CharCorpus(
        name=spec.name,
        splits=splits,
        symbols=[chr(p) for p in meta["symbols"]],
        provenance=provenance,
        key=digest(meta),
    )


def _write(folder: Path, spec: CorpusSpec, path: Path, size: int, sha256: str, cut: bool) -> None:
    """Write the ids of a text into `ids.bin`, one split after the other.

    Two passes in blocks: the first collects the symbols, the second writes their ids.
    """
    if spec.encoding == "utf-8" and (other := other_format(path)):
        raise UserError(
            f"data.{spec.name}: {path} is {other}, not a text in UTF-8; {_remedy(path, other)}"
        )
    seen = np.zeros(0x110000, dtype=bool)
    n = 0
    for points in _blocks(path, size, spec, cut, sha256):
        seen[points] = True
        n += len(points)
    symbols = np.flatnonzero(seen)
    counts = split_sizes(spec.name, spec.val_frac, spec.test_frac, n, "characters")
    if len(symbols) > 1 << 16:
        raise UserError(f"data.{spec.name}: {path} has {len(symbols):,} symbols, more than 65,536")
    table = np.zeros(len(seen), dtype=np.uint8 if len(symbols) <= 256 else np.uint16)
    table[symbols] = np.arange(len(symbols))
    written = hashlib.sha256()
    with open(folder / "ids.bin", "wb") as f:
        for points in _blocks(path, size, spec, cut, sha256):
            ids = table[points].tobytes()
            written.update(ids)
            f.write(ids)
    names = {"dtype": table.dtype.name, "symbols": symbols.tolist(), "counts": list(counts.items())}
    write_json(folder / "meta.json", {**names, "ids_sha256": written.hexdigest()})


def other_format(path: Path) -> str | None:
    """Recognise a file that is not UTF-8 text by its first bytes.

    Args:
        path: The file.

    Returns:
        `UTF-16`, `a gzip archive` and the like; None for a file that may be UTF-8 text.
    """
    with open(path, "rb") as f:
        head = f.read(1 << 16)
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return name
    # Without a mark: the high bytes of characters up to U+1FFF read as control characters.
    read = np.frombuffer(head, dtype=np.uint8)
    control = (read < 0x20) & ~np.isin(read, np.frombuffer(b"\t\n\r\f", dtype=np.uint8))
    often = [bool(control[i::4].mean() > 0.5) for i in range(4)] if len(head) >= 4 else []
    return next((name for name, pattern in CONTROLS.items() if often == pattern), None)


def _remedy(path: Path, form: str) -> str:
    """Advice about a file of another format."""
    if form.startswith("UTF"):
        return f"convert it: iconv -f {form} -t UTF-8 {path} > {path}.utf8"
    return "unpack it"


def _remedy_for_bytes(name: str, data: bytes) -> str:
    """Advice about bytes that are not UTF-8."""
    if 0 in data:  # no text holds a zero byte, whatever its encoding
        return "it holds zero bytes: name a file of text"
    return f"convert it, or make each byte a symbol with data.{name}.encoding=latin-1"


def _blocks(
    path: Path, size: int, spec: CorpusSpec, cut: bool, sha256: str
) -> Iterator[np.ndarray]:
    """Code points of the first `size` bytes, in blocks.

    A last character that is cut off in its middle is left out if the text is `cut`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = hashlib.sha256()
    left = size
    with open(path, "rb") as f:
        while left and (data := f.read(min(BLOCK, left))):
            pending, at = len(decoder.getstate()[0]), size - left
            left -= len(data)
            read.update(data)
            if spec.encoding == "latin-1":
                yield np.frombuffer(data, dtype=np.uint8)
                continue
            try:
                text = decoder.decode(data, final=not left and not cut)
            except UnicodeDecodeError as error:
                byte = at - pending + error.start
                raise UserError(
                    f"data.{spec.name}: {path} is not UTF-8 at byte {byte:,} ({error.reason}); "
                    f"{_remedy_for_bytes(spec.name, data)}"
                ) from None
            yield np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    if read.hexdigest() != sha256:
        raise UserError(f"data.{spec.name}: {path} changed while it was read; start again")
