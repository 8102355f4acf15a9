"""What a piece of work will need, said before it begins: memory, which is refused where it cannot be had, and time where it can be foretold."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from sae_experiments.errors import UserError

#: Shares of the free memory, and seconds, below which nothing is said: ordinary runs stay quiet.
NOTABLE_SHARE, NOTABLE_SECONDS = 0.25, 1800.0
#: Floating-point operations below which the machine's speed is not even measured.
NOTABLE_WORK = 1e14
#: Files in which Linux says how much memory a group of processes may have and has: cgroups of version 2 and 1.
GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class Need(NamedTuple):
    """Bytes at the peak by what they are for, floating-point operations in all, and seconds where they are known by themselves."""

    memory: Mapping[str, float]
    work: float = 0.0
    seconds: float | None = None


def announce(
    what: str, need: Need, fix: str, *, device: torch.device, say: Callable[[str], None]
) -> None:
    """Say what ``what`` will need, if that is much for this machine.

    Args:
        what: the work, with the keys and values that make it large.
        fix: what to change where it does not fit.

    Raises:
        UserError: the memory is more than is free on ``device``.
    """
    total, free = sum(need.memory.values()), free_memory(device)
    parts = ", ".join(
        f"{name} {in_bytes(size)}"
        for name, size in sorted(need.memory.items(), key=lambda p: -p[1])
        if size > 0.02 * total
    )
    if free is not None and total > free:
        raise UserError(
            f"{what} needs about {in_bytes(total)} of memory ({parts}), and {in_bytes(free)} are free: {fix}"
        )
    seconds = need.seconds
    if seconds is None and need.work > NOTABLE_WORK:
        seconds = need.work / speed(device)
    long = seconds is not None and seconds > NOTABLE_SECONDS
    if not long and (free is None or total < NOTABLE_SHARE * free):
        return
    of = "" if free is None else f" of the {in_bytes(free)} that are free"
    say(
        f"{what} needs about {in_bytes(total)}{of} ({parts})"
        + (f" and at least {in_time(seconds)}" if seconds is not None and long else "")
    )


def free_memory(device: torch.device) -> float | None:
    """Bytes that can still be had on the device, swap included; None where the system does not say."""
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
    found = []
    for most, used in GROUPS:
        try:
            found.append(max(float(Path(most).read_text()) - float(Path(used).read_text()), 0.0))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return found


def speed(device: torch.device, n: int = 1024) -> float:
    """Floating-point operations a second of a product of matrices on the device: more than any real work reaches."""
    a, best = torch.ones(n, n, device=device), float("inf")
    for _ in range(4):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def in_bytes(size: float) -> str:
    """``12 GB``; two digits are all that an estimate has."""
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if size >= unit:
            return (
                f"{size / unit:.2g} {name}" if size < 99.5 * unit else f"{size / unit:,.0f} {name}"
            )
    return f"{size / 1e6:.0f} MB"


def in_time(seconds: float) -> str:
    """``40 minutes``, ``3 hours`` or ``51 days``."""
    for unit, name in ((86400.0, "days"), (3600.0, "hours")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:,.0f} {name}"
    return f"{seconds / 60:.0f} minutes"
