"""Documents from text files (plain, JSON lines, parquet; a folder or a glob) and from data sets.

Documents come in pieces of bounded size, so that memory does not grow with the text.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from sae_experiments.errors import UserError, first_line
from sae_experiments.files import digest, sha256_file

#: Largest number of characters of a piece.
PIECE = 1 << 17
#: Bytes read from a file at a time.
BLOCK = 1 << 20
PLAIN = (".txt", ".md", ".text")
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
KINDS = (*PLAIN, *LINES, *PARQUET)


class Piece(NamedTuple):
    """A part of a document."""

    text: str
    last: bool
    """True for the last part of its document."""


class Source(NamedTuple):
    """A text that can be read."""

    key: Mapping[str, Any]
    """Cache key: everything that determines its documents."""
    origin: Mapping[str, Any]
    """Its entry in the manifest: `corpus`, `source`, ..."""
    parts: Callable[[], Iterator[tuple[str | None, Iterator[Piece]]]]
    """Gives the documents of each split; the name None stands for all of a text without splits."""


def check_fractions(name: str, val_frac: float, test_frac: float) -> None:
    """Raise `UserError` unless these fractions of a text leave something for training."""
    if not (val_frac > 0 and test_frac >= 0 and val_frac + test_frac < 1):
        raise UserError(
            f"data.{name}: val_frac={val_frac} must be above 0, test_frac={test_frac} at least 0, "
            "their sum below 1"
        )


def split_sizes(name: str, val_frac: float, test_frac: float, n: int, unit: str) -> dict[str, int]:
    """Sizes of the splits of a text, in order; there is no test split if `test_frac` is 0.

    Args:
        name: Name of the text.
        val_frac: Fraction for validation.
        test_frac: Fraction for testing.
        n: Size of the text.
        unit: What is counted, for the message.

    Raises:
        UserError: A split would have fewer than two units.
    """
    # Fractions are exact: n * (1 - .05 - .05) in floating point is one short of 90 %.
    val, test = Fraction(str(val_frac)), Fraction(str(test_frac))
    sizes = {"train": int(n * (1 - val - test)), "val": 0, "test": int(n * test)}
    sizes["val"] = n - sizes["train"] - sizes["test"]
    if test_frac == 0:
        del sizes["test"]
    if min(sizes.values()) < 2:
        raise UserError(
            f"data.{name}: {n:,} {unit} are too few to split: {sizes} must have at least 2 each"
        )
    return sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSpec:
    """Rules by which documents become windows, splits and cells."""

    name: str
    """Name of the text in configuration and results."""
    column: str
    """Field of a record, or column of a table, that holds the text."""
    across: bool
    """True if windows may cross document boundaries."""
    separator: str
    """Text between documents, if `across`."""
    val_frac: float
    """Fraction of the tokens for validation, after the training part."""
    test_frac: float
    """Fraction of the tokens for testing, after the validation part."""
    seeds: list[int]
    """Seeds of the cells."""
    recipe: dict[str, Any]
    """Training settings of a model that is trained on the text; see `lm.train`."""

    def __post_init__(self) -> None:
        check_fractions(self.name, self.val_frac, self.test_frac)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec(SplitSpec):
    """A text that the user supplies."""

    file: str | None
    """A file, a folder, or a glob such as `books/*.txt`."""
    document_end: str | None
    """Text that ends a document inside a plain text file; None: a file is one document."""

    def source(self) -> Source:
        """Find the files.

        Raises:
            UserError: There are no files, or one is of an unknown kind.
        """
        files = self._files()
        digests = [sha256_file(path) for path in files]
        how = {"column": self.column, "document_end": self.document_end}
        name = digest([digests, how])[:8]
        origin = {
            "corpus": f"{self.name}-file-{name}",
            "source": files[0].name if len(files) == 1 else f"{len(files)} files",
            "sha256": digests[0] if len(files) == 1 else digest(digests),
            "bytes": sum(path.stat().st_size for path in files),
            "stand_in": False,
            "verified": False,
        }

        def parts() -> Iterator[tuple[str | None, Iterator[Piece]]]:
            yield None, (piece for path in files for piece in self._read(path))

        return Source({"files": digests, **how}, origin, parts)

    def _files(self) -> list[Path]:
        where = f"data.{self.name}.file={self.file}"
        if not self.file:
            raise UserError(f"{where} names no text: give a file, a folder or a glob")
        path = Path(self.file).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
        elif path.is_file():
            files = [path]
        else:
            files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            files = [p for p in files if p.is_file()]
        if not files:
            raise UserError(f"{where} names no text file ({', '.join(KINDS)})")
        # A file that was named itself, such as enwik8, is plain text without saying so.
        unknown = next((p for p in files if not _kind(p) and "." in p.name), None)
        if unknown is not None:
            raise UserError(
                f"data.{self.name}.file: {unknown} is of no known kind: {', '.join(KINDS)}"
            )
        return files

    def _read(self, path: Path) -> Iterator[Piece]:
        where = f"data.{self.name}: {path}"
        if _kind(path) in PARQUET:
            return _parquet(path, self.column, where)
        if _kind(path) in LINES:
            return _records(path, self.column, where)
        return _plain(path, self.document_end, where)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSpec(SplitSpec):
    """A data set of the Hugging Face hub, or a folder that `datasets` saved."""

    path: str | None
    """Name of the data set."""
    subset: str | None
    """Its configuration, if it has several."""
    split: str
    """Its split."""
    revision: str | None
    """Commit or tag; None for the newest, which is not reproducible."""
    documents: int | None
    """Number of documents, from the first; None for all."""

    def source(self) -> Source:
        """Open the data set; documents are fetched as they are read.

        Raises:
            UserError: It cannot be loaded.
        """
        where = f"data.{self.name}.path={self.path}"
        if not self.path:
            raise UserError(f"{where} names no data set: give its name on the hub")
        datasets = _optional("datasets", where, "datasets")
        offline = os.environ.get("SAE_HUB_OFFLINE", "0") not in ("0", "")
        key = {
            name: getattr(self, name)
            for name in ("path", "subset", "split", "revision", "documents", "column")
        }

        def rows() -> Iterator[Piece]:
            try:
                if offline and not Path(str(self.path)).exists():
                    raise OSError("HF_HUB_OFFLINE is set")
                table = datasets.load_dataset(
                    self.path,
                    self.subset,
                    split=self.split,
                    revision=self.revision,
                    streaming=True,
                )
                for i, row in enumerate(table):
                    if self.documents is not None and i >= self.documents:
                        return
                    yield from _document(row, self.column, f"{where}: document {i}")
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"{where} cannot be read ({first_line(error)[:200]})") from error

        def parts() -> Iterator[tuple[str | None, Iterator[Piece]]]:
            yield None, rows()

        origin = {
            "corpus": f"{self.name}-{digest(key)[:8]}",
            "source": f"{self.path}@{self.revision or 'newest'}",
            "stand_in": False,
            "verified": False,
        }
        return Source(key, origin, parts)


def cut_text(text: str) -> Iterator[Piece]:
    """Cut a document into pieces before white space, so that no word is split."""
    begin = 0
    while len(text) - begin > PIECE:
        end = _place_to_cut(text, begin)
        yield Piece(text[begin:end], False)
        begin = end
    yield Piece(text[begin:], True)


def _place_to_cut(text: str, begin: int = 0) -> int:
    for mark in ("\n", " "):
        end = text.rfind(mark, begin + 1, begin + PIECE)
        if end > 0:
            return end
    return begin + PIECE


def _kind(path: Path) -> str | None:
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)


def _plain(path: Path, document_end: str | None, where: str) -> Iterator[Piece]:
    rest = ""
    for block in _decoded(path, where):
        rest += block
        if document_end:
            *whole, rest = rest.split(document_end)
            for text in whole:
                yield from cut_text(text)
        margin = PIECE + len(document_end or "")
        while len(rest) > margin:
            end = _place_to_cut(rest)
            yield Piece(rest[:end], False)
            rest = rest[end:]
    yield Piece(rest, True)


def _decoded(path: Path, where: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8", newline="") as f:
            while block := f.read(BLOCK):
                yield block
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 ({error.reason}): convert it, or unpack it"
        ) from error


def _records(path: Path, column: str, where: str) -> Iterator[Piece]:
    try:
        for i, line in enumerate(_lines(path, where), 1):
            if line.strip():
                yield from _document(json.loads(line), column, f"{where} line {i}")
    except UserError:
        raise
    except (ValueError, OSError, EOFError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON lines in UTF-8 ({first_line(error)[:200]})"
        ) from error


def _lines(path: Path, where: str) -> Iterable[bytes]:
    kind = _kind(path)
    if kind == ".jsonl.gz":
        return gzip.open(path, "rb")
    if kind == ".jsonl.zst":
        pyarrow = _optional("pyarrow", where, "text")
        # The stream of pyarrow has no lines of its own.
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return open(path, "rb")


def _parquet(path: Path, column: str, where: str) -> Iterator[Piece]:
    pyarrow = _optional("pyarrow", where, "text")
    parquet = import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise UserError(f"{where} has no column {column!r}: it has {', '.join(names)}")
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for i, text in enumerate(batch.column(0).to_pylist()):
                    yield from _document({column: text}, column, f"{where} row {i}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{where} is not a whole parquet file ({first_line(error)[:200]})"
        ) from error


def _document(record: Any, column: str, where: str) -> Iterator[Piece]:
    text = record.get(column) if isinstance(record, Mapping) else None
    if not isinstance(text, str):
        raise UserError(f"{where} has no text under {column!r}: set data.<name>.column")
    return cut_text(text)


def _optional(module: str, where: str, extra: str) -> Any:
    """A module of an optional extra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"{where} needs {module}: pip install 'sae-experiments[{extra}]'"
        ) from error
