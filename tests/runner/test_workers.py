"""Cells side by side: the same bits, and nothing lost or left behind whatever ends a worker."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_experiments.errors import UserError
from sae_experiments.results.records import read_curves, read_records
from sae_experiments.runner import pool
from sae_experiments.runner.run import RunFailed, WorkerError, breadth_first, run
from sae_experiments.runner.track import NoTracker
from sae_experiments.studies.base import Cell
from support.fake_runner import final, manifest, settings
from support.fake_study import FakeStudy

CPU = torch.device("cpu")
#: A run of four cells in two workers, as a process that can be killed.
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support.fake_study import FakeStudy
from support.fake_runner import settings
from sae_experiments.runner.run import run
from sae_experiments.runner.track import NoTracker
from sae_experiments.stopping import listening
if __name__ == "__main__":
    with listening():
        run(
            FakeStudy(seconds=float(sys.argv[3])),
            settings(Path(sys.argv[2]), workers=2, threads=1),
            NoTracker(),
        )
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "r"


def go(study: FakeStudy, folder: Path, **changes: Any) -> str:
    return run(study, settings(folder, **({"threads": 1} | changes)), NoTracker())


def losses(folder: Path) -> dict[tuple[str, int], Any]:
    return {(r.dataset, r.seed): r.metrics["loss"] for r in read_records(folder)}


def workers_of(folder: Path) -> list[int]:
    """Process numbers of workers that have this run folder in their environment's command."""
    out = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    rows = [line.split(maxsplit=1) for line in out.splitlines()[1:]]
    return [
        int(pid)
        for pid, args in rows
        if "runner.worker" in args and _reads(int(pid), folder.parent.parent)
    ]


def _reads(pid: int, folder: Path) -> bool:
    try:
        return str(folder) in Path(f"/proc/{pid}/environ").read_text()
    except OSError:
        return False


# ---------------------------------------------------------------------------- the same results


def test_results_do_not_depend_on_the_number_of_workers(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert go(FakeStudy(), one, workers=1) == "done"
    assert go(FakeStudy(), two, workers=2) == "done"
    assert final(one) == final(two)
    assert {r.facts["threads"] for r in [*read_records(one), *read_records(two)]} == {1}
    processes = {r.facts["pid"] for r in read_records(two)}
    assert len(processes) == 2 and os.getpid() not in processes
    for dataset, seed in losses(two):
        assert read_curves(two, dataset, seed) == read_curves(one, dataset, seed)
    assert (manifest(one)["workers"], manifest(two)["workers"]) == (1, 2)
    assert (manifest(one)["threads"], manifest(two)["threads"]) == (1, 1)


@pytest.mark.slow
def test_finished_cells_are_not_run_again(folder):
    with pytest.raises(RunFailed, match="1 of 4 cells failed: b seed 1: loss is not finite"):
        go(FakeStudy(acts={"b 1": "nan"}), folder, workers=2)
    before = {p: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()}
    assert len(before) == 3
    assert go(FakeStudy(), folder, workers=2) == "done"
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.slow
def test_what_workers_say_is_shown_with_the_cell_it_is_about(folder, capfd):
    go(FakeStudy(seeds=(0,)), folder, workers=2)
    out, err = capfd.readouterr()
    assert "  a seed 0: printed by a 0\n" in out and "  b seed 0: printed by b 0\n" in out
    assert err == ""


@pytest.mark.slow
def test_the_manifest_says_which_cells_are_at_work(folder):
    seen = []
    run(
        FakeStudy(seconds=0.4),
        settings(folder, workers=2, threads=1),
        NoTracker(),
        closing=lambda folder: seen.append(manifest(folder).get("progress")),
    )
    assert seen[0]["finished"] == 1 and seen[0]["cells"] == 4 and len(seen[0]["running"]) == 2
    assert "progress" not in manifest(folder)


def test_a_study_that_other_processes_cannot_import_runs_in_this_one(folder, capsys):
    class Here(FakeStudy):
        """A class inside a function cannot be pickled."""

    assert go(Here(), folder, workers=2) == "done"
    assert "workers=1" in capsys.readouterr().out and manifest(folder)["workers"] == 1


# ---------------------------------------------------------------------------- what goes wrong


def test_cells_that_break_let_the_others_go_on(folder):
    with pytest.raises(RunFailed) as caught:
        go(FakeStudy(acts={"a 0": "kill", "b 0": "nan"}), folder, workers=2)
    assert "2 of 4 cells failed" in str(caught.value)
    assert "a seed 0: its worker was killed by SIGKILL" in str(caught.value)
    assert "b seed 0: loss is not finite at step 3" in str(caught.value)
    assert set(losses(folder)) == {("a", 1), ("b", 1)}
    assert manifest(folder)["status"] == "failed" and not workers_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "cause"),
    [
        ("nan", "loss is not finite at step 3"),
        ("memory", "out of memory (DefaultCPUAllocator: can't allocate memory"),
        ("kill", "its worker was killed by SIGKILL"),
    ],
)
def test_a_cell_that_breaks_lets_the_others_go_on(folder, act, cause, capsys):
    with pytest.raises(RunFailed) as caught:
        go(FakeStudy(acts={"a 0": act}), folder, workers=2)
    assert f"1 of 4 cells failed: a seed 0: {cause}" in str(caught.value)
    assert capsys.readouterr().out.count("failed: a seed 0") == 1
    assert set(losses(folder)) == {("a", 1), ("b", 0), ("b", 1)}
    assert manifest(folder)["status"] == "failed"
    assert go(FakeStudy(), folder, workers=2) == "done"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "error", "status"), [("mistake", UserError, 2), ("bug", WorkerError, None)]
)
def test_any_other_error_ends_the_run(folder, act, error, status):
    with pytest.raises(error) as caught:
        go(FakeStudy(acts={"a 0": act, "b 0": "sleep"}), folder, workers=2)
    if status is not None:
        assert caught.value.exit_status == status and not folder.exists()
    else:
        assert manifest(folder)["cause"] == "ZeroDivisionError: by zero"
    assert not workers_of(folder)


@pytest.mark.parametrize("workers", [0, -1, "many", True])
def test_a_number_of_workers_that_cannot_be_is_one_line(folder, workers):
    with pytest.raises(UserError, match=f"workers={workers} must be auto or a whole number"):
        go(FakeStudy(), folder, workers=workers)


@pytest.mark.slow
def test_a_time_limit_holds_for_every_worker(folder):
    began = time.monotonic()
    acts = {"a 1": "sleep", "b 1": "sleep"}
    assert go(FakeStudy(acts=acts), folder, workers=2, time_limit_s=8) == "cut"
    assert time.monotonic() - began < 20
    assert set(losses(folder)) == {("a", 0), ("b", 0)} and not workers_of(folder)
    assert go(FakeStudy(), folder, workers=2) == "done"


# ---------------------------------------------------------------------------- kills


def start(folder: Path, seconds: float) -> subprocess.Popen[bytes]:
    here = Path(__file__).parents[1]
    folder.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "TMPDIR": str(folder.parent.parent)}
    with open(folder.parent.parent / "stderr", "wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(here), str(folder), str(seconds)],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=env,
        )


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "in vain"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_owner_leaves_no_worker(folder, number):
    process = start(folder, 30.0)
    wait_until(lambda: len(workers_of(folder)) == 2 and "running" in _status(folder))
    process.send_signal(number)
    process.wait(20)
    wait_until(lambda: not workers_of(folder), 12.0)
    if number != signal.SIGKILL:
        assert manifest(folder)["status"] == "stopped"
    assert go(FakeStudy(), folder, workers=2) == "done"


def _status(folder: Path) -> str:
    try:
        return json.loads((folder / "manifest.json").read_text())["status"]
    except (OSError, ValueError):
        return ""


@pytest.mark.slow
def test_a_hundred_kills_of_random_members_lose_nothing(tmp_path):
    """The owner or a worker is killed at a random moment; the same command gets through."""
    undisturbed, folder = tmp_path / "undisturbed" / "r", tmp_path / "runs" / "r"
    go(FakeStudy(), undisturbed, workers=2)
    rng = random.Random(0)
    kills = whole = 0
    finished: dict[tuple[str, int], Any] = {}
    while kills < 100:
        process = start(folder, 0.6)
        time.sleep(rng.uniform(2.0, 7.0))
        members = [process.pid, *workers_of(folder)]
        undisturbed_here = process.poll() is not None
        if not undisturbed_here:
            os.kill(rng.choice(members), signal.SIGKILL)
            kills += 1
        status = process.wait(60)
        told = (tmp_path / "stderr").read_text()
        assert "Error" not in told or "SIGKILL" in told, told
        assert status == 0 or not undisturbed_here, told
        wait_until(lambda: not workers_of(folder), 15.0)
        now = losses(folder)
        assert finished.items() <= now.items(), "what was finished is lost"
        finished = now
        if len(finished) == 4:
            assert finished == losses(undisturbed)
            for path in folder.rglob("*.json"):
                json.loads(path.read_text())
            subprocess.run(["rm", "-rf", str(folder)], check=True)
            finished = {}
            whole += 1
    assert whole >= 5, "hardly any run got through"


# ---------------------------------------------------------------------------- the schedule


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend to have some cores and free memory."""

    def pretend(cores: int, gigabytes: float = 1000.0) -> None:
        monkeypatch.setattr(pool, "cores_here", lambda: cores)
        monkeypatch.setattr(pool.resources, "free_memory", lambda device: gigabytes * 1e9)

    return pretend


@pytest.mark.parametrize(
    ("cores", "threads", "n_cells", "expected"),
    [
        (2, None, 5, (2, 1, 2)),
        (2, None, 4, (2, 1, None)),
        (2, 1, 5, (2, 1, None)),
        (8, None, 5, (5, 1, None)),
        (4, None, 5, (4, 1, 4)),
        (16, None, 5, (5, 3, None)),
        (2, 2, 5, (1, 2, None)),
        (8, 4, 5, (2, 4, None)),
        (8, None, 1, (1, None, None)),
        (1, None, 5, (1, None, None)),
    ],
)
def test_auto_divides_the_cores(machine, cores, threads, n_cells, expected):
    machine(cores)
    share = pool.shares("auto", threads, n_cells, CPU, 0.0)
    assert share == expected
    assert share.workers * (share.threads or 1) <= max(cores, threads or 1)


def test_auto_starts_no_more_workers_than_fit_into_memory(machine):
    machine(16, gigabytes=4.0)
    assert pool.shares("auto", None, 5, CPU, 0.0).workers == 2
    assert pool.shares("auto", None, 5, CPU, 1.4e9).workers == 2
    assert pool.shares("auto", None, 5, CPU, 2.4e9).workers == 1
    assert pool.shares("auto", None, 5, CPU, 9e9).workers == 1


def test_an_odd_cell_runs_first_on_all_cores_and_is_reported_first(folder, machine):
    machine(2)
    study = FakeStudy(seeds=(0,), names=("a", "b", "c"))
    reported = []
    run(
        study,
        settings(folder, workers="auto", threads=None),
        NoTracker(),
        closing=lambda folder: reported.append(set(losses(folder))),
    )
    assert reported[0] == {("a", 0)}
    threads = {r.dataset: r.facts["threads"] for r in read_records(folder)}
    assert threads == {"a": 2, "b": 1, "c": 1}
    assert (manifest(folder)["threads"], manifest(folder)["threads_of_first_cell"]) == (1, 2)


def test_cells_that_announce_much_memory_run_one_after_the_other(folder, machine):
    machine(2, gigabytes=3.0)
    assert go(FakeStudy(memory=2e9), folder, workers="auto", threads=None) == "done"
    assert manifest(folder)["workers"] == 1


def test_the_share_of_a_job_of_a_sweep_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert pool.shares("auto", None, 5, CPU, 0.0) == (1, None, None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(pool.joblib, "cpu_count", lambda: 16)
    assert pool.shares("auto", None, 5, CPU, 0.0) == (3, 1, None)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 16])
def test_equal_cells_end_in_time(machine, k):
    """Total over the cores and, at most, all but 1/k of one cell more (Graham 1969)."""
    machine(k)
    for n_cells in range(1, 17):
        workers = pool.shares("auto", None, n_cells, CPU, 0.0).workers
        rounds = -(-n_cells // workers)
        assert rounds <= n_cells / k + 1 - 1 / k + 1e-9


def test_the_first_seed_of_every_dataset_comes_first():
    cells = [Cell(d, s, (d,)) for d, seeds in (("a", 3), ("b", 1), ("c", 2)) for s in range(seeds)]
    order = [(cell.dataset, cell.seed) for cell in breadth_first(cells)]
    assert order == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2)]
