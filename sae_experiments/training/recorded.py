"""Training steps that are recorded once and then replayed as a whole, as a CUDA graph.

Launching the hundreds of small operations of a step one by one takes longer than the operations.
A recorded step repeats the same operations on the same memory. What changes from step to step
must therefore lie in tensors that it reads: its batch, and the numbers of a `Clock`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

#: Ways to make steps. host: the processor looks at numbers and decides, which is fastest on a CPU;
#: device: nothing waits for the device, and on a GPU steps are recorded; auto: host, until the
#: other one has been measured on a GPU.
BACKENDS = ("auto", "host", "device")
#: Steps made in the ordinary way before one is recorded: they load libraries, build kernels and
#: make the optimiser's state.
WARM_UP = 3
#: Recordings of one function at most: each keeps memory of its own.
MOST = 8


class Clock:
    """Numbers of the current step in tensors on a device.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        #: Number of the step in the whole run.
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        #: Share of the phase that is done.
        self.progress = torch.zeros((), dtype=torch.float64, device=device)
        #: Learning rate as a share of its peak.
        self.rate = torch.zeros((), dtype=torch.float64, device=device)

    def set(self, step: int, progress: float, rate: float) -> None:
        """Set all numbers; the device gets them in the order of its work."""
        self.step.fill_(step)
        self.progress.fill_(progress)
        self.rate.fill_(rate)


class Recorder(Protocol):
    """Records the operations of a function and repeats them."""

    def record(self, function: Callable[[], Any]) -> Any:
        """Call a function once and keep its operations; returns what it returned."""
        ...

    def replay(self) -> None:
        """Repeat the operations, on the same memory."""
        ...


class CudaGraph(Recorder):
    """Recorder that captures a CUDA graph; capturing executes nothing.

    Args:
        generators: Sources of random numbers that are seeded before each replay.
    """

    def __init__(self, generators: list[torch.Generator]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self.graph.register_generator_state(generator)

    def record(self, function: Callable[[], Any]) -> Any:
        # Nothing can be captured on the default stream; without a name a new one is used.
        stream = torch.cuda.current_stream()
        if stream == torch.cuda.default_stream():
            stream = None
        gc.collect()  # what earlier recordings held
        # Another thread may go on fetching rows.
        captured = torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local")
        with _stale_streams_replaced(), captured:
            outcome = function()
        self.graph.replay()
        return outcome

    def replay(self) -> None:
        self.graph.replay()


@contextmanager
def _stale_streams_replaced() -> Iterator[None]:
    """Let gradients flow on the stream that is captured.

    A result of the model that someone still holds would bind them to the stream that it was made
    on, where nothing can be captured.
    """
    override = getattr(torch.autograd.graph, "set_override_stale_capture_stream", None)
    if override is None:
        yield
        return
    override(True)
    try:
        yield
    finally:
        override(False)


#: Recorders by type of device; on others every step is made in the ordinary way.
RECORDERS: dict[str, Callable[[list[torch.Generator]], Recorder]] = {"cuda": CudaGraph}


class RecordedSteps:
    """A function of a batch that is recorded after a few calls, and replayed from then on.

    There is one recording for each combination of what the host decides (`key`) and the shapes of
    the batch.

    Args:
        function: Computes a step from a batch; whatever it returns is overwritten by the next one.
        generators: Sources of random numbers that it uses.
        device: Device that it runs on.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        generators: list[torch.Generator],
        device: torch.device,
    ) -> None:
        self.function = function
        self.generators = generators
        self.recorder = RECORDERS.get(device.type)
        self._calls: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, tuple[Recorder, Any, Any]] = {}

    def __call__(self, batch: Any, key: Hashable = None) -> Any:
        """The outcome of a batch, a (nested) tuple of tensors."""
        key = (key, _shapes(batch))
        if key in self._recordings:
            recorder, inputs, outcome = self._recordings[key]
            _copy(batch, inputs)
            recorder.replay()
            return outcome
        calls = self._calls.get(key, 0)
        if self.recorder is None or calls < WARM_UP or len(self._recordings) == MOST:
            self._calls[key] = calls + 1
            return self.function(batch)
        recorder = self.recorder(self.generators)
        inputs = _cloned(batch)
        outcome = recorder.record(lambda: self.function(inputs))
        self._recordings[key] = recorder, inputs, outcome
        return outcome


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Queue work on a stream of its own: a graph cannot be captured on the default one."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)


def _shapes(batch: Any) -> Hashable:
    """Shapes of the tensors of a batch, and which of them are one and the same."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape), batch.dtype
    if isinstance(batch, tuple):
        same = tuple(next(i for i, other in enumerate(batch) if other is one) for one in batch)
        return tuple(_shapes(part) for part in batch), same
    if batch is None or isinstance(batch, bool) or callable(batch):
        return batch  # the host's: part of the recording
    raise TypeError(f"a step with a {type(batch).__name__} in its batch cannot be recorded")


def _cloned(batch: Any) -> Any:
    """A copy of a batch with memory of its own; parts that were one tensor still are."""
    if not isinstance(batch, tuple):
        return batch.clone() if isinstance(batch, Tensor) else batch
    copies: dict[int, Any] = {}
    for part in batch:
        if id(part) not in copies:
            copies[id(part)] = _cloned(part)
    parts = [copies[id(part)] for part in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)


def _copy(batch: Any, into: Any) -> None:
    """Copy a batch into another one of the same shapes."""
    if isinstance(batch, Tensor):
        into.copy_(batch)
    elif isinstance(batch, tuple):
        done = set()
        for part, target in zip(batch, into, strict=True):
            if id(part) not in done:
                _copy(part, target)
            done.add(id(part))
