"""What a device would not allow or repeat, checked on a CPU: waiting for numbers, and replays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
#: Its precision is part of an operation, and not of the arguments.
matmul: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
#: Operations that wait for a device, or whose result has a shape that depends on data.
WAITING = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "item",
    "lift_fresh",  # a tensor from numbers of the host, copied while the device waits
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
}
#: Methods that leave a device without an operation that could be seen.
LEAVING = ("numpy", "tolist", "cpu", "__array__")


class NoWait(TorchDispatchMode):
    """Raises on every operation that would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING or _by_mask(func, args) or _repeats(func, args, kwargs or {}):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def _by_mask(func: Any, args: Any) -> bool:
    """True for indexing with a boolean mask: the number of results depends on it."""
    if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_):
        return False
    masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
    # Writing one number wherever a mask holds is fine.
    return bool(masks) and (func.overloadpacket is aten.index or args[2].numel() > 1)


def _repeats(func: Any, args: Any, kwargs: Any) -> bool:
    """True for repetitions whose total is not given."""
    if func.overloadpacket is not aten.repeat_interleave:
        return False
    return kwargs.get("output_size") is None and len(args) < 4


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Fail on everything that would wait for a device."""

    def leave(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor leaves the device")

    with pytest.MonkeyPatch.context() as patch:
        for name in LEAVING:
            patch.setattr(Tensor, name, leave)
        with NoWait():
            yield


class OneDevice(TorchDispatchMode):
    """Raises on every operation that reads or makes a tensor of the processor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, out)):
            if isinstance(t, Tensor) and t.device.type == "cpu":
                raise AssertionError(f"{func} has a tensor of the processor, {tuple(t.shape)}")
        return out


class _Recording(TorchDispatchMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out, matmul.fp32_precision))
        return out


class Tape:
    """Replays operations on the same memory with the same arguments, as a CUDA graph does.

    Whatever Python decided or computed while it was recorded stays as it was.
    """

    made: list[Tape] = []

    def __init__(self, generators: list[torch.Generator]) -> None:
        self.generators = generators
        self.calls: list[Any] = []
        self.replays = 0
        Tape.made.append(self)

    def record(self, function: Callable[[], Any]) -> Any:
        with nothing_waits(), _Recording(self.calls):
            return function()

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        before = matmul.fp32_precision
        for func, args, kwargs, out, precision in self.calls:
            matmul.fp32_precision = precision
            again = func(*args, **kwargs)
            matmul.fp32_precision = before
            known = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and _memory(old) not in known:
                    old.copy_(new)


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata
