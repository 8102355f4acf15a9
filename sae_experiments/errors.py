"""Errors, and how they are worded. Mistakes of users are shown as one line without a traceback."""

from __future__ import annotations

import re
from numbers import Integral
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake that the user can fix, shown as one line without a traceback.

    `exit_status` 2 means that nothing was computed yet.
    """

    exit_status = 2


class NonFinite(UserError):
    """A loss term, gradient or activation became NaN or infinite."""

    exit_status = 1


def first_line(error: BaseException | None) -> str:
    """The first non-empty line of an error, or of its cause if it has no text."""
    kind = ""
    while error is not None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if lines:
            return lines[0]
        kind = type(error).__name__
        error = error.__cause__ or error.__context__
    return kind


def with_kind(error: BaseException) -> str:
    """An error in one string, with the name of its class."""
    return f"{type(error).__name__}: {error}"


def of_type(value: object, kind: type[T]) -> T:
    """Narrow the type of a value that earlier checks have guaranteed, for type checkers.

    Raises:
        TypeError: The value has another type: a bug in the package, not a mistake of the user.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{kind.__name__} expected, not {type(value).__name__}")
    return value


def check_whole(**numbers: object) -> None:
    """Raise `UserError` for a value that is no whole number; NumPy's count as well."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise UserError(f"{name}={value!r} must be a whole number")


def is_out_of_memory(error: BaseException) -> bool:
    """True if Python, PyTorch or CUDA had no memory left."""
    words = r"allocate memory|out of memory"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(words, str(error)) is not None
    )
