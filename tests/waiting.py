"""Waiting in tests: as long as anything happens, however busy the machine is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from p2p_llm_forge.polling import pauses

Seen = TypeVar("Seen")
WORK_S = 0.5  # heartbeats of a process that hangs need less in the longest of waits


def wait_until(
    look: Callable[[], Seen],
    idle_s: float = 60.0,
    longest_pause_s: float = 0.02,
    log: Path | None = None,
) -> Seen:
    """The first true value that `look` returns.

    Raises AssertionError, with the end of `log`, when the processes that this one has started
    have done nothing for `idle_s` seconds; work that is slow because the machine is busy gets the
    time that it needs.
    """
    worked_s, looked_at = work_s(), time.monotonic()
    for _ in pauses(longest_s=longest_pause_s):
        if seen := look():
            return seen
        if time.monotonic() > looked_at + idle_s:
            before, worked_s, looked_at = worked_s, work_s(), time.monotonic()
            printed = log.read_text()[-6000:] if log else ""
            assert worked_s > before + WORK_S, f"nothing happens for {idle_s} s\n{printed}"
    raise AssertionError("pauses() never ends")


def work_s() -> float:
    """The processor time that all processes have used that this one has started."""
    here = psutil.Process()
    ended = here.cpu_times()
    total_s = ended.children_user + ended.children_system
    for process in here.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total_s += sum(process.cpu_times()[:4])  # its own, and that of children that ended
    return total_s
