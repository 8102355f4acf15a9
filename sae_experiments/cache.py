"""A content-addressed cache of folders that many processes may share."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sae_experiments.errors import UserError
from sae_experiments.files import UNWRITABLE, digest, remove_stale, sha256_file, write_json

DONE = "done.json"
SAY_AFTER_S = 2.0  # that another process is waited for


@contextmanager
def clearing(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that several processes write to, cleared of what killed writers left in it.

    Args:
        folder: the folder, made if it is not there; folders inside it are left alone.

    Raises:
        UserError: the folder cannot be written.
    """
    with locked(folder / ".lock"):
        for path in folder.glob(".*.tmp"):
            if (
                path.suffixes[-2:-1] and path.suffixes[-2][1:].isdecimal()
            ):  # as write_bytes names them
                path.unlink(missing_ok=True)
        yield


@contextmanager
def locked(path: Path, *, wait_s: float = -1, held: str = "") -> Any:
    """Hold the lock file ``path``; after ``wait_s`` seconds (-1: forever) raise :class:`UserError` with ``held``."""
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
            f"{path.parent} cannot be written ({error.strerror}): choose a cache and a runs_root that can be"
        ) from error
    try:
        yield
    finally:
        lock.release()


def cached(
    root: Path, kind: str, key: Mapping[str, Any], make: Callable[[Path], bool | None]
) -> Path:
    """The folder ``root/kind/<digest of key>``, made by ``make(folder)`` unless a whole one is there.

    ``make`` may be killed and called again on the same folder: what it finds there is its own unfinished work (a checkpoint,
    say). The folder counts as whole once ``done.json``, which lists size and SHA-256 of every file, is in place; a file that
    no longer matches the list is noticed here and the folder is made anew. Processes that want the same key wait for each other.
    A ``make`` that returns False was cut short: its folder is returned as it is and continued by the next call.
    """
    name = digest(key)
    folder = root / kind / name
    with locked(root / kind / f"{name}.lock"):
        if (folder / DONE).exists():
            damaged = _damage(folder)
            if damaged is None:
                return folder
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
            return folder
        remove_stale(folder)
        files = {
            str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_file(p)}
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }
        write_json(folder / DONE, {"key": json.loads(json.dumps(key, default=str)), "files": files})
    return folder


@contextmanager
def _held(folder: Path) -> Iterator[Callable[[], bool]]:
    """Whether ``folder`` is still the one that was here on entry: it is held open, or its inode number could be given to the next folder of that name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield lambda: folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())
    finally:
        os.close(handle)


def discard(root: Path, kind: str, key: Mapping[str, Any]) -> None:
    """Remove a cache folder that nobody needs any more, while nobody is making or opening it."""
    name = digest(key)
    with locked(root / kind / f"{name}.lock"):
        shutil.rmtree(root / kind / name, ignore_errors=True)


def is_cached(root: Path, kind: str, key: Mapping[str, Any]) -> bool:
    """Whether :func:`cached` has this key whole."""
    folder = root / kind / digest(key)
    return (folder / DONE).exists() and _damage(folder) is None


def _raise_os_error(error: Exception, folder: Path) -> None:
    """Libraries written in Rust say "(os error 28)" in errors of their own: raise the ``OSError`` that it is."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found and not isinstance(error, OSError):
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from error


def _damage(folder: Path) -> str | None:
    """The first file of a finished cache folder that is missing or differs from what was written, or None."""
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
