"""A content-addressed cache of folders that many processes may share."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from sae_experiments.errors import UserError
from sae_experiments.files import UNWRITABLE, digest, remove_stale, sha256_file, write_json

DONE = "done.json"
SAY_AFTER_S = 2.0  # that another process is waited for


@contextmanager
def clearing(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that several processes write to, and remove unfinished files.

    Args:
        folder: The folder, made if it does not exist; folders inside it are left alone.

    Raises:
        UserError: The folder cannot be written.
    """
    with locked(folder / ".lock"):
        for path in folder.glob(".*.tmp"):
            thread = path.suffixes[-2:-1]  # `write_bytes` puts its number here
            if thread and thread[0][1:].isdecimal():
                path.unlink(missing_ok=True)
        yield


@contextmanager
def locked(path: Path, *, wait_s: float = -1, held: str = "") -> Any:
    """Hold a lock file.

    Args:
        path: The lock file.
        wait_s: Seconds to wait for another process; -1: forever.
        held: Message if another process holds it for longer.

    Raises:
        UserError: Another process holds the lock, or the folder cannot be written.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=SAY_AFTER_S if wait_s < 0 else wait_s)
        except Timeout:
            if wait_s >= 0:
                raise
            print(
                f"waiting for another process that makes {path.parent.name}/{path.stem}", flush=True
            )
            lock.acquire()
    except Timeout as error:
        raise UserError(held or f"{path} is held by another process") from error
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(
            f"{path.parent} cannot be written ({error.strerror}): "
            "choose a cache and a runs_root that can be"
        ) from error
    try:
        yield
    finally:
        lock.release()


class Entry(NamedTuple):
    """A folder of the cache."""

    folder: Path
    was_there: bool
    """False if it was made now, or continued."""


def cached(
    root: Path, kind: str, key: Mapping[str, Any], make: Callable[[Path], bool | None]
) -> Path:
    """The folder of `entry`, for callers that need not know whether it was made now."""
    return entry(root, kind, key, make).folder


def entry(
    root: Path, kind: str, key: Mapping[str, Any], make: Callable[[Path], bool | None]
) -> Entry:
    """The folder `root/kind/<digest of key>`, made unless a complete one exists.

    The folder counts as whole once it has `done.json`, which lists size and SHA-256 of every file.
    A folder with a file that differs from the list is made anew. Processes that want the same key
    wait for each other.

    Args:
        root: Folder of the cache.
        kind: Folder of such entries below it.
        key: Everything that determines the content, JSON-like.
        make: Fills the folder. If it is killed, the next call gets the same folder with the
            unfinished work, for example a checkpoint. If it returns False it was cut short: the
            folder is returned as it is, and the next call continues it.

    Raises:
        UserError: The folder was removed in the meantime, or the cache cannot be written.
    """
    name = digest(key)
    folder = root / kind / name
    with locked(root / kind / f"{name}.lock"):
        if (folder / DONE).exists():
            damaged = _damage(folder)
            if damaged is None:
                return Entry(folder, was_there=True)
            print(
                f"cache: {kind}/{name}/{damaged} is damaged: making {kind}/{name} again", flush=True
            )
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with _held(folder) as stays:
            try:
                whole = make(folder)
            except Exception as error:
                _raise_os_error(error, folder)
                raise
            if not stays():  # whatever lies there now is not all that was made
                shutil.rmtree(folder, ignore_errors=True)
                raise UserError(
                    f"{folder} was removed while it was being made: type the same command again"
                )
        if whole is False:
            return Entry(folder, was_there=False)
        remove_stale(folder)
        files = {
            str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_file(p)}
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }
        write_json(folder / DONE, {"key": json.loads(json.dumps(key, default=str)), "files": files})
    return Entry(folder, was_there=False)


@contextmanager
def _held(folder: Path) -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether `folder` is still the one that was here on entry.

    The folder is held open, as its inode number could go to the next folder of that name.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield lambda: folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())
    finally:
        os.close(handle)


def discard(root: Path, kind: str, key: Mapping[str, Any]) -> None:
    """Remove a cache folder that is no longer needed; its lock keeps other processes out."""
    name = digest(key)
    with locked(root / kind / f"{name}.lock"):
        shutil.rmtree(root / kind / name, ignore_errors=True)


def is_cached(root: Path, kind: str, key: Mapping[str, Any]) -> bool:
    """True if the cache holds a complete entry for a key."""
    folder = root / kind / digest(key)
    return (folder / DONE).exists() and _damage(folder) is None


def _raise_os_error(error: Exception, folder: Path) -> None:
    """Raise the `OSError` behind "(os error 28)", as libraries in Rust write in their errors."""
    match = re.search(r"\(os error (\d+)\)", str(error))
    if match and not isinstance(error, OSError):
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(folder)) from error


def _damage(folder: Path) -> str | None:
    """The first file of a finished folder that is missing or changed; None if all are whole."""
    try:
        listed = json.loads((folder / DONE).read_bytes())["files"]
    except (ValueError, KeyError, TypeError):
        return DONE
    for name, was in listed.items():
        path = folder / name
        if (
            not path.is_file()
            or path.stat().st_size != was["bytes"]
            or sha256_file(path) != was["sha256"]
        ):
            return name
    return None
