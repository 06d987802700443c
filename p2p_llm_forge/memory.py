"""The memory of this process: how much is its own, and what becomes of what was freed."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import psutil

# Of glibc's malloc.h: from which size on an allocation is mapped by itself, and how much may lie
# free at the heap's end before it is given back.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
LARGEST_KEPT = 1 << 30  # bytes of a tensor
MOST_ONCE = 32 << 20  # the most that older glibc (2.33) takes, and that it comes to by itself
NEVER = -1
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
TUNABLES = ("malloc.mmap_threshold", "malloc.trim_threshold")  # in GLIBC_TUNABLES


def own_memory() -> int:
    """Bytes that are this process's own, without files that it has mapped and Arrow's text."""
    import pyarrow as pa

    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0) - pa.total_allocated_bytes()


def return_memory() -> None:
    """Give the system what was freed, where that does not happen by itself (glibc)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep what is freed for what comes next (glibc; elsewhere nothing changes).

    An update on a CPU takes and frees the same tensors as the one before. By itself glibc gives
    large ones back at once, and the system fills every page with zeros when the next is taken: up
    to a quarter of an update's time (benchmarks/README.md, "Memory that is kept").
    Whoever sets glibc's own variables for this decides instead.
    """
    if is_set_by_user():
        yield
        return
    keep_freed_memory()
    try:
        yield
    finally:
        _set(M_MMAP_THRESHOLD, MOST_ONCE)  # glibc adapts it no more, once it was set
        _set(M_TRIM_THRESHOLD, 2 * MOST_ONCE)
        return_memory()


def keep_freed_memory() -> None:
    """Have glibc keep it from now on."""
    if not _set(M_MMAP_THRESHOLD, LARGEST_KEPT):
        _set(M_MMAP_THRESHOLD, MOST_ONCE)
    _set(M_TRIM_THRESHOLD, NEVER)


def is_set_by_user() -> bool:
    """Whether the process was started with what glibc itself heeds."""
    asked = os.environ.get("GLIBC_TUNABLES", "")
    return any(name in os.environ for name in VARIABLES) or any(one in asked for one in TUNABLES)


def _set(name: int, value: int) -> bool:
    """Whether the C library has taken the value."""
    try:
        return bool(ctypes.CDLL(None).mallopt(name, value))
    except (AttributeError, OSError, TypeError):
        return False
