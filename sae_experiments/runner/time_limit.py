"""Division of a time limit between the cells and the steps that come after them."""

from __future__ import annotations

from typing import NamedTuple

#: Share of the limit, and seconds, that are kept at most for the report.
REPORT = (0.10, 20.0)
#: The same for the closing table and the end of the process.
CLOSING = (0.03, 2.0)


class TimeLimit(NamedTuple):
    """Times (`time.monotonic`) by which the parts of a run must have ended."""

    cells: float
    """Training, and metrics of all cells."""
    report: float
    """The report."""
    whole: float
    """The process."""

    @staticmethod
    def of(began: float, seconds: float | None, *, report: bool) -> TimeLimit | None:
        """Divide a limit.

        Args:
            began: Time at which the command began.
            seconds: The limit; None: no limit.
            report: Whether the run draws a report.
        """
        if seconds is None:
            return None
        whole = began + seconds
        drawn = whole - _kept(CLOSING, seconds)
        return TimeLimit(drawn - _kept(REPORT, seconds) * report, drawn, whole)


def _kept(of: tuple[float, float], seconds: float) -> float:
    share, most = of
    return min(share * seconds, most)
