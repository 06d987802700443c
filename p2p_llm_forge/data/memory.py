"""The memory of this process: how much is its own, and giving back what was freed."""

from __future__ import annotations

import contextlib
import ctypes

import psutil
import pyarrow as pa


def own_memory() -> int:
    """Bytes that are this process's own, without files that it has mapped and Arrow's text."""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0) - pa.total_allocated_bytes()


def return_memory() -> None:
    """Give the system what was freed, where that does not happen by itself (glibc)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
