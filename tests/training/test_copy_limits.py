"""Copies that nobody has asked for take a tenth of the time between saves, or say what would do."""

from __future__ import annotations

import re

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.training.copy_limits import END_S, MEASURED_S, Limits


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


def limits_after(updates, seconds, total_steps=10_000, longest_s=None, **settings):
    """Those of a run that has taken so many updates in so many seconds."""
    clock = Clock()
    limits = Limits(TrainConfig(**settings), total_steps, longest_s, clock)
    limits.start(0)
    clock.now_s += seconds
    limits.mark(updates)
    return limits


def test_what_was_asked_for_takes_as_long_as_it_does():
    limits = limits_after(10, 10, replicate_checkpoints=3)
    assert (limits.wanted, limits.limit_s(), limits.limit_s(is_at_end=True)) == (3, None, None)
    assert not limits.is_too_large(10**15)


def test_by_default_two_machines_hold_it_if_that_takes_a_tenth_of_the_time_between_saves():
    limits = limits_after(50, 100, save_every=500)  # two seconds an update
    assert limits.wanted == 2
    assert limits.limit_s() == pytest.approx(100)
    assert limits.is_too_slow(101) and not limits.is_too_slow(99)
    assert not limits_after(1, 1, replicate_checkpoints=2).is_too_slow(10**6)
    quick = limits_after(1, 0.001, save_every=10)
    assert quick.limit_s() == MEASURED_S and quick.is_too_slow(0.01), "what it takes becomes known"
    assert limits_after(1, 0.001, save_every=10).limit_s(is_at_end=True) == END_S
    only_at_the_end = limits_after(50, 100, total_steps=200, save_every=0)
    assert only_at_the_end.limit_s() == pytest.approx(40)


def test_where_the_clock_decides_when_to_save_it_decides_here_too():
    limits = limits_after(50, 100, longest_s=30.0, save_every=500)
    assert limits.limit_s() == pytest.approx(3)
    assert "--save-every" not in limits.too_slow(5, 10**6, 10**8), "which would change nothing"


@pytest.mark.parametrize(
    "settings",
    [{}, {"sync": "diloco", "sync_every": 70}, {"keep_best": True, "eval_every": 40}],
    ids=["ddp", "rounds", "best"],
)
@pytest.mark.parametrize("takes_s", [0.4, 3, 50, 700])
def test_the_interval_that_is_named_allows_the_copy(settings, takes_s):
    limits = limits_after(100, 10, save_every=10, total_steps=10**6, **settings)
    assert limits.is_too_slow(takes_s)
    said = limits.too_slow(takes_s / 4, 25 * 10**6, 100 * 10**6)
    (every,) = map(int, re.findall(r"--save-every (\d+) would allow it", said))
    followed = limits_after(100, 10, save_every=every, **settings)
    assert not followed.is_too_slow(takes_s)
    assert followed.is_too_slow(3 * takes_s + 1.4), "not far more than needed"
    assert every % settings.get("sync_every", 1) == 0
    assert every % settings.get("eval_every", 1) == 0
    assert f"at {100 / takes_s:,.1f} MB/s" in said


def test_no_interval_is_named_that_the_run_does_not_reach():
    limits = limits_after(100, 10, save_every=10, total_steps=50)
    assert "--save-every" not in limits.too_slow(5, 10**6, 10**8)
    assert "--replicate-checkpoints 2" in limits.too_slow(5, 10**6, 10**8)
    assert "nothing had come after 5 s" in limits.too_slow(5, 0, 10**8)


def test_after_a_copy_that_was_given_up_ever_fewer_are_tried_until_one_is_made():
    limits = limits_after(10, 10)
    tried = []
    for number in range(16):
        if limits.is_turn():
            tried.append(number)
            limits.given_up()
    assert tried == [0, 2, 6, 14]
    limits.copied()
    assert all(limits.is_turn() for _ in range(3))


def test_more_than_a_machine_fetches_unasked_is_not_copied_unasked():
    assert limits_after(1, 1).is_too_large(11 * 10**9)
    assert not limits_after(1, 1).is_too_large(9 * 10**9)
    assert not limits_after(1, 1, fetch="yes").is_too_large(11 * 10**9)
