"""Waiting without a report: often at first, less often later, and never for longer than asked."""

from __future__ import annotations

from p2p_llm_forge import polling
from p2p_llm_forge.polling import pauses, wait_for


def test_the_first_true_value_is_returned():
    answers = iter(["", 0, "there", "later"])
    assert wait_for(lambda: next(answers)) == "there"


def test_after_the_time_the_last_value_is_returned_and_one_look_is_always_taken():
    looks = []
    assert wait_for(lambda: looks.append(1), timeout_s=0.0) is None
    assert len(looks) == 1


def test_pauses_double_up_to_the_longest(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(polling.time, "sleep", slept.append)
    for _, _ in zip(range(6), pauses(shortest_s=1.0, longest_s=5.0), strict=False):
        pass
    assert slept[:5] == [1.0, 2.0, 4.0, 5.0, 5.0]
