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
LARGEST_TENSOR = 1 << 30  # bytes; larger ones are mapped by themselves
NEVER = -1
KEPT = {M_MMAP_THRESHOLD: LARGEST_TENSOR, M_TRIM_THRESHOLD: NEVER}
USUAL = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}  # that glibc comes to by itself
ASKED = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


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
    large ones back at once, and takes every page anew, which the system fills with zeros first: up
    to a third of an update's time (benchmarks/README.md, "Memory that is kept").
    Whoever has set glibc's own variables for this is left alone.
    """
    if any(name in os.environ for name in ASKED):
        yield
        return
    set_malloc(KEPT)
    try:
        yield
    finally:
        set_malloc(USUAL)
        return_memory()


def set_malloc(values: dict[int, int]) -> None:
    """Set glibc's malloc, by the names of its malloc.h; of other C libraries nothing."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in values.items():
            mallopt(name, value)
