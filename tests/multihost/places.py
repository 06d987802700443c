"""Calls of this program's functions on hosts, without a process for each."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tests.multihost.hosts import Host

Result = TypeVar("Result")


def on(host: Host, act: Callable[[], Result]) -> Result:
    """What `act` returns in the network of a host; what it starts in threads is there too."""
    with ThreadPoolExecutor(1) as thread:  # of its own, which ends there
        return thread.submit(_there, host, act).result()


def _there(host: Host, act: Callable[[], Result]) -> Result:
    libc = ctypes.CDLL(None, use_errno=True)  # Python 3.12 has os.setns
    with open(f"/run/netns/{host.name}") as network:
        assert not libc.setns(network.fileno(), 0), os.strerror(ctypes.get_errno())
    return act()
