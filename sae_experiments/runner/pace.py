"""Rate and expected end of a command, estimated from the cells that have ended."""

from __future__ import annotations

import time

from sae_experiments.studies.base import Cell

SHORT = 90  # seconds; more are given in minutes
LONG = 20 * 3600  # seconds; an end further away is given with its day


class Pace:
    """Times of the cells of one command.

    Args:
        n_cells: Cells to run.
        workers: Maximum number of cells at work at once.
    """

    def __init__(self, n_cells: int, workers: int) -> None:
        self._n_cells = n_cells
        self._workers = workers
        self._began: dict[Cell, float] = {}
        self._took: list[float] = []

    def start(self, cell: Cell) -> None:
        """Note that a cell begins."""
        self._began[cell] = time.monotonic()

    def end(self, cell: Cell) -> None:
        """Note that a cell has ended, however it ended."""
        if cell in self._began:
            self._took.append(time.monotonic() - self._began.pop(cell))

    def left(self) -> float | None:
        """Estimated seconds until all cells have ended; None before the first has ended."""
        if not self._took:
            return None
        each = sum(self._took) / len(self._took)
        now = time.monotonic()
        waiting = self._n_cells - len(self._took) - len(self._began)
        at_work = sum(max(each - (now - began), 0.0) for began in self._began.values())
        return (waiting * each + at_work) / self._workers

    def __str__(self) -> str:
        """Rate and end in a few words; "" before the first cell has ended and after the last."""
        left, done = self.left(), len(self._took)
        if left is None or done >= self._n_cells:
            return ""
        each = _duration(sum(self._took) / done)
        clock = time.strftime(
            "%a %H:%M" if left > LONG else "%H:%M", time.localtime(time.time() + left)
        )
        return (
            f"{done} of {self._n_cells} cells done, {each} each; "
            f"about {_duration(left)} left, until {clock}"
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < SHORT else f"{seconds / 60:.0f} min"
