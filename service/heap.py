"""The C library's heap, in a process that serves for months.

glibc keeps up to eight heaps for each core, and serves larger and larger blocks from them the more of those it has
seen. Threads that work with tensors leave holes of many sizes in all of these, so that a service would grow
to a multiple of what it uses. With few heaps and a fixed limit above which a block is mapped alone, and so is
given back when it is freed, it stays near what it uses.
"""

from __future__ import annotations

import ctypes
import os

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
"""As in glibc's malloc.h; mallopt(3)."""
MAPPED_ALONE_BYTES = 1 << 20
HEAPS = 2
OPERATORS_OWN = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Who sets one of these has chosen."""


def settle() -> bool:
    """Before there are threads. Returns whether it did: only glibc can, and only if nobody has chosen otherwise."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in OPERATORS_OWN):
        return False
    return bool(mallopt(M_ARENA_MAX, HEAPS)) and bool(mallopt(M_MMAP_THRESHOLD, MAPPED_ALONE_BYTES))
