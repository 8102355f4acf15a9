"""A process that has imported everything and forks a child for every command line, which it
kills at a chosen moment.

``python tests/support/killing.py`` reads one JSON request per line and answers each with one
line. It is started by ``test_kill.py``: without it, every one of a hundred kills would cost the
seconds that importing torch takes.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WRITING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
#: Of the memory shared with the child: the stage it is in, file operations so far, seconds by stage
#: as JSON.
NAME, COUNT, SPENT = slice(0, 64), slice(64, 72), slice(128, 4096)
spent: dict[str, float] = {}


def write_stage(shared: mmap.mmap, stage: str) -> None:
    shared[NAME] = stage.encode().ljust(64, b"\0")


def watched(
    shared: mmap.mmap, stages: list[str], name: str, function: Callable[..., Any]
) -> Callable[..., Any]:
    """``function``, which says which stage it is while it runs."""

    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        stages.append(name)
        write_stage(shared, name)
        began = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            stages.pop()
            write_stage(shared, stages[-1])
            spent[name] = spent.get(name, 0.0) + time.monotonic() - began
            shared[SPENT] = json.dumps(spent).encode().ljust(SPENT.stop - SPENT.start, b"\0")

    return inside


def watch(shared: mmap.mmap) -> None:
    from sae_experiments.corpora import corpus as data
    from sae_experiments.corpora import download as fetch
    from sae_experiments.models import gpt2 as lm
    from sae_experiments.models import store as activations
    from sae_experiments.report import figures
    from sae_experiments.runner import cell, run
    from sae_experiments.studies import base
    from sae_experiments.studies.language import stores
    from sae_experiments.studies.language import study as language

    stages = ["between stages"]
    write_stage(shared, stages[0])
    places: list[tuple[Any, str, str]] = [
        (fetch, "_fetch", "download"),
        (data, "_write", "encode"),
        (lm, "_make", "language model"),
        (activations, "collect", "collect"),
        (stores, "collect", "collect"),
        (language.Language, "_fit", "fit"),
        (base.Outcome, "measure", "metrics"),
        (language, "export", "export"),
        (cell.CellRunner, "_keep", "aggregate"),
        (run, "write_final_info", "aggregate"),
        (figures, "draw_all", "plot"),
        (figures, "write_tables", "plot"),
    ]
    for owner, attribute, name in places:
        setattr(owner, attribute, watched(shared, stages, name, getattr(owner, attribute)))


def child(request: dict[str, Any], shared: mmap.mmap) -> int:
    """Run the command lines; die of SIGKILL at file operation number ``at_event``, where one is
    given.
    """
    os.chdir(request["here"])
    os.environ.update(request["env"])
    said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    watch(shared)
    at_event, count = request.get("at_event"), 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in WRITING or (
            event == "open"
            and len(args) > 1
            and isinstance(args[1], str)
            and args[1][:1] in ("w", "a", "x", "r+")
        ):
            count += 1
            shared[COUNT] = struct.pack("Q", count)
            if count == at_event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    import plot
    from sae_experiments.cli.main import main

    for program, *argv in request["commands"]:
        status = (
            plot.main(argv)
            if program == "plot"
            else main(argv, plan="variants", extra=[], conf=ROOT / "conf")
        )
        if status:
            return status
    return 0


#: What a child would otherwise import anew.
IMPORTED = (
    "matplotlib.pyplot",
    "plot",
    "sae_experiments.cli.main",
    "sae_experiments.plots.pareto",
    "sae_experiments.report.figures",
    "sae_experiments.runner.run",
    "sae_experiments.studies.language.study",
)


def serve() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = [str(ROOT)]
    for name in IMPORTED:
        import_module(name)
    import torch

    from sae_experiments.corpora import download as fetch

    torch.set_num_threads(1)
    fetch.NETWORK.plain_http, fetch.NETWORK.pause_s = True, 0.01
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        request, shared = json.loads(line), mmap.mmap(-1, 4096)
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                status = child(request, shared)
            finally:
                sys.stdout.flush()
                os._exit(status)
        ended, how = 0, 0
        if (after := request.get("after_s")) is not None:
            wanted = request.get("in_stage")
            while wanted and shared[NAME].rstrip(b"\0").decode() != wanted and not ended:
                time.sleep(5e-4)
                ended, how = os.waitpid(pid, os.WNOHANG)
            if not ended:
                time.sleep(after)
                os.kill(pid, signal.SIGKILL)
        if not ended:
            _, how = os.waitpid(pid, 0)
        stage, count = shared[NAME].rstrip(b"\0").decode(), struct.unpack("Q", shared[COUNT])[0]
        told = json.loads(shared[SPENT].rstrip(b"\0") or b"{}") if not os.WIFSIGNALED(how) else {}
        killed = os.WIFSIGNALED(how)
        status = -os.WTERMSIG(how) if killed else os.WEXITSTATUS(how)
        answers.write(
            json.dumps(
                {
                    "status": status,
                    "stage": stage,
                    "events": count,
                    "seconds": time.monotonic() - began,
                    "spent": told,
                }
            )
            + "\n"
        )


if __name__ == "__main__":
    serve()
