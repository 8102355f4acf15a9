"""Progress of several cells at once: live lines on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from tqdm import tqdm

from sae_experiments.console import EVERY_S, Console, speed_of


@dataclass
class _Line:
    """One cell at work."""

    name: str
    """Name of the cell."""
    stage: str = "starting"
    """Name of its current stage."""
    unit: str = "step"
    """Unit in which the stage counts."""
    done: int = 0
    """Units done."""
    total: int = 0
    """Units in all; 0: the stage does not count."""
    first: int = 0
    """Units that were done when the stage began, after a resume."""
    began: float = 0.0
    """Time at which the stage began."""
    bar: tqdm | None = None
    """Its line on the terminal."""

    def text(self) -> str:
        """Stage, progress and rate."""
        if not self.total:
            return f"{self.name}: {self.stage}"
        rate = (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)
        so_far = f"{self.done:,}/{self.total:,} {self.unit}s"
        return f"{self.name}: {self.stage} {so_far}, {speed_of(rate, self.unit)}"


class Board:
    """Shows cells at work.

    Args:
        console: Output for the lines.
        n_cells: Cells still to run.
        n_workers: Maximum number of cells at work at once.
    """

    def __init__(self, console: Console, n_cells: int, n_workers: int) -> None:
        self._console = console
        self._lines: dict[int, _Line] = {}
        self._n_cells = n_cells
        self._n_workers = n_workers
        self._told = time.monotonic()
        self._job: tqdm | None = None

    def start(self, worker: int, name: str) -> None:
        """A worker begins a cell."""
        self._lines[worker] = _Line(name)
        if self._console.terminal and not self._console.quiet and self._job is None:
            self._job = tqdm(
                total=self._n_cells,
                desc="  all cells",
                unit="cell",
                file=sys.stdout,
                leave=False,
                dynamic_ncols=True,
                position=self._n_workers,
            )

    def stage(self, worker: int, stage: str, unit: str, done: int, total: int) -> None:
        """A cell at work has come this far."""
        line = self._lines[worker]
        if line.stage != stage:
            line.stage = stage
            line.unit = unit
            line.first = done - 1
            line.began = time.monotonic()
            self._clear(line)
        line.done = done
        line.total = total
        if self._console.quiet:
            return
        if self._console.terminal:
            self._draw(worker, line)
        else:
            self.tell()

    def end(self, worker: int) -> None:
        """A worker has ended its cell."""
        self._clear(self._lines.pop(worker))
        if self._job is not None:
            self._job.update(1)

    def tell(self) -> None:
        """Without a terminal: one line for all cells, at most every 15 s."""
        quiet = self._console.quiet or self._console.terminal
        if quiet or time.monotonic() - self._told < EVERY_S:
            return
        self._told = time.monotonic()
        self._console.say("  " + "; ".join(self._lines[w].text() for w in sorted(self._lines)))

    def close(self) -> None:
        """Remove every line from the terminal."""
        for line in self._lines.values():
            self._clear(line)
        if self._job is not None:
            self._job.close()

    def _draw(self, worker: int, line: _Line) -> None:
        if line.bar is None:
            line.bar = tqdm(
                total=line.total,
                initial=line.done,
                desc=f"  {line.name}: {line.stage}",
                unit=line.unit,
                file=sys.stdout,
                leave=False,
                dynamic_ncols=True,
                mininterval=0.2,
                position=worker,
            )
        line.bar.update(line.done - line.bar.n)

    @staticmethod
    def _clear(line: _Line) -> None:
        if line.bar is not None:
            line.bar.close()
            line.bar = None
