"""A worker ends with the launcher that started it, however that ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

LOOK_S = 0.5
TO_SAVE_S = 30.0
PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent(parent: int | None) -> None:
    """Ask this process to stop when its parent ends, and end it 30 s later if it still runs.

    parent: its process id; 0: whoever is the parent now; None: nobody to end with. The request is
    a SIGTERM, upon which a run saves with its peers where it can. On Linux the kernel sends it
    (prctl PR_SET_PDEATHSIG).
    """
    if parent is None:
        return
    parent = parent or os.getppid()
    is_sent = False
    if sys.platform == "linux":
        failed = ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        is_sent = not failed and os.getppid() == parent  # it had not ended before
    threading.Thread(target=_watch, args=[parent, is_sent], daemon=True, name="parent").start()


def _watch(parent: int, is_sent: bool) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    with contextlib.suppress(OSError):  # the terminal may have gone with the launcher
        print(
            f"process {os.getpid()}: the launcher that started it (process {parent}) has ended:"
            f" stopping, at the latest in {TO_SAVE_S:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    if not is_sent:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(TO_SAVE_S)
    os.kill(os.getpid(), signal.SIGKILL)
