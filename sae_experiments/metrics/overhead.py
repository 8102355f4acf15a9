"""What purification costs: time and memory of a training step against the same SAE without it."""

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
from sae_experiments.metrics.base import Bench, Measured, MetricInfo
from sae_experiments.metrics.codes import nulls
from sae_experiments.saes.base import SAE, Batch
from sae_experiments.saes.base import Step as Moment
from sae_experiments.saes.purified.sae import Purification, Purified


def _info(name: str, title: str, formula: str, unit: str, *, shown: bool = False) -> MetricInfo:
    depends = (*ON_ACTIVATIONS, "device")
    return MetricInfo(name=name, title=title, formula=formula, unit=unit, better="down", shown=shown, depends=depends)


WITHOUT = "the same without purification"
INFO = [
    _info(
        "overhead_time",
        "time against the host",
        f"median over rounds of seconds a training step / {WITHOUT}",
        "x",
        shown=True,
    ),
    _info(
        "overhead_memory",
        "memory against the host",
        f"peak of what training steps allocate, gradients and optimiser included, / {WITHOUT}",
        "x",
        shown=True,
    ),
    _info("overhead_step_ms", "purified step", "median milliseconds of a training step", "ms"),
    _info("overhead_host_step_ms", "host step", WITHOUT, "ms"),
    _info("overhead_memory_mib", "purified memory", "peak of what training steps allocate", "MiB"),
    _info("overhead_host_memory_mib", "host memory", WITHOUT, "MiB"),
]


def measure(bench: Bench, *, batch: int, steps: int, rounds: int, memory_steps: int) -> Measured:
    """Train copies of the SAE, with and without purification, side by side on held-out rows.

    Both make ``steps`` steps of ``batch`` rows a round, in turn, so that whatever else the machine
    does hits them alike; every step is perturbed (in a fit the first part is not). The SAE itself
    is left as it is.
    """
    sae = bench.sae
    if not isinstance(sae, Purified) or not sae.purification.active:
        return nulls(INFO, "the SAE is not purified")
    if getattr(sae, "second_view", 0.0):
        return nulls(INFO, "token noise reads a second view of every row, which held-out rows do not have")
    rows = next(bench.chunks(batch, batch))
    data = Batch(rows.x, rows.y)
    off = replace(sae.purification, weights=dict.fromkeys(sae.purification.weights, 0.0))
    with torch.enable_grad():
        times = _times([_trainer(sae, data, p) for p in (sae.purification, off)], steps, rounds, bench.device)
        peaks = [_peak(_trainer(sae, data, p), memory_steps, bench.device) for p in (sae.purification, off)]
    milliseconds = [1000 * statistics.median(column) for column in zip(*times, strict=True)]
    found = {
        "overhead_time": statistics.median(a / b for a, b in times),
        "overhead_memory": peaks[0] / peaks[1],
        "overhead_step_ms": milliseconds[0],
        "overhead_host_step_ms": milliseconds[1],
        "overhead_memory_mib": peaks[0] / 2**20,
        "overhead_host_memory_mib": peaks[1] / 2**20,
    }
    return Measured(found)


def _trainer(sae: SAE, data: Batch, purification: Purification) -> Callable[[], None]:
    """One training step of a copy of ``sae`` that is purified as ``purification`` says."""
    made = copy.deepcopy(sae).requires_grad_(True).train()
    made._scratch, made.purification = {}, purification
    made.watch = None  # a copy that was stopped early would rest
    optimizer = torch.optim.Adam(made.parameters(), fused=True)
    dead = torch.zeros(made.d_sae, dtype=torch.bool, device=data.x.device)
    moment = Moment(phase="train", progress=1.0, dead=dead, generator=torch.Generator(data.x.device).manual_seed(0))

    def step() -> None:
        loss = made.loss(data, moment)
        loss.total.backward()
        made.before_update()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            made.after_update(loss.extra, moment)

    return step


def _times(trainers: list[Callable[[], None]], steps: int, rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds a step of each of ``trainers``, for every round, after one round to warm up."""
    found = []
    for _ in range(rounds + 1):
        spent = [0.0] * len(trainers)
        for _ in range(steps):
            for i, step in enumerate(trainers):
                spent[i] += _seconds(step, device)
        found.append([s / steps for s in spent])
    return found[1:]


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _peak(step: Callable[[], None], steps: int, device: torch.device) -> int:
    """Bytes that the first ``steps`` steps hold at the most, beyond the rows and the weights."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for _ in range(steps):
            step()
        return torch.cuda.max_memory_allocated(device) - before
    with Held() as held:
        for _ in range(steps):
            step()
    return held.peak


def storages(tree: Any) -> Iterator[Any]:
    """The memory behind every tensor of nested arguments or results."""
    for t in tree_leaves(tree):
        if isinstance(t, Tensor) and t.layout in (torch.strided, torch.sparse_csr):
            sparse = t.layout == torch.sparse_csr
            parts = (t.values(), t.col_indices(), t.crow_indices()) if sparse else (t,)
            yield from (part.untyped_storage() for part in parts)


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within the context: ``now``, and ``peak`` at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
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
