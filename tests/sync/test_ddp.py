"""Gradients on their way when a run ends."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest
import torch

from p2p_llm_forge.peers.channel import Channel
from p2p_llm_forge.polling import wait_for
from p2p_llm_forge.sync.ddp import GradientAveraging


def test_a_bucket_that_waits_when_the_run_ends_is_told_to_ddp_and_not_to_the_user(caplog):
    """As when a peer is lost: one exchange hangs until its timeout, the next never begins."""
    begun, gate = threading.Event(), threading.Event()

    class Hanging(GradientAveraging):
        def __init__(self):
            self._channel, self.is_priming = Channel(0, 1), False

        def _exchange_of(self, bucket):
            return begun.set, lambda _: gate.wait(60) and bucket.buffer()

    sync, bucket = Hanging(), SimpleNamespace(buffer=lambda: torch.zeros(3))
    first, second = (sync._exchange(bucket) for _ in range(2))
    assert begun.wait(60)
    closing = threading.Thread(target=sync._channel.close)
    closing.start()
    try:
        assert wait_for(second.done, timeout_s=60)
    finally:
        gate.set()
        closing.join()
    with pytest.raises(CancelledError):
        second.wait()
    assert first.wait().tolist() == [0, 0, 0]
    assert not caplog.records
