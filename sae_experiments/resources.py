"""Estimates of memory and time before a piece of work begins.

Work that needs more memory than is free is refused.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from sae_experiments.errors import UserError

#: Shares of the free memory, and seconds, below which nothing is said: ordinary runs stay quiet.
NOTABLE_SHARE, NOTABLE_SECONDS = 0.25, 1800.0
#: Floating-point operations below which the machine's speed is not even measured.
NOTABLE_WORK = 1e14
#: Files with the limit and the use of memory of a group of processes: cgroups of version 2 and 1.
GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class Need(NamedTuple):
    """Resources that a piece of work needs."""

    memory: Mapping[str, float]  # bytes at the peak, by purpose
    work: float = 0.0  # floating-point operations
    seconds: float | None = None  # time, if it is known otherwise


def announce(
    what: str, need: Need, fix: str, *, device: torch.device, say: Callable[[str], None]
) -> None:
    """Print the needs of a piece of work, if they are large for this machine.

    Args:
        what: Name of the work, with the keys and values that make it large.
        need: Its needs.
        fix: What to change if it does not fit.
        device: Device of the work.
        say: Prints a line.

    Raises:
        UserError: The memory is more than is free on `device`.
    """
    total, free = sum(need.memory.values()), free_memory(device)
    parts = ", ".join(
        f"{name} {in_bytes(size)}"
        for name, size in sorted(need.memory.items(), key=lambda p: -p[1])
        if size > 0.02 * total
    )
    if free is not None and total > free:
        raise UserError(
            f"{what} needs about {in_bytes(total)} of memory ({parts}), "
            f"and {in_bytes(free)} are free: {fix}"
        )
    seconds = _seconds(need, device)
    long = seconds is not None and seconds > NOTABLE_SECONDS
    if not long and (free is None or total < NOTABLE_SHARE * free):
        return
    of = "" if free is None else f" of the {in_bytes(free)} that are free"
    say(
        f"{what} needs about {in_bytes(total)}{of} ({parts})"
        + (f" and at least {in_time(seconds)}" if seconds is not None and long else "")
    )


def _seconds(need: Need, device: torch.device) -> float | None:
    if need.seconds is None and need.work > NOTABLE_WORK:
        return need.work / speed(device)
    return need.seconds


def free_memory(device: torch.device) -> float | None:
    """Free bytes on the device, swap included; None if the system does not tell."""
    if device.type == "cuda":
        return float(
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    try:
        known = {
            line.split(":")[0]: 1024.0 * int(line.split()[1])
            for line in Path("/proc/meminfo").read_text().splitlines()
        }
    except (OSError, ValueError, IndexError):
        return None
    if "MemAvailable" not in known:
        return None
    return min([known["MemAvailable"] + known.get("SwapFree", 0.0), *_left_to_the_group()])


def _left_to_the_group() -> list[float]:
    left = []
    for most, used in GROUPS:
        try:
            left.append(max(float(Path(most).read_text()) - float(Path(used).read_text()), 0.0))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return left


def speed(device: torch.device, n: int = 1024) -> float:
    """Floating-point operations per second in a matrix product, an upper bound for real work."""
    a, best = torch.ones(n, n, device=device), float("inf")
    for _ in range(4):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def in_bytes(size: float) -> str:
    """Format a size, as in `12 GB`, with two digits since it is an estimate."""
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if size >= unit:
            digits = ".2g" if size < 99.5 * unit else ",.0f"
            return f"{size / unit:{digits}} {name}"
    return f"{size / 1e6:.0f} MB"


def in_time(seconds: float) -> str:
    """Format a duration, as in `40 minutes`, `3 hours` or `51 days`."""
    for unit, name in ((86400.0, "days"), (3600.0, "hours")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:,.0f} {name}"
    return f"{seconds / 60:.0f} minutes"


@cache
def cpu_has_bf16() -> bool:
    """True if this processor multiplies bfloat16 natively; others emulate it, slower than fp32."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return False
    flags = Path("/proc/cpuinfo").read_text(errors="replace")
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", " bf16"))
