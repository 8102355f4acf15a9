"""How a process is asked to end: SIGINT, SIGTERM, the death of its parent, and a clock that has run out."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PR_SET_PDEATHSIG = 1  # of Linux' prctl


class Stopped(BaseException):
    """Somebody asked this process to end. Not an ``Exception``: nothing that handles errors may take it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


class OutOfTime(BaseException):
    """The time limit has passed."""


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def listening() -> Iterator[None]:
    """Within the context, the first SIGINT, SIGTERM or SIGHUP raises :class:`Stopped`; a second one ends the process at once."""
    if not _in_main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}  # nohup: what is ignored stays so

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def limited(deadline: float | None, may_stop: Callable[[], bool]) -> Iterator[None]:
    """Within the context, :class:`OutOfTime` is raised once ``deadline`` (``time.monotonic``) has passed, or as soon after as ``may_stop()``.

    Where there is no interval timer (Windows, a thread that is not the main one), training still ends at its own deadline.
    """
    if deadline is None or not _in_main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        if may_stop():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-3), 0.5)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def end_with_parent() -> None:
    """Have the system send SIGTERM to this process when its parent dies, so that a killed sweep leaves no job behind (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
