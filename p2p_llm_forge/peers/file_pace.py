"""How files are sent behind the training's own traffic: in gaps, and with little in its way.

What waits in the kernel when an exchange of training begins leaves before it. So that is kept
small, as a time of the link: how fast that is shows while frames follow each other without a pause.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SLOWEST = 1.25e6  # bytes per second, until it is known
FRAME_S, QUEUE_S = 0.005, 0.01  # of the link: one frame, and what waits in the kernel
LEAST_FRAME, LEAST_QUEUE, MOST_QUEUE = 16 << 10, 32 << 10, 1 << 20  # bytes
MEASURED = 1 << 20  # bytes in a row that show how fast the link is
IDLE_S = 0.1  # without a frame: others were not waiting for the link


class Pace:
    """Of one connection. stand_back: waits while training exchanges, and says whether it did."""

    def __init__(self, stand_back: Callable[[], bool], longest_frame: int) -> None:
        self._stand_back, self._longest_frame = stand_back, longest_frame
        self.bytes_per_s = SLOWEST
        self._began = self._sent_at = 0.0
        self._count = self._to_skip = 0  # bytes
        self._restart()

    @property
    def queue(self) -> int:
        """How many bytes may wait in the kernel."""
        return round(min(max(QUEUE_S * self.bytes_per_s, LEAST_QUEUE), MOST_QUEUE))

    def next_frame(self) -> int:
        """The size of the next frame, as soon as it may leave."""
        if self._stand_back() or time.monotonic() > self._sent_at + IDLE_S:
            self._restart()
        return round(min(max(FRAME_S * self.bytes_per_s, LEAST_FRAME), self._longest_frame))

    def sent(self, count: int) -> None:
        """The kernel has taken so many bytes."""
        self._sent_at = time.monotonic()
        if self._to_skip > 0:  # they only fill the kernel's buffers
            self._to_skip -= count
            self._began = self._sent_at
            return
        self._count += count
        spent_s = self._sent_at - self._began
        if self._count >= MEASURED and spent_s > 0:
            self.bytes_per_s = self._count / spent_s
            self._count, self._began = 0, self._sent_at

    def _restart(self) -> None:
        self._began = self._sent_at = time.monotonic()
        self._count, self._to_skip = 0, 4 * self.queue
