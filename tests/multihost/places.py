"""Calls of this program's functions on hosts, without a process for each."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tests.multihost.hosts import Host

Result = TypeVar("Result")
CLONE_FS, CLONE_NEWNS = 0x200, 0x20000  # from sched.h of Linux


def on(host: Host, act: Callable[[], Result], hosts_file: Path | None = None) -> Result:
    """What `act` returns in the network of a host; what it starts in threads is there too.

    hosts_file: what it finds as /etc/hosts.
    """
    with ThreadPoolExecutor(1) as thread:  # of its own, which ends there
        return thread.submit(_there, host, act, hosts_file).result()


def _there(host: Host, act: Callable[[], Result], hosts_file: Path | None) -> Result:
    libc = ctypes.CDLL(None, use_errno=True)  # Python 3.12 has os.setns and os.unshare
    with open(f"/run/netns/{host.name}") as network:
        failed = libc.setns(network.fileno(), 0)
    failed = failed or (hosts_file and libc.unshare(CLONE_FS | CLONE_NEWNS))
    assert not failed, os.strerror(ctypes.get_errno())
    if hosts_file:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "--bind", hosts_file, "/etc/hosts"], check=True)
    return act()
