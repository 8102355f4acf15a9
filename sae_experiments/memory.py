"""Memory of this process: freed blocks that it keeps, and the most that it has held."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from pathlib import Path

#: Parameters of `mallopt` in glibc (malloc.h) and their values: map no block by itself, keep freed
#: memory, grow by 256 MiB at a time.
SETTINGS = {
    "M_MMAP_THRESHOLD": (-3, 2**31 - 1),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**28),
}


@cache
def keep() -> bool:
    """Let the C library keep freed memory for the life of this process.

    glibc maps every block above 32 MiB anew and unmaps it when it is freed. The first access to
    each page then costs a page fault: an element-wise operation on 64 MiB takes four times as long
    as on memory that was used before. Results do not change; the process keeps its peak.

    Returns:
        Whether the library took the settings.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) == 1 for setting in SETTINGS.values())


def peak_memory() -> float:
    """The most memory that this process, or one of its children, has held, in bytes.

    On Linux the value of the process itself is read from /proc, because its `ru_maxrss` starts at
    that of the process that started it. 0 on Windows.
    """
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    own, of_children = (
        float(resource.getrusage(who).ru_maxrss * unit)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return max(own, of_children)
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return max(float(found[0]) * 1024 if found else own, of_children)
