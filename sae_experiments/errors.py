"""Errors that are shown to the user as one line without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend, shown as one line without a traceback.

    `exit_status` 2 means that nothing was computed yet.
    """

    exit_status = 2


class NonFinite(UserError):
    """A loss term, gradient or activation became NaN or infinite."""

    exit_status = 1
