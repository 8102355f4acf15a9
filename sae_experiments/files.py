"""Atomic file writes, JSON with a checksum, and digests of values and files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sae_experiments.errors import UserError

PACKAGE = Path(__file__).resolve().parent
SEAL = "checksum"
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
MOST_BYTES = 1 << 28  # largest JSON file read: results hold numbers and short texts


def conf_folder() -> Path:
    """Folder of the YAML files: inside an installed package, beside it in a checkout."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parent / "conf"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: readers see the old or the new version, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def remove_stale(folder: Path) -> None:
    """Remove half-written files below `folder`, whose lock the caller holds."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


class NewFolder:
    """A folder, created with its parents, whose creation can be undone.

    Args:
        folder: The folder, made unless it exists.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.missing = [path for path in (folder, *folder.parents) if not path.exists()]
        self.is_new = bool(self.missing) or not any(folder.iterdir())
        folder.mkdir(parents=True, exist_ok=True)

    def take_back(self) -> None:
        """Remove the folder and its content, if it was missing or empty before.

        The caller makes sure that no other process uses the folder.
        """
        if not self.is_new:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.missing[1:]:
            with suppress(OSError):  # others have made something in it
                path.rmdir()
        if not self.missing:
            self.folder.mkdir(exist_ok=True)


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Write JSON; NaN and infinity, which JSON lacks, raise `ValueError`."""
    text = json.dumps(value, indent=1, sort_keys=sort_keys, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def read_json(path: Path) -> Any:
    """Read JSON, or raise `UserError` if the file is damaged or not a regular file."""
    check_readable(path)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); delete it to have it made again"
        ) from error


def check_readable(path: Path, most: int = MOST_BYTES) -> None:
    """Raise `UserError` for a device or a pipe, which might never end, and for large files.

    Args:
        path: The file.
        most: Largest size in bytes.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file")
    if status.st_size > most:
        raise UserError(
            f"{path} has {status.st_size:,} bytes, more than the {most:,} that such a file may have"
        )


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON mapping with a checksum of its content inside."""
    write_json(path, {**value, SEAL: digest(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a file of `write_sealed`, or raise `UserError` if it holds anything else."""
    value = read_json(path)
    if not isinstance(value, dict) or SEAL not in value:
        raise UserError(f"{path} has no checksum inside; delete it to have it made again")
    if value.pop(SEAL) != digest(value):
        raise UserError(
            f"{path} is not what was written (its checksum differs); "
            "delete it to have it made again"
        )
    return value


def digest(value: Any) -> str:
    """Sixteen hex digits that name a JSON-like value (key order does not matter)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256_file(path: Path, block: int = 1 << 20) -> str:
    """SHA-256 of a file as 64 hex digits, read in blocks."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as f:
        while data := f.read(block):
            sha256.update(data)
    return sha256.hexdigest()


def rounded(value: float, digits: int) -> float:
    """Round a number to this many significant digits, which keeps files short."""
    return float(f"{value:.{digits}g}")
