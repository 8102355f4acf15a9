"""Launchers of a sweep's jobs: this process, this machine, SLURM, or a Ray cluster.

A job is the command line that a user would type for that run alone, and launchers keep no state of
it. A job that crashes, runs out of memory or is killed affects no other job, and the same sweep,
started again, continues where every job stopped.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from sae_experiments.errors import UserError

POLL_S = 0.1
GRACE_S = 15.0  # a job that was asked to end has ended by then (stopping.GRACE_S), unless it cannot
#: Environment variable of a job: the number of the process that started it, with which it ends.
JOB = "SAE_SWEEP_JOB"


class Job(NamedTuple):
    """One run of a sweep."""

    number: int
    name: str  # folder below the sweep's
    overrides: list[str]
    command: list[str]  # as a person would type it
    log: Path  # file for its output


class Exit(NamedTuple):
    """Exit status and duration of a command."""

    status: int  # exit status; negative: the signal that killed it
    seconds: float  # time it took


Ended = Callable[[Job, Exit], None]
Here = Callable[[list[str]], int]  # runs a command line of experiment.py in this process


class Launcher(Protocol):
    """Runs the jobs of a sweep."""

    first_alone: bool  # run the first job before the others: it makes what they share

    def run(self, jobs: Sequence[Job], ended: Ended, here: Here) -> None:
        """Run jobs.

        Args:
            jobs: The jobs.
            ended: Called with each job and how it ended.
            here: Runs a command line in this process.
        """
        ...


def run_command(
    command: Sequence[str],
    log: str,
    env: Mapping[str, str],
    cwd: str,
    running: set[Any] | None = None,
    echo: bool = False,
) -> Exit:
    """Run a command. If this process is stopped meanwhile, ask the command to end and wait for it.

    Args:
        command: The command.
        log: File for its output.
        env: Changes of the environment.
        cwd: Working directory.
        running: Commands that are running; this one is added while it runs.
        echo: Also show the output.
    """
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with open(log, "w", encoding="utf-8", errors="replace") as out:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **env, JOB: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if echo else out,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        running = set() if running is None else running
        running.add(process)

        def copy() -> None:
            for line in process.stdout or ():
                out.write(line)
                out.flush()
                print(line, end="", flush=True)

        try:
            copy()
            while process.poll() is None:  # short naps: a signal is answered between them
                time.sleep(POLL_S)
        except BaseException:
            end(running)
            copy()
            raise
        finally:
            running.discard(process)
        return Exit(process.returncode, time.monotonic() - began)


def end(running: set[Any]) -> None:
    """Ask processes to terminate, and kill those that do not."""
    processes = [p for p in running if p.poll() is None]
    for p in processes:
        p.send_signal(signal.SIGTERM)
    limit = time.monotonic() + GRACE_S
    for p in processes:
        try:
            p.wait(max(limit - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            p.kill()


class Inline:
    """One job after another in this process.

    It saves the start of a process for each job, but a job that crashes ends the sweep.
    """

    first_alone = False

    def run(self, jobs: Sequence[Job], ended: Ended, here: Here) -> None:
        """Run the jobs, their output shown and kept."""
        for job in jobs:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            with open(job.log, "w", encoding="utf-8") as log:
                shown: Any = _Tee(sys.stdout, log)
                silent: Any = _Tee(None, log)
                with redirect_stdout(shown), redirect_stderr(silent):
                    status = here(job.command[2:])
            ended(job, Exit(status, time.monotonic() - began))
            if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
                raise KeyboardInterrupt


class _Tee:
    """A text stream that writes to a file as well."""

    def __init__(self, shown: TextIO | None, log: TextIO) -> None:
        self.shown, self.log = shown, log

    def write(self, text: str) -> int:
        if self.shown is not None:
            self.shown.write(text)
        self.log.write(text)
        return len(text)

    def flush(self) -> None:
        if self.shown is not None:
            self.shown.flush()
        self.log.flush()

    def isatty(self) -> bool:
        return False


class Local:
    """Runs jobs as processes on this machine, with joblib; concurrent jobs share the cores.

    Args:
        jobs: Number of jobs at a time; None: as many as the cores allow with `threads` each.
        threads: Threads per job; None: its share of the cores.
        devices: Numbers of CUDA devices, of which each job gets one for itself.
        first_alone: Run the first job before the others.
    """

    def __init__(
        self,
        *,
        jobs: int | None,
        threads: int | None,
        devices: Sequence[int] | None,
        first_alone: bool,
    ) -> None:
        for name, value in (("jobs", jobs), ("threads", threads)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(
                    f"launcher.{name}={value} must be a whole number of at least 1, or null"
                )
        self.jobs = jobs
        self.threads = threads
        self.devices = list(devices or [])
        self.first_alone = first_alone

    def width(self, n: int, cores: int) -> tuple[int, int]:
        """Jobs at a time and threads for each, of `n` jobs on `cores` cores."""
        at_once = self.jobs or len(self.devices) or max(1, cores // (self.threads or 1))
        at_once = max(1, min(at_once, n))
        return at_once, self.threads or max(1, cores // at_once)

    def run(self, jobs: Sequence[Job], ended: Ended, here: Here) -> None:
        """Run the jobs; with one at a time, their output is shown."""
        import joblib

        at_once, threads = self.width(len(jobs), joblib.cpu_count())
        free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for i in range(at_once):
            free.put(str(self.devices[i % len(self.devices)]) if self.devices else "")
        running: set[Any] = set()
        cwd = os.getcwd()

        def one(job: Job) -> tuple[Job, Exit]:
            device = free.get()
            try:
                env = {"OMP_NUM_THREADS": str(threads)} | (
                    {"CUDA_VISIBLE_DEVICES": device} if device else {}
                )
                return job, run_command(
                    job.command, str(job.log), env, cwd, running, echo=self.jobs == 1
                )
            finally:
                free.put(device)

        if at_once == 1:
            for job in jobs:
                ended(*one(job))
            return
        parallel = joblib.Parallel(
            at_once,
            backend="threading",
            return_as="generator_unordered",
            pre_dispatch="n_jobs",
            batch_size=1,  # pyright: ignore[reportArgumentType] (annotated by its default, "auto")
        )
        try:
            results: Any = parallel(joblib.delayed(one)(job) for job in jobs)
            for job, how in results:
                ended(job, how)
        except BaseException:
            end(running)
            raise


class Submitit:
    """SLURM jobs by submitit, in one array.

    A job that is preempted or reaches `timeout_min` is queued again and continues from its
    checkpoint.

    Args:
        cluster: `slurm`, `local` for the same on this machine, or None: SLURM if there is one.
        requeues: Maximum restarts of a job that reached its time limit.
        parameters: Arguments of submitit's `update_parameters`; those that are None are left out.
        first_alone: Run the first job before the others.
    """

    def __init__(
        self,
        *,
        cluster: str | None,
        requeues: int,
        parameters: Mapping[str, Any],
        first_alone: bool,
    ) -> None:
        self.cluster = cluster
        self.requeues = requeues
        self.first_alone = first_alone
        self.parameters = {k: v for k, v in parameters.items() if v is not None}

    def run(self, jobs: Sequence[Job], ended: Ended, here: Here) -> None:
        """Queue the jobs and wait for them. A sweep that ended early continues when typed again."""
        submitit = _imported("submitit")
        folder = jobs[0].log.parent / "submitit"
        executor = submitit.AutoExecutor(
            folder=folder, cluster=self.cluster, slurm_max_num_timeout=self.requeues
        )
        executor.update_parameters(**self.parameters)
        threads = str(self.parameters.get("cpus_per_task", 1))
        tasks = [
            Requeued(job.command, str(job.log), {"OMP_NUM_THREADS": threads}, os.getcwd())
            for job in jobs
        ]
        with executor.batch():
            handles = [executor.submit(task) for task in tasks]
        pending = dict(zip(handles, jobs, strict=True))
        try:
            while pending:
                for handle in [h for h in pending if h.done()]:
                    ended(pending.pop(handle), _exit_of(handle, submitit))
                time.sleep(POLL_S if self.cluster == "local" else 5.0)
        except BaseException:
            for handle in pending:
                handle.cancel()
            raise


class Requeued:
    """A command that submitit may interrupt and queue again, where it continues."""

    def __init__(self, command: Sequence[str], log: str, env: Mapping[str, str], cwd: str) -> None:
        self.command = list(command)
        self.log = log
        self.env = dict(env)
        self.cwd = cwd
        self.running: set[Any] = set()

    def __call__(self) -> Exit:
        return run_command(self.command, self.log, self.env, self.cwd, self.running)

    def checkpoint(self) -> Any:
        """Called by submitit at a time-out or before preemption."""
        end(self.running)
        return _imported("submitit").helpers.DelayedSubmission(
            Requeued(self.command, self.log, self.env, self.cwd)
        )


def _exit_of(handle: Any, submitit: Any) -> Exit:
    try:
        return Exit(*handle.result())
    except (
        submitit.core.utils.FailedJobError,
        submitit.core.utils.UncompletedJobError,
        submitit.core.utils.FailedSubmissionError,
    ) as error:
        print(f"submitit: job {handle.job_id}: {str(error).splitlines()[0]}", flush=True)
        return Exit(1, 0.0)


class Ray:
    """A Ray cluster. A job whose node dies is started again elsewhere.

    Every node needs the checkout at the same path and shares the run and cache folders.

    Args:
        address: `auto` or `ray://host:10001` joins a running cluster; None starts one here.
        num_cpus: CPUs of a job, also its threads.
        num_gpus: GPUs of a job.
        retries: Number of times that a job is started again after its node died.
        first_alone: Run the first job before the others.
    """

    def __init__(
        self,
        *,
        address: str | None,
        num_cpus: float,
        num_gpus: float,
        retries: int,
        first_alone: bool,
    ) -> None:
        self.address = address
        self.num_cpus = num_cpus
        self.num_gpus = num_gpus
        self.retries = retries
        self.first_alone = first_alone

    def run(self, jobs: Sequence[Job], ended: Ended, here: Here) -> None:
        """Hand the jobs to the cluster and wait for them."""
        ray = _imported("ray")
        if not ray.is_initialized():
            ray.init(
                address=self.address,
                log_to_driver=False,
                include_dashboard=False if self.address is None else None,
            )
        remote = ray.remote(
            num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=self.retries
        )(run_command)
        env = {k: v for k, v in os.environ.items() if k.startswith("SAE_")} | {
            "OMP_NUM_THREADS": str(max(1, int(self.num_cpus)))
        }
        pending = {
            remote.remote(job.command, str(job.log.resolve()), env, os.getcwd()): job
            for job in jobs
        }
        try:
            while pending:
                for reference in ray.wait(list(pending), num_returns=1, timeout=1.0)[0]:
                    job = pending.pop(reference)
                    try:
                        how = Exit(*ray.get(reference))
                    except ray.exceptions.RayError as error:
                        print(f"ray: {job.name}: {str(error).splitlines()[0]}", flush=True)
                        how = Exit(1, 0.0)
                    ended(job, how)
        finally:
            for reference in pending:
                ray.cancel(reference)


def _imported(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"launcher={name} needs a package that is not installed: "
            f"pip install 'sae-experiments[{name}]'"
        ) from error
