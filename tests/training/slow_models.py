"""Models that are slow, or large, without taking time or memory: for what is tried of them."""

from __future__ import annotations

import threading
from typing import Any

import torch

from p2p_llm_forge.model.loss import NextTokenLoss


def too_small_for_more_than(blocks: float, length: int = 32) -> Any:
    """A hook before forwards: those of more tokens than are in so many blocks fail as on a GPU."""

    def check(model: Any, inputs: Any) -> None:
        if inputs[0].numel() > blocks * length:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return check


class SlowModels:
    """What models take by a clock of their own; each rank, a thread, has one.

    trial, as a module: whose models and clock are to be these.
    """

    def __init__(self, trial: Any, monkeypatch: Any, block_s: float = 0.0) -> None:
        self._own, self._block_s = threading.local(), block_s
        models = self

        class Slow(NextTokenLoss):
            def forward(self, inputs: Any, *more: Any) -> Any:
                models.sizes.append(len(inputs))
                models.wait(models.block_s * len(inputs))
                return super().forward(inputs, *more)

        monkeypatch.setattr(trial, "NextTokenLoss", Slow)
        monkeypatch.setattr(trial, "device_clock", self.now)

    @property
    def block_s(self) -> float:
        """Seconds of this rank for a block."""
        return getattr(self._own, "block_s", self._block_s)

    @block_s.setter
    def block_s(self, block_s: float) -> None:
        self._own.block_s = block_s

    @property
    def sizes(self) -> list[int]:
        """The blocks of this rank's forwards so far."""
        if not hasattr(self._own, "sizes"):
            self._own.sizes = []
        return self._own.sizes

    def wait(self, seconds: float) -> None:
        """So much of this rank's time goes by."""
        self._own.now = self.now() + seconds

    def now(self) -> float:
        return getattr(self._own, "now", 0.0)
