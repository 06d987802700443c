"""Somebody on the way between two hosts: he keeps all bytes, and flips a bit when he is asked to.

    python -m tests.multihost.man_in_the_middle PORT CAPTURE TRIGGER

He listens at PORT, where nftables sends him the host's outgoing connections, and passes on what
both sides say. CAPTURE: a file of all bytes. TRIGGER: once this file exists, one bit is flipped in
the middle of the next large chunk.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
from pathlib import Path

ORIGINAL_DESTINATION, MARK = 80, 36  # SO_ORIGINAL_DST and SO_MARK of Linux
LARGE = 4096  # bytes: tensors, not headers


class Man:
    """What all his connections share."""

    def __init__(self, capture: Path, trigger: Path) -> None:
        self._capture, self._trigger = capture.open("ab", buffering=0), trigger
        self._lock, self._has_flipped = threading.Lock(), False

    def carry(self, source: socket.socket, target: socket.socket) -> None:
        """Pass on what one side says, until it ends."""
        try:
            while chunk := source.recv(2**16):
                with self._lock:
                    self._capture.write(chunk)
                    if len(chunk) >= LARGE and self._trigger.exists() and not self._has_flipped:
                        self._has_flipped = True
                        middle = len(chunk) // 2
                        chunk = chunk[:middle] + bytes([chunk[middle] ^ 4]) + chunk[middle + 1 :]
                target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()
            target.close()

    def serve(self, near: socket.socket) -> None:
        """One connection, to where it was meant to go."""
        packed = near.getsockopt(socket.SOL_IP, ORIGINAL_DESTINATION, 16)
        port, address = struct.unpack("!2xH4s8x", packed)
        far = socket.socket()
        far.setsockopt(socket.SOL_SOCKET, MARK, 1)  # nftables lets it pass
        far.connect((socket.inet_ntoa(address), port))
        for ends in ((near, far), (far, near)):
            threading.Thread(target=self.carry, args=ends, daemon=True).start()


def main(port: int, capture: Path, trigger: Path) -> None:
    man = Man(capture, trigger)
    with socket.create_server(("0.0.0.0", port)) as door:
        while True:
            try:
                man.serve(door.accept()[0])
            except OSError:
                continue  # nobody is there


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
