"""Uneven peers: faster ranks take more blocks of the same update."""

from __future__ import annotations

import time

import torch

from p2p_llm_forge.training.plan import shares_by_speed

# Updates that are measured before shares change: the first time (without the very first update,
# which warms up), and every time after.
FIRST_UPDATES, LATER_UPDATES = 3, 20


def device_clock() -> float:
    """Seconds by a clock, once the device has done all that it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class Balance:
    """The blocks that each rank takes of an update, adapted to the ranks' speeds if asked for.

    Forwards are timed, because backwards wait for the other ranks. Every rank sees the same
    measurements, so all come to the same shares. The updates stay what they are: sums over the
    same blocks.
    """

    def __init__(self, shares: list[int], is_adaptive: bool) -> None:
        self.shares = shares
        self._is_adaptive = is_adaptive and len(shares) > 1
        self.clock = device_clock if self._is_adaptive else time.perf_counter  # for forwards
        self._updates = -1
        self._window = FIRST_UPDATES
        self._seconds = [0.0] * len(shares)

    def measured(self, seconds: list[float]) -> None:
        """Note the seconds of each rank's forwards of an update; change the shares when due."""
        self._updates += 1
        if not self._is_adaptive or self._updates == 0:
            return
        self._seconds = [a + b for a, b in zip(self._seconds, seconds, strict=True)]
        if self._updates == self._window:
            pairs = zip(self.shares, self._seconds, strict=True)
            speeds = [share / max(spent, 1e-9) for share, spent in pairs]
            self.shares = shares_by_speed(sum(self.shares), speeds)
            self._window, self._updates = LATER_UPDATES, 0
            self._seconds = [0.0] * len(self.shares)
