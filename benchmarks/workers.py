"""Contestants in processes of their own that take turns: one works while all others sleep.

A *host* is one process of one Python that has imported what is slow to import; for every
contestant it forks a child, so that contestants start in no time, share nothing and have a peak
memory of their own. A contestant is a function `f(turns, **args)` that calls `turns.next()`
before every step of its loop; there it waits until it is told to go on. What is timed is
therefore the loop itself, not a copy of it.

    host = Host(["sae_contestants"], python=sys.executable)
    worker = host.start("sae_contestants:ours", variant="topk", d=128, m=1024)
    worker.run(10)      # seconds of each of ten steps, on the clock and of processor time
"""

from __future__ import annotations

import importlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
#: glibc maps and unmaps every block above 32 MiB anew, and page faults then take up to half of a
#: step; these settings keep the memory.
KEEP_MEMORY = (
    "glibc.malloc.mmap_threshold=4294967296:"
    "glibc.malloc.trim_threshold=17179869184:"
    "glibc.malloc.top_pad=268435456"
)


class ContestantError(RuntimeError):
    """A contestant failed; the text is its traceback."""


class Turns:
    """A contestant's side: when to make a step, and what to tell about it."""

    def __init__(self, conn: Connection) -> None:
        self.conn, self.left, self.times, self.info = conn, 0, [], {}
        self._began: tuple[float, float] | None = None
        self._base = 0

    def prepared(self) -> None:
        """Call once the data are there: memory counts from here."""
        reset_peak()
        self._base = memory("VmRSS")

    def next(self) -> None:
        """Wait for the next step's turn."""
        if self._began is not None:
            self.times.append(
                (time.perf_counter() - self._began[0], time.process_time() - self._began[1])
            )
        while not self.left:
            self.tell()
        self.left -= 1
        self._began = time.perf_counter(), time.process_time()

    def tell(self) -> None:
        """Report what was done since the last report, then wait for the next order."""
        self.conn.send(
            {"times": self.times, "peak": memory("VmHWM") - self._base, "info": self.info}
        )
        self.times, self._began = [], None
        try:
            self.left = self.conn.recv()
        except EOFError:
            os._exit(0)


def memory(field: str) -> int:
    """Bytes of this process by a field of /proc/self/status (VmRSS: now, VmHWM: at most)."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field + ":")
    )
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Let VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


class Worker:
    """The bench's side of one contestant."""

    def __init__(self, conn: Connection) -> None:
        self.conn, self.peak, self.info = conn, 0, {}
        self._listen()

    def run(self, n: int) -> list[tuple[float, float]]:
        """Let the contestant make `n` steps.

        Of each it keeps the seconds on the clock and the seconds of processor time.
        """
        self.conn.send(n)
        return self._listen()

    def _listen(self) -> list[tuple[float, float]]:
        try:
            found = self.conn.recv()
        except EOFError:
            raise ContestantError("the process ended (out of memory?)") from None
        if "error" in found:
            raise ContestantError(found["error"])
        self.peak, self.info = max(self.peak, found["peak"]), found["info"]
        return found["times"]

    def stop(self) -> None:
        """End the process."""
        self.conn.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


class Host:
    """A Python with `modules` (of this folder) imported, from which contestants are forked."""

    def __init__(
        self,
        modules: list[str],
        *,
        python: str = sys.executable,
        threads: int,
        keep_memory: bool = False,
    ) -> None:
        self.key = secrets.token_bytes(16)
        self.folder = tempfile.TemporaryDirectory()
        self.listener = Listener(
            str(Path(self.folder.name) / "s"), family="AF_UNIX", authkey=self.key
        )
        numbers = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        extra = {
            "BENCH_KEY": self.key.hex(),
            "SPARSIFY_DISABLE_TRITON": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(HERE.parent),
        }
        if keep_memory:
            extra["GLIBC_TUNABLES"] = KEEP_MEMORY
        command = [python, str(HERE / "workers.py"), self.listener.address, *modules]
        self.process = subprocess.Popen(
            command,
            env=os.environ | numbers | extra,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.conn = self._accept()
        if "error" in (ready := self.conn.recv()):
            raise ContestantError(ready["error"])
        self.versions: dict[str, str] = ready["versions"]

    def _accept(self) -> Connection:
        self.listener._listener._socket.settimeout(120)  # type: ignore[attr-defined]
        try:
            return self.listener.accept()
        except TimeoutError:
            self.process.kill()
            raise ContestantError(
                (self.process.stderr.read() if self.process.stderr else b"").decode()[-2000:]
            ) from None

    def start(self, call: str, **args: Any) -> Worker:
        """Fork a contestant, `module:function` with `args`.

        Returns when it is ready for its first step.
        """
        self.conn.send({"call": call, "args": args})
        return Worker(self._accept())

    def close(self) -> None:
        """End the host."""
        self.conn.close()
        self.listener.close()
        self.process.wait(30)
        self.folder.cleanup()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def versions() -> dict[str, str]:
    """Versions of what a contestant may be made of, as far as installed in this Python."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "sae-lens", "dictionary-learning", "eai-sparsify"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _serve(address: str, modules: list[str]) -> None:
    key = bytes.fromhex(os.environ.pop("BENCH_KEY"))
    conn = Client(address, authkey=key)
    try:
        for name in modules:
            importlib.import_module(name)
    except Exception:
        conn.send({"error": traceback.format_exc()})
        return
    conn.send({"versions": versions()})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        try:
            order = conn.recv()
        except EOFError:
            return
        if os.fork() == 0:
            _contest(Client(address, authkey=key), **order)
            os._exit(0)


def _contest(conn: Connection, call: str, args: dict[str, Any]) -> None:
    module, function = call.split(":")
    try:
        turns = Turns(conn)
        getattr(importlib.import_module(module), function)(turns, **args)
        turns.conn.send({"error": f"{call} ended by itself"})
    except Exception:
        conn.send({"error": traceback.format_exc()})


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
