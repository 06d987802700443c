"""What a plain socket of Python carries: the measure for whatever else goes over a link.

    python benchmarks/plain_socket.py send ADDRESS
    python benchmarks/plain_socket.py receive ADDRESS

sends until it is ended. Then the other prints the bytes per second after the first megabyte.
"""

from __future__ import annotations

import socket
import sys
import time

PORT, CHUNK = 29501, 1 << 20
LONGEST_S = 600.0


def send(address: str) -> None:
    """Send to the first who comes, until this process is ended."""
    with socket.create_server((address, PORT)) as server:
        stream, _ = server.accept()
        chunk = bytes(CHUNK)
        while True:
            stream.sendall(chunk)


def receive(address: str) -> float:
    """Receive from the one that sends, as soon as it is there. Returns bytes per second."""
    deadline, buffer = time.monotonic() + LONGEST_S, bytearray(CHUNK)
    while True:
        try:
            stream = socket.create_connection((address, PORT), timeout=LONGEST_S)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    with stream:
        received, first, began = 0, 0, 0.0
        while size := stream.recv_into(buffer):
            received += size
            if not began and received >= CHUNK:
                first, began = received, time.perf_counter()
        if not began:
            sys.exit("error: the other has ended before the first megabyte came")
        return (received - first) / (time.perf_counter() - began)


if __name__ == "__main__":
    role, address = sys.argv[1:]
    if role == "send":
        send(address)
    else:
        print(receive(address))
