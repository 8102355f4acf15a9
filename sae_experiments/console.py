"""Messages of a run on stdout: progress bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

EVERY_S = 15.0  # between lines where there is no terminal
SHOWN = 48  # characters of a stage's name, so that a line with its rate fits 100 columns


def listed(names: Sequence[str]) -> str:
    """The names separated by commas, or their number if they do not fit on a line."""
    row = ", ".join(names)
    return row if len(row) <= SHOWN else f"{len(names)} SAEs"


def nobody_reads() -> int:
    """Print into the void from now on, after a `BrokenPipeError`; returns the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def took(what: str, seconds: float, *, from_cache: bool) -> str:
    """Format a duration, as in `fitted in 3 s`; for a cached result, that of the original work."""
    spent = f"{what} in {seconds:.0f} s"
    return f"from the cache, {spent} then" if from_cache else spent


def speed_of(rate: float, unit: str) -> str:
    """A rate in units per second, `5.2 steps/s`, or in seconds per unit if it is low."""
    return f"{rate:,.1f} {unit}s/s" if rate >= 0.95 else f"{1 / max(rate, 1e-9):,.1f} s/{unit}"


class Console:
    """Prints lines and progress on stdout; stderr is left to the cause of a failure.

    Args:
        verbosity: `quiet` prints only lines marked as `always`; `normal`; `verbose` adds details.
    """

    def __init__(self, *, verbosity: str = "normal") -> None:
        self.quiet, self.verbose = verbosity == "quiet", verbosity == "verbose"
        self.terminal = sys.stdout.isatty()

    def say(self, line: str, *, always: bool = False) -> None:
        """Print a line."""
        if always or not self.quiet:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def detail(self, line: str) -> None:
        """Print a line if `verbosity=verbose`."""
        if self.verbose:
            self.say(line)

    @contextmanager
    def stage(self, name: str, unit: str = "step") -> Iterator[Callable[[int, int], None]]:
        """Show the progress of a stage: a bar on a terminal, a line every 15 s elsewhere.

        Args:
            name: Name of the stage.
            unit: What is counted.

        Yields:
            `tick(done, total)`, to be called with the progress.
        """
        bar: tqdm | None = None
        start = told = time.monotonic()
        state = [0, 0, None]

        def tick(done: int, total: int) -> None:
            nonlocal bar, told
            first = state[2] is None
            if first:
                state[2] = done - 1
            state[0], state[1] = done, total
            if self.quiet:
                return
            if self.terminal:
                if bar is None:
                    bar = tqdm(
                        total=total,
                        initial=done,
                        desc=f"  {name}",
                        unit=unit,
                        file=sys.stdout,
                        leave=False,
                        dynamic_ncols=True,
                        mininterval=0.2,
                    )
                bar.update(done - bar.n)
            elif time.monotonic() - told > EVERY_S:
                told = time.monotonic()
                rate = (done - state[2]) / max(told - start, 1e-9)
                left = (total - done) / max(rate, 1e-9)
                speed = speed_of(rate, unit)
                self.say(f"  {name}: {done:,}/{total:,} {unit}s, {speed}, {left:,.0f} s left")

        try:
            yield tick
        finally:
            if bar is not None:
                bar.close()
