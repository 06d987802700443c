"""What leaves behind training's traffic has little in its way, however fast the link is."""

from __future__ import annotations

import pytest

from p2p_llm_forge.peers import file_pace
from p2p_llm_forge.peers.file_pace import Pace

LONGEST = 256 << 10


class Link:
    """A link of so many bytes per second behind a buffer of the kernel, by a clock of its own."""

    def __init__(self, bytes_per_s: float, monkeypatch) -> None:
        self.now, self.bytes_per_s, self._free_at = 1000.0, bytes_per_s, 1000.0
        monkeypatch.setattr(file_pace.time, "monotonic", lambda: self.now)

    def take(self, count: int, queue: int) -> None:
        """As a send does: returns once all but a full queue has left."""
        self._free_at = max(self._free_at, self.now) + count / self.bytes_per_s
        self.now = max(self.now, self._free_at - queue / self.bytes_per_s)


@pytest.mark.parametrize("mbit", [10, 100, 1000])
def test_frames_and_queue_are_short_times_of_the_link(monkeypatch, mbit):
    link = Link(mbit * 1e6 / 8, monkeypatch)
    pace = Pace(lambda: False, LONGEST)
    for _ in range(1000):
        frame = pace.next_frame()
        link.take(frame, 2 * pace.queue)
        pace.sent(frame)
    assert pace.bytes_per_s == pytest.approx(link.bytes_per_s, rel=0.1)
    assert pace.next_frame() / link.bytes_per_s < 0.015
    assert pace.queue / link.bytes_per_s < 0.03
    assert pace.next_frame() == LONGEST or mbit < 1000


def test_what_only_fills_a_buffer_after_a_wait_says_nothing(monkeypatch):
    link = Link(1.25e6, monkeypatch)
    pace = Pace(lambda: True, LONGEST)
    for _ in range(200):
        link.now += 0.5  # what standing back took
        frame = pace.next_frame()
        link.take(frame, 2 * pace.queue)
        pace.sent(frame)
    assert pace.bytes_per_s == 1.25e6 and frame == 16 << 10
