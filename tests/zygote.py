"""Runs of the scripts that start in milliseconds: forks of a process that has imported everything.

Each run is a real process, which is killed, signalled and waited for like any other. What it is
forked from, the fork server of `multiprocessing`, never starts a thread or a model.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import platform
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.multihost.disks import Disk
from tests.waiting import wait_until

CLONE_NEWNS, CLONE_NEWUTS = 0x20000, 0x4000000  # from sched.h of Linux


@dataclass(frozen=True)
class Start:
    """How a run starts: with `main()` of a module, which finds `argv` as its command line."""

    argv: list[str]
    log: Path  # its output is appended to it
    environ: dict[str, str] = field(default_factory=dict)
    script: str = "train"
    host: str | None = None  # the network namespace that it is in, and its host name
    hosts_file: Path | None = None  # what it finds as /etc/hosts; only with `host`
    name_servers: Path | None = None  # what it finds as /etc/resolv.conf; only with `host`
    disk: Disk | None = None  # all that it sees of the files of tests; only with `host`
    terminal: str = os.devnull  # what it reads from


class Zygote:
    """Starts runs of the scripts, and knows how they ended."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.preloaded"])
        self._runs: dict[int, BaseProcess] = {}
        self._statuses: dict[int, int] = {}  # of those that have ended

    def start(self, argv: list[str], log: Path, environ: dict | None = None, **how: Any) -> int:
        """Start `train.py argv`, or another script; the fields of `Start` say how. Its pid."""
        start = Start(argv, log, environ or {}, **how)
        process = self._context.Process(target=_become, args=(start,))
        process.start()
        self._runs[process.pid] = process
        self._statuses.pop(process.pid, None)  # of one that had this number before
        return process.pid

    def wait(self, pid: int, idle_s: float = 60.0) -> int:
        """The status of a run that has ended: its exit status, or minus the signal's number."""
        wait_until(lambda: self.has_ended(pid), idle_s)
        return self._statuses[pid]

    def has_ended(self, pid: int) -> bool:
        """Whether the run has ended by now."""
        if pid in self._runs and not self._runs[pid].is_alive():
            process = self._runs.pop(pid)
            self._statuses[pid] = process.exitcode
            process.close()  # it holds two files
        return pid in self._statuses

    def kill(self, pids: list[int]) -> None:
        """Kill all of them before any is waited for: ranks end by themselves when one is lost."""
        for pid in pids:
            if not self.has_ended(pid):
                with contextlib.suppress(ProcessLookupError):  # it has ended since
                    os.kill(pid, signal.SIGKILL)
        for pid in pids:
            self.wait(pid)

    def close(self) -> None:
        """End what still runs."""
        self.kill(list(self._runs))


def _become(start: Start) -> None:
    """Turn this fork into the run."""
    log = os.open(start.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    source_of_input = os.open(start.terminal, os.O_RDONLY | os.O_NOCTTY)
    if start.host:
        _go_to(start.host, {"hosts": start.hosts_file, "resolv.conf": start.name_servers})
        if start.disk:
            start.disk.enter()
    for source, target in ((source_of_input, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    # The fork server's own may have read ahead. As Python opens it: no newline is translated.
    sys.stdin = open(0, newline="\n", closefd=False)  # noqa: SIM115
    # The fork server's own takes what it writes to for what it was: perhaps a file, now a terminal.
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    multiprocessing.set_start_method(None, force=True)  # the system's own again
    # As in a terminal: shells let what they start in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(start.environ)
    sys.path[:0] = filter(None, start.environ.get("PYTHONPATH", "").split(":"))
    sys.argv = [f"{start.script}.py", *start.argv]
    status: Any = 99  # of an error that nobody has expected
    try:
        from p2p_llm_forge.errors import run_script
        from p2p_llm_forge.peers.launch import local_rank

        run_script(importlib.import_module(start.script).main, local_rank())
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def _go_to(host: str, files: dict[str, Path | None]) -> None:
    """Leave for a network namespace, with a host name and files in /etc of its own."""
    libc = ctypes.CDLL(None, use_errno=True)  # Python 3.12 has them as os.setns and os.unshare
    with open(f"/run/netns/{host}") as network:
        failed = libc.setns(network.fileno(), 0) or libc.unshare(CLONE_NEWNS | CLONE_NEWUTS)
    assert not failed, os.strerror(ctypes.get_errno())
    socket.sethostname(host)
    platform._uname_cache = None  # of the fork server's own name
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for name, file in files.items():
        if file:
            subprocess.run(["mount", "--bind", file, f"/etc/{name}"], check=True)
