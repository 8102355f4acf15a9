"""Messages between the owner of a run and its workers, over pipes that no one else writes to.

The one place where objects are pickled: nothing that comes from a file is ever unpickled.
"""

from __future__ import annotations

import pickle
from typing import Any, BinaryIO


def send(stream: BinaryIO, message: Any) -> None:
    """Write a message; do nothing if the reader is gone."""
    try:
        stream.write(pickle.dumps(message))
        stream.flush()
    except BrokenPipeError:
        return


def receive(stream: BinaryIO) -> Any:
    """Wait for a message.

    Raises:
        EOFError: The writer is gone.
    """
    try:
        return pickle.load(stream)
    except (OSError, pickle.UnpicklingError) as error:
        raise EOFError from error


def packed(value: Any) -> bytes:
    """A value as bytes for `unpacked`; empty if another process could not make it again."""
    try:
        content = pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return b""
    return b"" if b"__main__" in content else content


def unpacked(content: bytes) -> Any:
    """A copy of the value that was packed."""
    return pickle.loads(content)
