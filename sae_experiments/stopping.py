"""How a process is asked to end: SIGINT, SIGTERM, the death of its parent, and a clock that has run out."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1  # of Linux' prctl
PATIENCE_S = 2.0  # how long a step of training may go on after a signal
GRACE_S = 8.0  # after a signal the process has ended, whatever it was doing: less than the 10 s that containers are given
NUMBERS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
AGAIN_S = 0.05  # before an exception that was lost is raised again


class Stopped(BaseException):
    """Somebody asked this process to end. Not an ``Exception``: nothing that handles errors may take it for one."""

    def __init__(self, number: int | None = None) -> None:
        number = _asked_number() if number is None else number
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


class OutOfTime(BaseException):
    """The time limit has passed."""


class _Request:
    """The signal that a process listens for, what has become of it, and a thread that sees to it that it is obeyed."""

    def __init__(self, *, patient: bool) -> None:
        self.patient = patient
        self.number: int | None = None
        self.waits = False
        self.left = False
        self.last_words: list[Callable[[], None]] = []
        # A queue of this kind may be used in signal handlers and in __del__; starting a thread there may not.
        self._orders: queue.SimpleQueue[tuple[float, Callable[[], None]] | None] = (
            queue.SimpleQueue()
        )
        self._ears, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        for target in (self._listen, self._watch):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()
        self._wakes = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Call ``action`` from another thread unless this is over by then."""
        self._orders.put((time.monotonic() + seconds, action))

    def over(self) -> None:
        """Nothing more will be done about the signal."""
        signal.set_wakeup_fd(self._wakes)
        self._orders.put(None)
        os.close(self._mouth)

    def _listen(self) -> None:
        """Learn of signals as they come: :meth:`heard` has to wait for the main thread to return from what it called."""
        while got := os.read(self._ears, 1):
            number = got[0]
            if number in NUMBERS and not self.patient:
                self.after(GRACE_S, lambda number=number: self.give_up(number))
        os.close(self._ears)

    def _watch(self) -> None:
        due: list[tuple[float, Callable[[], None]]] = []
        while True:
            wait = min(at for at, _ in due) - time.monotonic() if due else None
            with suppress(queue.Empty):
                order = self._orders.get(timeout=None if wait is None else max(wait, 0.0))
                if order is None:
                    return
                due.append(order)
            now = time.monotonic()
            for at, action in [each for each in due if each[0] <= now]:
                due.remove((at, action))
                action()

    def heard(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: raise :class:`Stopped`, or leave that to the training loop for a while."""
        if self.number is not None:
            if number == self.number:  # said twice: at once
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return  # a sweep that Ctrl-C reached asks its jobs, which it reached as well, once more with SIGTERM
        self.number = number
        if self.waits:
            self.after(PATIENCE_S, self.overdue)
        else:
            self.leave()

    def leave(self) -> None:
        """Raise :class:`Stopped`; from here on the same signal ends the process at once, whatever it is doing."""
        self.left, number = True, _asked_number()
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    def overdue(self) -> None:
        """Raise :class:`Stopped` in the main thread, from another one, if it was not raised yet."""
        if not self.left:
            self.again()

    def again(self) -> None:
        """Raise :class:`Stopped` in the main thread, from another one."""
        main = ctypes.c_ulong(threading.main_thread().ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(Stopped))

    def give_up(self, number: int) -> None:
        """End the process from another thread: files are whole at every moment, and the same command goes on."""
        for words in self.last_words:
            with suppress(Exception):
                words()
        with suppress(Exception):
            print(f"error: {farewell(signal.Signals(number).name)}", file=sys.stderr, flush=True)
        os._exit(128 + number)


_requests: list[_Request] = []  # the innermost is the last


def farewell(name: str) -> str:
    """The last line of a process that was stopped by the signal of this name."""
    return f"stopped by {name}: the same command continues where this one ended"


def _asked_number() -> int:
    return next((r.number for r in reversed(_requests) if r.number is not None), signal.SIGTERM)


def _innermost() -> _Request | None:
    return _requests[-1] if _requests and _in_main_thread() else None


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def listening(*, patient: bool = False) -> Iterator[None]:
    """Within the context, the first SIGINT, SIGTERM or SIGHUP raises :class:`Stopped`; the same a second time ends the process at once.

    A training loop may take note of the signal in its own time (:func:`at_boundaries`). A process that has not left the context after
    ``GRACE_S`` is ended where it stands, unless it is ``patient``: it has children that it waits for.
    """
    if not _in_main_thread():
        yield
        return
    # nohup: what is ignored stays so
    before = {n: signal.getsignal(n) for n in NUMBERS if signal.getsignal(n) is not signal.SIG_IGN}
    request = _Request(patient=patient)
    _requests.append(request)
    try:
        with _never_lost(Stopped, lambda: request.after(AGAIN_S, request.again)):
            for number in before:
                signal.signal(number, request.heard)
            yield
    finally:
        request.over()
        _requests.remove(request)
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def wait_for_children() -> Iterator[None]:
    """Within the context a signal may take longer than ``GRACE_S``: other processes are asked to end, and waited for."""
    request = _innermost()
    if request is None:
        yield
        return
    before, request.patient = request.patient, True
    try:
        yield
    finally:
        request.patient = before


@contextmanager
def last_words(words: Callable[[], None]) -> Iterator[None]:
    """Within the context, ``words`` is called (in another thread) before a process is ended because it did not end by itself."""
    request = _innermost()
    if request is None:
        yield
        return
    request.last_words.append(words)
    try:
        yield
    finally:
        request.last_words.remove(words)


def asked() -> bool:
    """Whether a signal to end came, which waits to be obeyed."""
    request = _innermost()
    return request is not None and request.number is not None


def leave() -> None:
    """Raise :class:`Stopped` if a signal to end came."""
    request = _innermost()
    if request is not None and request.number is not None:
        request.leave()


@contextmanager
def at_boundaries() -> Iterator[None]:
    """Within the context a signal waits for the next :func:`leave`, ``PATIENCE_S`` at most.

    That is time to end a step and to write a checkpoint, if :func:`asked` says so.
    """
    request = _innermost()
    if request is None or request.waits:
        yield
        return
    request.waits = True
    try:
        yield
    finally:
        request.waits = False
    leave()


@contextmanager
def _never_lost(kind: type[BaseException], again: Callable[[], None]) -> Iterator[None]:
    """Within the context, an exception of this kind that fell where Python can only report it (in ``__del__``, say) leads to ``again``."""
    before = sys.unraisablehook

    def hook(lost: Any) -> None:
        if lost.exc_type is not None and issubclass(lost.exc_type, kind):
            again()
        else:
            before(lost)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


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
        with _never_lost(OutOfTime, lambda: signal.setitimer(signal.ITIMER_REAL, AGAIN_S, 0.5)):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def end_with_parent() -> None:
    """Have the system send SIGTERM to this process when its parent dies, so that a killed sweep leaves no job behind (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
