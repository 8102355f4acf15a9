"""Requests to end a process: SIGINT, SIGTERM, the death of its parent, and a time limit."""

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
#: Seconds after a signal by which the process has ended, whatever it was doing. Containers have 10.
GRACE_S = 8.0
NUMBERS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
AGAIN_S = 0.05  # before an exception that was lost is raised again


class Stopped(BaseException):
    """This process was asked to end. Derived from BaseException to escape `except Exception`."""

    def __init__(self, number: int | None = None) -> None:
        number = _asked_number() if number is None else number
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


class OutOfTime(BaseException):
    """The time limit has passed."""


class _Request:
    """A signal to end, its state, and the threads that see to it that the process obeys."""

    def __init__(self, *, patient: bool) -> None:
        self.patient = patient
        self.number: int | None = None
        self.waits = False
        self.left = False
        self.last_words: list[Callable[[], None]] = []
        # A SimpleQueue may be used in signal handlers and in __del__; a thread may not be started.
        self._orders: queue.SimpleQueue[tuple[float, Callable[[], None]] | None] = (
            queue.SimpleQueue()
        )
        self._ears, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        for target in (self._listen, self._watch):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()
        self._wakes = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Call `action` from another thread, unless this request is over by then."""
        self._orders.put((time.monotonic() + seconds, action))

    def over(self) -> None:
        """End the request: do nothing more about the signal."""
        signal.set_wakeup_fd(self._wakes)
        self._orders.put(None)
        os.close(self._mouth)

    def _listen(self) -> None:
        """Notice signals at once: `heard` waits until the main thread returns to Python code."""
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
        """Handle a signal: raise `Stopped`, or leave that to the training loop for a while."""
        if self.number is not None:
            if number == self.number:  # the same signal twice: end at once
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            # Another signal changes nothing: after Ctrl-C, which reaches the jobs of a sweep as
            # well, the sweep sends them SIGTERM.
            return
        self.number = number
        if self.waits:
            self.after(PATIENCE_S, self.overdue)
        else:
            self.leave()

    def leave(self) -> None:
        """Raise `Stopped`. From here on the same signal ends the process at once."""
        self.left, number = True, _asked_number()
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    def overdue(self) -> None:
        """Raise `Stopped` in the main thread, if it has not been raised yet."""
        if not self.left:
            self.again()

    def again(self) -> None:
        """Raise `Stopped` in the main thread; called from another thread."""
        main = ctypes.c_ulong(threading.main_thread().ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(Stopped))

    def give_up(self, number: int) -> None:
        """End the process from another thread. Files are whole at every moment."""
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
    """Raise `Stopped` at the first SIGINT, SIGTERM or SIGHUP within the context.

    The same signal a second time ends the process at once. A training loop may obey at a moment of
    its own choice (`at_boundaries`). A process that has not left the context after `GRACE_S` is
    ended.

    Args:
        patient: The process has children that it waits for, and is not ended.
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
    """Allow more than `GRACE_S` within the context, to end other processes and wait for them."""
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
    """Within the context, have `words` called before the process is ended from another thread."""
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
    """True if a signal to end has come."""
    request = _innermost()
    return request is not None and request.number is not None


def leave() -> None:
    """Raise `Stopped` if a signal to end has come."""
    request = _innermost()
    if request is not None and request.number is not None:
        request.leave()


@contextmanager
def at_boundaries() -> Iterator[None]:
    """Within the context, let a signal wait for the next `leave`, at most `PATIENCE_S`.

    That is time to end a step and, if `asked()`, to write a checkpoint.
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
    """Call `again` for an exception that Python can only report, for example in `__del__`."""
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
    """Raise `OutOfTime` within the context once the deadline has passed.

    Limits may be nested. Without an interval timer (Windows, other threads), training still ends
    at its own deadline.

    Args:
        deadline: Deadline by `time.monotonic`; None: no limit.
        may_stop: Whether the exception may be raised now; if not, it is tried again.
    """
    if deadline is None or not _in_main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    raised = False

    def over(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if may_stop():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raised = True
            raise OutOfTime

    def raise_again() -> None:
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S, 0.5)

    before = signal.signal(signal.SIGALRM, over)
    began = time.monotonic()
    outer, again = signal.setitimer(signal.ITIMER_REAL, max(deadline - began, 1e-3), 0.5)
    try:
        with _never_lost(OutOfTime, raise_again):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        left = outer - (time.monotonic() - began)
        # The limit around this one goes on; if both have passed, one exception is enough.
        if outer and (left > 0 or not raised):
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), again)


def process_age() -> float:
    """Seconds since this process began; 0 where the system does not say (outside Linux)."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        ticks = int(fields[19])  # field 22 of proc(5), counted after the name in parentheses
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return max(age, 0.0)


def end_with_parent(parent: int) -> None:
    """Have SIGTERM sent to this process when its parent dies (Linux only), or now if it has died.

    A sweep that is killed then leaves no job behind.

    Args:
        parent: Process number of the parent. Another one has taken over if it died while this
            process was starting, and the system would send no signal any more.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            signal.raise_signal(signal.SIGTERM)
