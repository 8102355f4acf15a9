"""How this process gets its memory: large temporaries are used again instead of being returned to the system and asked for anew."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache

#: ``mallopt`` parameters of glibc (malloc.h) and values: map no block by itself, keep what is freed, grow by 256 MiB at a time.
SETTINGS = {
    "M_MMAP_THRESHOLD": (-3, 2**31 - 1),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**28),
}


@cache
def keep() -> bool:
    """Let the C library keep freed memory for the life of this process; whether it could be told so.

    glibc maps every block above 32 MiB anew and unmaps it when it is freed. The first touch of each page then costs a page fault: an element-wise
    operation on 64 MiB takes four times as long as on memory that was used before. Results are not affected; the process holds on to its peak.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) == 1 for setting in SETTINGS.values())
