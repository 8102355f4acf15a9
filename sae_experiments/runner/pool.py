"""Cells side by side: the workers of a run, their tasks and their events."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, cast

import joblib
import torch

from sae_experiments import resources
from sae_experiments.errors import UserError
from sae_experiments.files import PACKAGE
from sae_experiments.runner.cell import TimeLeft
from sae_experiments.runner.messages import receive, send
from sae_experiments.runner.worker import Event, Setup
from sae_experiments.stopping import GRACE_S
from sae_experiments.studies.base import Cell

#: Bytes of Python, PyTorch and this package in a worker.
BASE_MEMORY = 0.5e9
#: Bytes that a worker needs at least: what was seen at the laptop preset (docs/using.md).
MEMORY_PER_WORKER = 1.5e9
POLL_S = 0.2


class Shares(NamedTuple):
    """Division of the machine among the cells of a run."""

    workers: int
    """Processes that run cells; 1: this process runs them."""
    threads: int | None
    """CPU threads of a cell's arithmetic; None: PyTorch's default."""
    first: int | None = None
    """CPU threads of the first cell, which then runs alone; None: as many as the others."""

    def threads_of(self, place: int) -> int | None:
        """CPU threads of the cell at a place in the order of the run, from 0."""
        return self.first if place == 0 and self.first is not None else self.threads


def check_workers(workers: int | str) -> None:
    """Raise `UserError` unless `workers` is "auto" or a number of processes."""
    if workers != "auto" and (isinstance(workers, (str, bool)) or workers < 1):
        raise UserError(f"workers={workers} must be auto or a whole number of at least 1")


def shares(
    workers: int | str, threads: int | None, n_cells: int, device: torch.device, need: float
) -> Shares:
    """Divide the machine among the cells of a run.

    The result does not depend on how many cells are finished, so that a run that is continued
    computes with the same number of threads.

    Args:
        workers: "auto", or a number.
        threads: CPU threads per cell; None: the cores divided by the workers.
        n_cells: Cells of the run.
        device: Device of the arithmetic.
        need: Bytes that the largest announced part of a cell needs.
    """
    cores = cores_here()
    if workers != "auto":
        n = min(int(workers), n_cells)
    elif device.type == "cuda":
        n = min(torch.cuda.device_count() if device.index is None else 1, n_cells)
    else:
        free = resources.free_memory(device)
        each = max(BASE_MEMORY + need, MEMORY_PER_WORKER)
        fit = n_cells if free is None else int(free // each)
        n = max(min(n_cells, cores // (threads or 1), fit), 1)
    if n == 1:
        return Shares(1, threads)
    # One cell more than fills the workers evenly runs first and has all cores: the first report
    # comes sooner, and no worker waits at the end for the other's last cell.
    alone = threads is None and device.type == "cpu" and n_cells % n == 1 and cores > 1
    return Shares(n, threads or max(cores // n, 1), cores if alone else None)


def cores_here() -> int:
    """Cores that this process may use.

    OMP_NUM_THREADS limits the number: a sweep sets it to the share of each job, and users set it
    too.
    """
    share = os.environ.get("OMP_NUM_THREADS", "")
    cores = joblib.cpu_count()
    return min(int(share), cores) if share.isdecimal() and int(share) > 0 else cores


class _Worker:
    """One process and the thread that reads its events."""

    def __init__(self, number: int, setup: Setup, events: queue.SimpleQueue[Any]) -> None:
        self.number = number
        self.cell: Cell | None = None
        env = dict(os.environ)
        if setup.threads is not None:
            env["OMP_NUM_THREADS"] = str(setup.threads)
        if setup.device == "cuda" and torch.cuda.is_available():
            env["CUDA_VISIBLE_DEVICES"] = _visible_device(number)
        paths = [str(PACKAGE.parent), env.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        # A session of its own: Ctrl-C reaches the owner alone, which asks its workers to end.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sae_experiments.runner.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
        self._send((os.getpid(), sys.path))
        self._send(setup)
        reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        reader.start()

    def give(self, cell: Cell, left: TimeLeft) -> None:
        """Hand over a cell."""
        self.cell = cell
        self._send((cell, left))

    def _send(self, message: Any) -> None:
        # A process that is gone is reported by the reader.
        send(cast("BinaryIO", self.process.stdin), message)

    def _read(self, events: queue.SimpleQueue[Any]) -> None:
        stream = cast("BinaryIO", self.process.stdout)
        while True:
            try:
                event = Event(*receive(stream))
            except EOFError:
                events.put((self, Event("gone", self.process.wait())))
                return
            events.put((self, event))

    def close(self) -> None:
        """Tell the process that there are no more cells."""
        if self.process.stdin is not None:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                return


def _visible_device(number: int) -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    return devices[number % len(devices)]


class Pool:
    """Workers that are started as they are needed, and started again if one dies."""

    def __init__(self, setup: Setup, n: int) -> None:
        self._setup = setup
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._idle: list[_Worker] = []
        self._workers: dict[int, _Worker] = {}
        self.size = n

    @property
    def free(self) -> bool:
        """True if a worker can take a cell."""
        return bool(self._idle) or len(self._workers) < self.size

    @property
    def running(self) -> list[Cell]:
        """The cells at work, by the number of their worker."""
        workers = [self._workers[number] for number in sorted(self._workers)]
        return [worker.cell for worker in workers if worker.cell is not None]

    def give(self, cell: Cell, left: TimeLeft) -> int:
        """Hand a cell to a free worker; returns the worker's number."""
        worker = self._idle.pop() if self._idle else self._start()
        worker.give(cell, left)
        return worker.number

    def _start(self) -> _Worker:
        number = next(i for i in range(self.size) if i not in self._workers)
        worker = _Worker(number, self._setup, self._events)
        self._workers[number] = worker
        return worker

    def events(self) -> Iterator[tuple[int, Cell, Event]]:
        """Yield (worker, cell, event) while cells are at work; long pauses may occur."""
        while self.running:
            try:
                worker, event = self._events.get(timeout=POLL_S)
            except queue.Empty:
                yield -1, Cell("", 0, ()), Event("idle")
                continue
            cell = worker.cell
            if event.kind == "gone":
                del self._workers[worker.number]
                self._idle = [each for each in self._idle if each is not worker]
            if cell is None or event.kind == "ready":
                continue
            if event.kind in ("result", "late", "failed", "user_error", "error", "gone"):
                worker.cell = None
                if event.kind != "gone":
                    self._idle.append(worker)
            yield worker.number, cell, event

    def close(self) -> None:
        """End every worker: ask those at work to stop, and kill any left after `GRACE_S`."""
        workers = list(self._workers.values())
        for worker in workers:
            if worker.cell is not None and worker.process.poll() is None:
                worker.process.send_signal(signal.SIGTERM)
            worker.close()
        limit = time.monotonic() + GRACE_S + 2.0
        for worker in workers:
            try:
                worker.process.wait(max(limit - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._workers.clear()


def how_it_died(status: int) -> str:
    """Describe the end of a worker that sent no last event."""
    if status >= 0:
        return f"its worker ended with status {status}"
    name = signal.Signals(-status).name
    hint = " (the system may have run out of memory: use fewer workers)"
    return f"its worker was killed by {name}{hint if -status == signal.SIGKILL else ''}"
