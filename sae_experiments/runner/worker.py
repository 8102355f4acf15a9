"""A process that runs cells for the owner of a run folder.

`python -m sae_experiments.runner.worker` reads pickled messages on its standard input (the setup,
then one task per cell) and writes pickled events on its standard output. It writes the files of
its own cells and nothing else. It ends when its input ends, which it does when the owner dies.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sae_experiments.errors import with_kind
from sae_experiments.runner.messages import receive, send

EVENTS_PER_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings that a worker receives once, at its start."""

    study: Any
    """The study, not yet prepared."""
    folder: Path
    """The run folder."""
    cache: Path
    """The cache folder."""
    hashes: Mapping[str, str]
    """`config_hash` and `source_hash` of the run."""
    corpora: Mapping[str, Any]
    """Provenance by result name, from the owner's `prepare`."""
    device: str
    """Torch device of this worker."""
    threads: int | None
    """CPU threads of its arithmetic; None: PyTorch's default."""
    verbosity: str
    """quiet, normal or verbose."""


class Event(NamedTuple):
    """A message of a worker."""

    kind: str
    """ready, say, stage, log, result, late, failed, user_error or error."""
    data: Any = None


class Channel:
    """Writes events to a pipe, from any thread."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, kind: str, data: Any = None) -> None:
        """Write one event."""
        with self._lock:
            send(self._stream, (kind, data))


class _Lines:
    """A text stream whose lines become `say` events: everything that is printed in a worker."""

    encoding = "utf-8"
    errors = "replace"

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._channel.send("say", (line, False))
        return len(text)

    def flush(self) -> None:
        """Do nothing: only the last, unfinished line is buffered."""

    def isatty(self) -> bool:
        return False


class ChannelConsole:
    """A `Console` whose lines and stages are events."""

    def __init__(self, channel: Channel, verbosity: str) -> None:
        self._channel = channel
        self.quiet = verbosity == "quiet"
        self.verbose = verbosity == "verbose"
        self.terminal = False

    def say(self, line: str, *, always: bool = False) -> None:
        """Send a line."""
        self._channel.send("say", (line, always))

    def detail(self, line: str) -> None:
        """Send a line that only `verbosity=verbose` shows."""
        if self.verbose:
            self.say(line)

    @contextmanager
    def stage(self, name: str, unit: str = "step") -> Iterator[Callable[[int, int], None]]:
        """Yield `tick(done, total)`, which sends the progress a few times per second."""
        last = 0.0

        def tick(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done >= total or now - last > 1 / EVENTS_PER_S:
                last = now
                self._channel.send("stage", (name, unit, done, total))

        yield tick


def main() -> int:
    """Run the cells that come in until there are no more; returns the exit status."""
    stdin = os.fdopen(os.dup(0), "rb")
    channel = Channel(os.fdopen(os.dup(1), "wb"))
    # Whatever libraries print below Python goes to stderr: standard output carries events.
    os.dup2(2, 1)
    # It has the methods of a text stream that `print` uses.
    sys.stdout = _Lines(channel)  # pyright: ignore[reportAttributeAccessIssue]
    parent, sys.path[:] = receive(stdin)

    from sae_experiments.stopping import Stopped, end_with_parent, listening

    end_with_parent(parent)
    try:
        with listening():
            _serve(stdin, channel)
    except (KeyboardInterrupt, Stopped) as stopped:
        return getattr(stopped, "exit_status", 130)
    return 0


def _serve(stdin: BinaryIO, channel: Channel) -> None:
    import torch

    from sae_experiments import memory
    from sae_experiments.runner.cell import CellRunner
    from sae_experiments.studies.base import Context

    setup: Setup = receive(stdin)
    if setup.threads is not None:
        torch.set_num_threads(setup.threads)
    memory.keep()
    console: Any = ChannelConsole(channel, setup.verbosity)
    ctx = Context(
        folder=setup.folder,
        cache=setup.cache,
        device=torch.device(setup.device),
        console=console,
        log=lambda step, values: channel.send("log", (step, dict(values))),
    )
    # The owner has said what there is to say about the texts.
    quiet: Any = ChannelConsole(channel, "quiet")
    quiet.say = lambda line, always=False: None
    tasks = _Tasks(stdin)
    runner: CellRunner | None = None
    channel.send("ready")
    while (task := tasks.next()) is not None:
        cell, left = task
        try:
            if runner is None:
                setup.study.prepare(_with_console(ctx, quiet))
                runner = CellRunner(
                    study=setup.study,
                    folder=setup.folder,
                    hashes=setup.hashes,
                    corpora=setup.corpora,
                )
            channel.send("result", runner.run(cell, ctx, left))
        except BaseException as error:
            if not _sent(error, channel):
                raise


def _with_console(ctx: Any, console: Any) -> Any:
    from dataclasses import replace

    return replace(ctx, console=console)


def _sent(error: BaseException, channel: Channel) -> bool:
    """Tell the owner how a cell ended; returns False if the error ends the worker as well."""
    from sae_experiments.errors import NonFinite, UserError, first_line, is_out_of_memory
    from sae_experiments.stopping import OutOfTime

    if isinstance(error, OutOfTime):
        channel.send("late")
    elif isinstance(error, NonFinite):
        channel.send("failed", str(error))
    elif isinstance(error, UserError):
        channel.send("user_error", (str(error), error.exit_status))
    elif is_out_of_memory(error):
        channel.send("failed", f"out of memory ({first_line(error)}): use fewer workers")
    elif isinstance(error, Exception):
        channel.send("error", (with_kind(error), traceback.format_exc()))
    else:
        return False
    return True


class _Tasks:
    """Reads tasks from a stream in a thread, which notices at once that the owner is gone."""

    def __init__(self, stream: BinaryIO) -> None:
        import queue

        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._busy = False
        self._lock = threading.Lock()
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream: BinaryIO) -> None:
        while True:
            try:
                task = receive(stream)
            except EOFError:
                # The owner closes the stream of an idle worker only; a busy one has lost it.
                with self._lock:
                    if self._busy:
                        os.kill(os.getpid(), signal.SIGTERM)
                self._queue.put(None)
                return
            self._queue.put(task)

    def next(self) -> Any:
        """The next task; None: no more."""
        with self._lock:
            self._busy = False
        task = self._queue.get()
        with self._lock:
            self._busy = task is not None
        return task


if __name__ == "__main__":
    sys.exit(main())
