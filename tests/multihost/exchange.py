"""A program for tests: sends and receives so many bytes at once with its fellow.

Its arguments: `listen` or `connect`, the address of the one that listens, and how many bytes. It
prints the seconds until all of them came, and of those after the first ones how many there were and
their seconds: the wait for the fellow's thread, long on a busy machine, is not the link's.
"""

from __future__ import annotations

import socket
import sys
import threading
import time

PORT = 29500


def main(role: str, address: str, count: int) -> None:
    if role == "listen":
        with socket.create_server((address, PORT)) as server:
            fellow, _ = server.accept()
    else:
        fellow = connected_to(address)
    fellow.settimeout(60)
    fellow.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    began, left = time.perf_counter(), count  # the fellow sends nothing before this "!"
    fellow.sendall(b"!")
    assert fellow.recv(1) == b"!"
    sender = threading.Thread(target=fellow.sendall, args=(bytes(count),))
    sender.start()
    left -= len(fellow.recv(1))
    first, rest = time.perf_counter(), left
    while left:
        left -= len(fellow.recv(min(left, 1 << 20)))
    ended = time.perf_counter()
    print(ended - began, rest, ended - first)
    sender.join()


def connected_to(address: str) -> socket.socket:
    """A connection to the fellow, once it listens."""
    while True:
        try:
            return socket.create_connection((address, PORT), timeout=1)
        except OSError:
            time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
