"""Ports for tests that run beside other tests."""

from __future__ import annotations

import random
import socket

# Below the ports that a kernel gives out by itself.
PORTS = range(12_000, 32_000)
_held: list[socket.socket] = []


def free_port() -> int:
    """A TCP port that nobody listens on, and that no other test of this machine is given.

    As long as this process lives it holds the UDP port of the same number, which nobody needs:
    so one that two processes probe at the same moment is given to one of them only.
    """
    while True:
        port = random.SystemRandom().choice(PORTS)  # a test may seed the other one
        holder = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            holder.bind(("127.0.0.1", port))
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            holder.close()
        else:
            _held.append(holder)
            return port
