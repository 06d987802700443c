"""A stranger on the network who wants files of ranks, and knows neither secret nor token.

python file_stranger.py listen PORT ADDRESS ITS_PORT CAPTURE TRIGGER

He passes on what a rank and the one that it connects to say, and keeps it: what the rank said in
CAPTURE.said, the answers in CAPTURE.heard. While the file TRIGGER exists he flips one bit of each
large answer.

python file_stranger.py attack ADDRESS PORT CAPTURE

He tries all that he can think of, prints what he has got for each try as JSON, a line each, and
then "holding" while he holds 1000 connections, and "over" once all of them were closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import struct
import sys
import threading
import time
from pathlib import Path

LARGE = 20_000
HELD = 1000


def listen(port: str, address: str, its_port: str, capture: str, trigger: str) -> None:
    with socket.create_server(("0.0.0.0", int(port))) as door:
        print("listening", flush=True)
        while True:
            near, _ = door.accept()
            far = socket.create_connection((address, int(its_port)))
            for source, target, kind in ((near, far, "said"), (far, near, "heard")):
                words = (source, target, Path(f"{capture}.{kind}"), Path(trigger))
                threading.Thread(target=carry, args=words, daemon=True).start()


def carry(source: socket.socket, target: socket.socket, capture: Path, trigger: Path) -> None:
    with contextlib.suppress(OSError), capture.open("ab", buffering=0) as kept:
        while chunk := source.recv(1 << 16):
            kept.write(chunk)
            if len(chunk) > LARGE and trigger.exists():
                chunk = chunk[:LARGE] + bytes([chunk[LARGE] ^ 1]) + chunk[LARGE + 1 :]
            target.sendall(chunk)
    for one in (source, target):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def answer(address: str, port: int, *parts: bytes) -> bytes:
    """What comes back for some parts, each sent when something came for the one before."""
    got = b""
    with socket.create_connection((address, port), timeout=30) as connection:
        with contextlib.suppress(OSError):
            for number, part in enumerate(parts):
                connection.sendall(part)
                if number + 1 < len(parts):
                    got += connection.recv(1 << 16)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(1 << 16):
                got += chunk
    return got


def reflected(address: str, port: int, hello: bytes) -> bytes:
    """He sends back whatever he hears."""
    got = b""
    with contextlib.suppress(OSError):
        connection = socket.create_connection((address, port), timeout=30)
        connection.sendall(hello)
        while chunk := connection.recv(1 << 16):
            got += chunk
            connection.sendall(chunk)
    return got


def has_sent(connection: socket.socket, part: bytes) -> bool:
    """Whether the other side still takes what he sends."""
    with contextlib.suppress(OSError):
        return bool(connection.send(part))
    return False


def attack(address: str, its_port: str, capture: str) -> None:
    port = int(its_port)
    said = Path(f"{capture}.said").read_bytes()
    magic, nonce = said[:16], os.urandom(32)
    hello, as_itself, huge = (magic + struct.pack(">I", rank) + nonce for rank in (7, 0, 2**32 - 1))
    question = json.dumps({"ask": "part", "of": "all", "file": 0, "offset": 0, "size": 9}).encode()
    asked = struct.pack(">I", len(question)) + question
    tries = {
        "garbage": (os.urandom(1 << 20),),
        "zeros": (bytes(1 << 20),),
        "a web browser": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10,),
        "what was said": (said,),
        "what was said, in turns": (said[:52], said[52:84], said[84:]),
        "a proof of zeros": (hello, bytes(32), asked),
        "no proof": (hello, asked + bytes(32)),
        "as the rank itself": (as_itself, bytes(32), asked),
        "as a rank that is none": (huge, bytes(32), asked),
        "questions at once": (hello + bytes(32) + asked,),
    }
    for name, parts in tries.items():
        print(json.dumps([name, len(answer(address, port, *parts))]), flush=True)
    print(json.dumps(["reflected", len(reflected(address, port, hello))]), flush=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    held = [socket.create_connection((address, port), timeout=60) for _ in range(HELD)]
    slow = [socket.create_connection((address, port), timeout=60) for _ in range(8)]
    print("holding", flush=True)
    while slow:  # as slowly as he can
        slow = [one for one in slow if has_sent(one, magic[:1])]
        time.sleep(0.5)
    for one in held:
        with contextlib.suppress(OSError):
            assert not one.recv(1)
    print("over", flush=True)


if __name__ == "__main__":
    {"listen": listen, "attack": attack}[sys.argv[1]](*sys.argv[2:])
