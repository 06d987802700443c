"""This process's TCP connections, also those that libraries hold, and what ends waits on them."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

KEEPALIVE_TRIES = 3
FOLDERS = ("/proc/self/fd", "/dev/fd")  # of open files: Linux; macOS and BSD


def give_up_early(host: str, port: int, timeout_s: float) -> int:
    """Let connections to a port fail once its host has answered nothing for about `timeout_s`.

    A call that waits for an answer of a host that vanished returns then; without this the kernel
    decides, after many minutes. Returns how many connections there are; elsewhere than on Linux
    and macOS none is found.
    """
    theirs, count = _addresses(host), 0
    for connection, address, its_port in _connections():
        if its_port == port and address in theirs:
            keep_alive(connection, timeout_s)
            count += 1
    return count


def connected() -> set[int]:
    """What names this process's connections, for `hang_up`."""
    return {_name(connection) for connection, _, _ in _connections()}


def hang_up(names: set[int]) -> None:
    """End connections, so that whoever waits for them learns it at once."""
    for connection, _, _ in _connections():
        if _name(connection) in names:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _name(connection: socket.socket) -> int:
    """Unlike the number of its file this is not used again."""
    return os.fstat(connection.fileno()).st_ino


def _addresses(host: str) -> set[str]:
    with contextlib.suppress(OSError, UnicodeError):
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return {str(entry[4][0]) for entry in found}
    return set()


def _connections() -> Iterator[tuple[socket.socket, str, int]]:
    """Each connection, as a socket that is closed when the next is asked for; its peer's address
    and port. The connection itself stays open."""
    folder = next((folder for folder in FOLDERS if os.path.isdir(folder)), None)
    for number in map(int, os.listdir(folder) if folder else []):
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(number))
        except OSError:  # closed meanwhile
            continue
        with connection:
            peer = None
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                with contextlib.suppress(OSError):  # not connected
                    peer = connection.getpeername()
            if peer and connection.type == socket.SOCK_STREAM:
                yield connection, str(peer[0]).removeprefix("::ffff:"), int(peer[1])


def keep_alive(connection: socket.socket, timeout_s: float) -> None:
    """Let a connection fail once its other end has answered nothing for about `timeout_s`."""
    probe_s = max(1, round(timeout_s / (KEEPALIVE_TRIES + 1)))
    chosen = {
        "TCP_KEEPIDLE": probe_s,
        "TCP_KEEPALIVE": probe_s,  # macOS's name of it
        "TCP_KEEPINTVL": probe_s,
        "TCP_KEEPCNT": KEEPALIVE_TRIES,
        "TCP_USER_TIMEOUT": round(1000 * timeout_s),
    }
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in chosen.items():
        if hasattr(socket, name):
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
