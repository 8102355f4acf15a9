"""Rate and end of a job."""

from __future__ import annotations

import pytest

from sae_experiments.console import speed_of
from sae_experiments.runner import pace
from sae_experiments.runner.pace import Pace
from sae_experiments.studies.base import Cell
from support.fake_runner import Fake, go

CELLS = [Cell("a", seed, ("a",)) for seed in range(6)]


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def localtime(self, seconds: float) -> float:
        return seconds

    def strftime(self, form: str, seconds: float) -> str:
        return f"{form}={seconds:.0f}"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace, "time", made)
    return made


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_cells_of_equal_length_end_when_the_first_of_them_said(clock, workers):
    job = Pace(len(CELLS), workers)
    assert job.left() is None and not str(job)
    ends = len(CELLS) / workers * 100
    for first in range(0, len(CELLS), workers):
        at_work = CELLS[first : first + workers]
        for cell in at_work:
            job.start(cell)
        clock.now += 100
        for cell in at_work:
            job.end(cell)
        assert clock.now + job.left() == pytest.approx(ends)
    assert job.left() == 0 and not str(job)


def test_rate_and_end_are_in_words(clock):
    job = Pace(4, 2)
    for cell in CELLS[:2]:
        job.start(cell)
    clock.now = 300
    job.end(CELLS[0])
    assert str(job) == "1 of 4 cells done, 5 min each; about 5 min left, until %H:%M=600"
    clock.now = 60 * 3600
    job.end(CELLS[1])
    assert "until %a %H:%M" in str(job)


@pytest.mark.parametrize(
    ("rate", "said"),
    [(5.23, "5.2 steps/s"), (1500, "1,500.0 steps/s"), (0.05, "20.0 s/step"), (0.4, "2.5 s/step")],
)
def test_a_low_rate_is_told_by_the_seconds_that_one_takes(rate, said):
    assert speed_of(rate, "step") == said
    assert speed_of(0.0, "step").endswith(" s/step")


def test_an_end_of_a_cell_counts_once(clock):
    job = Pace(2, 1)
    job.start(CELLS[0])
    clock.now = 10
    for _ in range(2):
        job.end(CELLS[0])
    assert job.left() == 10


def test_a_run_says_its_rate_after_every_cell_but_the_last(tmp_path, capsys):
    assert go(Fake(), tmp_path / "r") == "done"
    said = [line for line in capsys.readouterr().out.splitlines() if "cells done" in line]
    assert [line.split(",")[0].strip() for line in said] == [
        f"{n} of 4 cells done" for n in (1, 2, 3)
    ]
