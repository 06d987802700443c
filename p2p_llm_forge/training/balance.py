"""Uneven peers: faster ranks take more blocks of the same update."""

from __future__ import annotations

import time
from types import TracebackType

from p2p_llm_forge.training.plan import shares_by_speed

# Updates that are measured before shares change: the first time (without the very first update,
# which warms up), and every time after.
FIRST_UPDATES, LATER_UPDATES = 3, 20


class Stopwatch:
    """Seconds that a block of code took."""

    seconds = 0.0

    def __init__(self, waits_for_device: bool) -> None:
        self._waits_for_device = waits_for_device

    def __enter__(self) -> Stopwatch:
        self._wait()
        self._started = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._started

    def _wait(self) -> None:
        if self._waits_for_device:
            import torch

            if torch.accelerator.is_available():
                torch.accelerator.synchronize()


class Balance:
    """The blocks that each rank takes of an update, adapted to the ranks' speeds if asked for.

    Forwards are timed, because backwards wait for the other ranks. Every rank sees the same
    measurements, so all come to the same shares. The updates stay what they are: sums over the
    same blocks.
    """

    def __init__(self, shares: list[int], is_adaptive: bool) -> None:
        self.shares = shares
        self._is_adaptive = is_adaptive and len(shares) > 1
        self._updates = -1
        self._window = FIRST_UPDATES
        self._seconds = [0.0] * len(shares)

    def stopwatch(self) -> Stopwatch:
        """Times a forward; waits for the device only where the time is used."""
        return Stopwatch(waits_for_device=self._is_adaptive)

    def measured(self, seconds: list[float]) -> None:
        """Note the seconds of each rank's forwards of an update; change the shares when due."""
        if not self._is_adaptive:
            return
        self._updates += 1
        if self._updates == 0:
            return
        self._seconds = [a + b for a, b in zip(self._seconds, seconds, strict=True)]
        if self._updates % self._window == 0:
            speeds = [
                share / max(spent, 1e-9)
                for share, spent in zip(self.shares, self._seconds, strict=True)
            ]
            self.shares = shares_by_speed(sum(self.shares), speeds)
            self._window, self._updates = LATER_UPDATES, 0
            self._seconds = [0.0] * len(self.shares)
