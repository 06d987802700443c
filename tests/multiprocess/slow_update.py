"""A program for tests: train.py, whose second update takes rank 1 three times --peer-timeout."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

import train
from p2p_llm_forge.data import order

PEER_TIMEOUT_S = 3
original = order.micro_batches


def compute(seconds: float) -> None:
    """Keep a core and the library busy, in long calls."""
    matrix, until = torch.randn(1500, 1500), time.monotonic() + seconds
    while time.monotonic() < until:
        matrix @ matrix


def slowly(*args: Any) -> Any:
    """Called once in every update."""
    slowly.calls += 1  # type: ignore[attr-defined]
    if slowly.calls == 2 and os.environ.get("RANK") == "1":  # type: ignore[attr-defined]
        print("slow update", flush=True)
        compute(3 * PEER_TIMEOUT_S)
    return original(*args)


def main() -> int:
    slowly.calls = 0  # type: ignore[attr-defined]
    order.micro_batches = slowly
    return train.main()
