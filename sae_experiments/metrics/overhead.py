"""Cost of purification: time and memory of a training step against the same SAE without it."""

from __future__ import annotations

import copy
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from sae_experiments.conditions import ON_ACTIVATIONS
from sae_experiments.metrics.base import EvalContext, Measured, MetricInfo
from sae_experiments.metrics.codes import nulls
from sae_experiments.saes.base import Batch, Step
from sae_experiments.saes.purified.sae import Purification, Purified

WITHOUT = "the same without purification"
COSTS = [
    MetricInfo(
        name="overhead_time",
        title="time against the host",
        formula=f"median over rounds of seconds a training step / {WITHOUT}",
        unit="x",
        better="down",
    ),
    MetricInfo(
        name="overhead_memory",
        title="memory against the host",
        formula=(
            f"peak of what training steps allocate, gradients and optimiser included, / {WITHOUT}"
        ),
        unit="x",
        better="down",
    ),
    MetricInfo(
        name="overhead_step_ms",
        title="purified step",
        formula="median milliseconds of a training step",
        unit="ms",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="overhead_host_step_ms",
        title="host step",
        formula=WITHOUT,
        unit="ms",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="overhead_memory_mib",
        title="purified memory",
        formula="peak of what training steps allocate",
        unit="MiB",
        better="down",
        shown=False,
    ),
    MetricInfo(
        name="overhead_host_memory_mib",
        title="host memory",
        formula=WITHOUT,
        unit="MiB",
        better="down",
        shown=False,
    ),
]
INFO = [replace(info, depends=(*ON_ACTIVATIONS, "device")) for info in COSTS]


def measure(
    ctx: EvalContext, *, batch: int, steps: int, rounds: int, memory_steps: int
) -> Measured:
    """Train copies of the SAE with and without purification, in turn, on held-out rows.

    The two copies alternate step by step, so that other load on the machine affects both alike.
    Every step is perturbed, whereas in a fit the first part of training is not. The SAE itself is
    left as it is.

    Args:
        ctx: Evaluation context.
        batch: Rows of a training step.
        steps: Training steps of each copy per round.
        rounds: Rounds over which medians are taken.
        memory_steps: Training steps over which the peak of the memory is taken.
    """
    sae = ctx.sae
    if not isinstance(sae, Purified) or not sae.purification.active:
        return nulls(INFO, "the SAE is not purified")
    if sae.second_view:
        return nulls(
            INFO, "token noise reads a second view of every row, which held-out rows do not have"
        )
    rows = next(ctx.chunks(batch, batch))
    data = Batch(rows.x, rows.y)
    without = dict.fromkeys(sae.purification.weights, 0.0)
    settings = [sae.purification, replace(sae.purification, weights=without)]
    with torch.enable_grad():
        trainers = [_trainer(sae, data, setting) for setting in settings]
        times = _times(trainers, steps, rounds, ctx.device)
        del trainers
        peaks = [
            _peak(_trainer(sae, data, setting), memory_steps, ctx.device) for setting in settings
        ]
    values: dict[str, float | None] = {
        "overhead_time": statistics.median(purified / host for purified, host in times),
        "overhead_memory": peaks[0] / peaks[1],
        "overhead_step_ms": 1000 * statistics.median(purified for purified, _ in times),
        "overhead_host_step_ms": 1000 * statistics.median(host for _, host in times),
        "overhead_memory_mib": peaks[0] / 2**20,
        "overhead_host_memory_mib": peaks[1] / 2**20,
    }
    return Measured(values)


def _trainer(sae: Purified, data: Batch, purification: Purification) -> Callable[[], None]:
    """Build a function that trains a copy of `sae` with `purification` for one step."""
    trained = copy.deepcopy(sae).requires_grad_(True).train()
    trained._scratch = {}
    trained.purification = purification
    trained.early_stopping = (
        None  # otherwise a copy of an SAE that was stopped early would skip its steps
    )
    optimizer = torch.optim.Adam(trained.parameters(), fused=True)
    info = Step(
        phase="train",
        progress=1.0,
        dead=torch.zeros(trained.d_sae, dtype=torch.bool, device=data.x.device),
        generator=torch.Generator(data.x.device).manual_seed(0),
    )

    def step() -> None:
        loss = trained.loss(data, info)
        loss.total.backward()
        trained.before_update()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            trained.after_update(loss.extra, info)

    return step


def _times(
    trainers: list[Callable[[], None]], steps: int, rounds: int, device: torch.device
) -> list[list[float]]:
    """Seconds per step of each trainer, for every round after one round of warm-up."""
    times = []
    for _ in range(rounds + 1):
        spent = [0.0] * len(trainers)
        for _ in range(steps):
            for i, step in enumerate(trainers):
                spent[i] += _seconds(step, device)
        times.append([seconds / steps for seconds in spent])
    return times[1:]


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _peak(step: Callable[[], None], steps: int, device: torch.device) -> int:
    """Peak memory of the first `steps` steps in bytes, without the rows and the weights."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for _ in range(steps):
            step()
        return torch.cuda.max_memory_allocated(device) - before
    with MemoryMeter() as held:
        for _ in range(steps):
            step()
    return held.peak


def storages(tree: Any) -> Iterator[Any]:
    """The storages behind all tensors of nested arguments or results."""
    for leaf in tree_leaves(tree):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.layout == torch.strided:
            yield leaf.untyped_storage()
        elif leaf.layout == torch.sparse_csr:
            for part in (leaf.values(), leaf.col_indices(), leaf.crow_indices()):
                yield part.untyped_storage()


class MemoryMeter(TorchDispatchMode):
    """Context that counts the bytes of tensors allocated in it: current (`now`) and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage._cdata not in given:
                self._count(storage)
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = True
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, size: int) -> None:
        self.now -= size
