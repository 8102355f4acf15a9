"""A process that is asked to end does so within seconds, whatever it is doing, and keeps what
it trained.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sae_experiments import stopping
from sae_experiments.stopping import OutOfTime, Stopped, limited, listening, process_age
from sae_experiments.training.checkpoint import read_checkpoint
from sae_experiments.training.loop import Learner, Loss, Progress, Session, StepInfo, train
from support.common import ROOT, train_config


def ask() -> None:
    """SIGTERM to this process; it is handled before this returns."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.001)


def wait(seconds: float = 5.0) -> None:
    """Work in Python until the end, unless something is raised."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        time.sleep(0.005)


def in_del(act: Callable[[], None]) -> None:
    class Falls:
        def __del__(self) -> None:
            act()

    Falls()


def in_weakref(act: Callable[[], None]) -> None:
    class Falls:
        pass

    thing = Falls()
    _ = weakref.ref(thing, lambda ref: act())
    del thing


def in_ctypes(act: Callable[[], None]) -> None:
    compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(
        lambda a, b: act() or 0
    )
    ctypes.CDLL(None).qsort((ctypes.c_int * 2)(1, 2), 2, ctypes.sizeof(ctypes.c_int), compare)


@pytest.mark.parametrize("place", [in_del, in_weakref, in_ctypes])
def test_a_signal_where_python_drops_exceptions_is_not_lost(place):
    began = time.monotonic()

    def work() -> None:
        place(ask)
        wait()

    with pytest.raises(Stopped) as stopped, listening():
        work()
    assert stopped.value.exit_status == 143 and str(stopped.value) == "SIGTERM"
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("place", [in_del, in_weakref, in_ctypes])
def test_a_time_limit_where_python_drops_exceptions_is_not_lost(place):
    began = time.monotonic()

    def work() -> None:
        place(lambda: wait(0.3))
        wait()

    with pytest.raises(OutOfTime), limited(time.monotonic() + 0.05, lambda: True):
        work()
    assert time.monotonic() - began < 3


HELD = """
import hashlib, sys, time
sys.path.insert(0, {root!r})
from sae_experiments import stopping
stopping.GRACE_S = {grace}
up = iter(["up"])
def swallow():
    while True:
        try:
            print(*up, end="", flush=True)
            time.sleep(0.01)
        except BaseException:
            pass
def closing():
    try:
        print(*up, end="", flush=True)
        time.sleep(60)
    finally:
        time.sleep(60)
def in_c():
    print(*up, end="", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
with stopping.listening(), stopping.last_words(lambda: print("kept", flush=True)):
    {work}
"""


def held(work: str, grace: float) -> subprocess.Popen[str]:
    """A process that is inside ``work`` and does not come out by itself."""
    code = HELD.format(root=str(ROOT), work=work, grace=grace)
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stdout.read(2) == "up"
    time.sleep(0.1)
    return process


@pytest.mark.parametrize("work", ["swallow()", "closing()", "in_c()"])
def test_a_process_that_does_not_end_by_itself_is_ended(work):
    """A library that takes the exception for an error, code that cleans up for ever, a call
    that does not return.
    """
    process = held(work, grace=0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said, error = process.communicate(timeout=30)
    assert process.returncode == 143 and time.monotonic() - began < 5
    assert said == "kept\n", "the last words"
    assert error == f"error: {stopping.farewell('SIGTERM')}\n"


def test_the_same_signal_twice_ends_a_process_at_once_and_another_one_does_not():
    for second, status in ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, 143)):
        process = held("closing()", grace=2.0)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(second)
        process.communicate(timeout=30)
        assert process.returncode == status


def test_who_waits_for_children_is_given_the_time(monkeypatch):
    monkeypatch.setattr(stopping, "GRACE_S", 0.1)

    def work() -> None:
        try:
            ask()
        finally:
            wait(0.5)

    with pytest.raises(Stopped), listening(), stopping.wait_for_children():
        work()


class Line(Learner):
    """Fits a linear map to noise; the step does not matter here."""

    def loss(self, batch: Tensor, info: StepInfo) -> Loss:
        total = self.module(batch).square().mean()
        return Loss(total, {"square": total.detach()})


def trained(checkpoint: Path | None, act: Callable[[int], None]) -> tuple[Tensor, Progress]:
    torch.manual_seed(0)
    learner = Line(
        "line", nn.Linear(3, 2), train_config(checkpoint_every_s=1000.0, steps=12), seed=0
    )

    def batch_at(step: int) -> Tensor:
        act(step)
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))

    progress = train([learner], batch_at, learner.cfg, Session(checkpoint=checkpoint))
    return learner.module.weight.detach().clone(), progress


def test_training_that_is_asked_to_end_finishes_its_step_and_writes_a_checkpoint(tmp_path):
    whole, _ = trained(None, lambda step: None)
    path = tmp_path / "checkpoint"
    with pytest.raises(Stopped), listening():
        trained(path, lambda step: ask() if step == 5 else None)
    found = read_checkpoint(path)
    assert found is not None and found[1]["step"] == 6, "the step in which the signal came"
    steps: list[int] = []
    again, progress = trained(path, steps.append)
    assert steps == [6, 7, 8, 9, 10, 11] and progress.step == 12
    assert torch.equal(again, whole)


def test_a_step_that_takes_too_long_is_broken_off(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "PATIENCE_S", 0.1)
    began = time.monotonic()
    with pytest.raises(Stopped), listening():
        trained(tmp_path / "checkpoint", lambda step: (ask(), wait())[0] if step == 5 else None)
    assert time.monotonic() - began < 3 and not (tmp_path / "checkpoint").exists()


def test_a_signal_in_the_last_step_is_not_forgotten(tmp_path):
    with pytest.raises(Stopped), listening():
        trained(tmp_path / "checkpoint", lambda step: ask() if step == 11 else None)


def test_nothing_is_left_behind_where_nobody_asked():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    hook = sys.unraisablehook
    with listening(), limited(time.monotonic() + 100, lambda: True):
        assert trained(None, lambda step: None)[1].step == 12
    assert {n: signal.getsignal(n) for n in before} == before and sys.unraisablehook is hook


def interrupted(deadline: float, not_before: float = 0.0) -> bool:
    """True if a limit ends a long sleep."""
    try:
        with limited(deadline, lambda: time.monotonic() >= not_before):
            time.sleep(30)
    except OutOfTime:
        return True
    return False


def test_limits_may_be_nested_and_the_outer_one_goes_on():
    began = time.monotonic()
    try:
        with limited(began + 0.6, lambda: True):
            assert interrupted(began + 0.2)
            with limited(began + 60, lambda: True):
                pass
            time.sleep(30)
    except OutOfTime:
        assert 0.5 < time.monotonic() - began < 15
    else:
        pytest.fail("the outer limit was forgotten")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    now = time.monotonic()
    with limited(now + 0.3, lambda: True):  # both have passed: what the inner one ended goes on
        assert interrupted(now + 0.1, not_before=now + 0.4)
        time.sleep(0.05)


def test_the_age_of_a_process_counts_from_its_start():
    code = "import time; time.sleep(0.5); from sae_experiments.stopping import process_age; "
    code += "began = time.monotonic() - process_age(); print(began)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert -0.1 < float(done.stdout) - began < 5 or process_age() == 0
