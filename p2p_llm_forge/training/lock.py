"""One writer at a time in a folder that several machines share."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from p2p_llm_forge.errors import ForgeError

HEARTBEAT_S = 1.0
SILENCE_S = 5.0  # a lock of another machine that does not change for so long is stale


@contextlib.contextmanager
def only_writer(path: Path, what: str, run_id: str | None = None) -> Iterator[None]:
    """Hold the lock file `path` while entered. Raises ForgeError if another process holds it.

    The holder renews the file's time stamp. A lock is stale when its process is gone (on this
    machine) or its time stamp stands still (on another one; clocks are not compared). `run_id`
    names one launch: when it starts anew after the loss of a peer it takes over its own lock.
    """
    own = {"host": platform.node(), "pid": os.getpid(), "run_id": run_id}
    _acquire(path, own, what)
    released = threading.Event()
    beat = threading.Thread(target=_keep_alive, args=(path, released), daemon=True, name="lock")
    beat.start()
    try:
        yield
    finally:
        released.set()
        beat.join()
        if _holder(path) == own:
            path.unlink(missing_ok=True)


def _acquire(path: Path, own: dict, what: str) -> None:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                json.dump(own, file)
            return
        except OSError as error:
            if not path.is_file():
                raise ForgeError(f"{what} cannot be written: {error.strerror or error}") from error
            holder = _holder(path)
        if not _is_stale(path, holder, own):
            raise ForgeError(
                f"{what} is in use by process {holder.get('pid')} on {holder.get('host')}: wait "
                f"until it ends, or stop it (its lock is {path})"
            )
        path.unlink(missing_ok=True)


def _holder(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _is_stale(path: Path, holder: dict, own: dict) -> bool:
    if own["run_id"] is not None and holder.get("run_id") == own["run_id"]:
        return True
    if holder.get("host") == own["host"] and holder.get("pid") is not None:
        return holder["pid"] == own["pid"] or not _is_alive(holder["pid"])
    seen, until = _changed_at(path), time.monotonic() + SILENCE_S
    while time.monotonic() < until:
        time.sleep(HEARTBEAT_S / 4)
        if _changed_at(path) != seen:
            return False
    return True


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _is_alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _keep_alive(path: Path, released: threading.Event) -> None:
    while not released.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)
