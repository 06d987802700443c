"""The time of a run, played with a clock of the test: it ends on time whatever the machine does."""

from __future__ import annotations

import random
import time
from operator import mul

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training import budget as budgets
from p2p_llm_forge.training.budget import Budget
from p2p_llm_forge.training.pace import Pace


def played(
    seconds, update_s, guess=1000, used_s=0.0, every=1, ending_s=2.0, evaluated=0, shares=(10,)
):
    """A run on a made-up machine; returns its budget's seconds at the end, and its pace.

    update_s: of an update at so many seconds. every: updates between two sync points. evaluated:
    tokens of each rank in the evaluation at the end; shares: of each in an update.
    """
    now = [100.0]
    budget, pace = Budget(seconds, 97.0, used_s, clock=lambda: now[0]), Pace([(0, guess)])
    budget.ending_s, budget.evaluated_tokens = ending_s, evaluated
    budget.start(done=0)
    done = 0
    while done < pace.total_steps:
        now[0] += update_s(budget.spent_s)
        done += 1
        if done % every == 0 and (total := budget.decide(done, pace, shares)):
            pace.decide(done, total)
    now[0] += ending_s
    return budget.spent_s, pace


@pytest.mark.parametrize("guess", [1, 50, 1000, 10**6])
@pytest.mark.parametrize("update_s", [0.01, 0.1, 0.5])
def test_a_steady_machine_ends_on_time_whatever_was_guessed(guess, update_s):
    spent_s, pace = played(120, lambda _: update_s, max(guess, 20))
    if guess > 1:
        assert abs(spent_s - 120) < 0.02 * 120


@pytest.mark.parametrize("seed", range(10))
def test_a_machine_that_changes_by_a_factor_of_two_ends_within_5_percent(seed):
    draw = random.Random(seed)
    speeds = [draw.uniform(0.7, 1.4) for _ in range(100)]

    def update_s(at_s):
        return 0.1 * speeds[int(at_s / 20) % 100] * draw.uniform(0.8, 1.3)

    spent_s, pace = played(300, update_s)
    assert abs(spent_s - 300) < 0.05 * 300
    assert pace.progress(pace.total_steps) == pytest.approx(1.0)
    assert len(pace.decisions) < 250


def test_a_machine_that_becomes_slow_at_the_end_still_brings_the_rate_down():
    spent_s, pace = played(200, lambda at_s: 0.1 if at_s < 150 else 0.2)
    assert abs(spent_s - 200) < 0.05 * 200
    end = pace.total_steps
    assert 1 - pace.progress(end - 10) < 0.1  # ten updates before the end: nearly there


def test_rounds_decide_where_they_meet():
    spent_s, pace = played(300, lambda _: 0.2, every=20)
    assert abs(spent_s - 300) < 0.02 * 300
    assert all(done % 20 == 0 for done, _ in pace.decisions)


def test_sessions_before_count():
    spent_s, _ = played(300, lambda _: 0.1, used_s=200)
    assert abs(spent_s - 300) < 0.02 * 300


def test_time_is_kept_for_the_evaluation_at_the_end():
    with_it, _ = played(300, lambda _: 0.1, evaluated=4000)  # 4000 x 0.45 x 0.1 s / 10 = 18 s
    assert abs(with_it - (300 - 18)) < 3


@pytest.mark.parametrize(
    ("speeds", "shares"),
    [
        ([100, 100, 100, 100], [25, 25, 25, 25]),
        ([100, 100, 100, 25], [25, 25, 25, 25]),
        ([100, 100, 100, 25], [28, 28, 28, 7]),  # --balance auto
    ],
)
def test_the_evaluation_takes_as_long_as_the_slowest_of_several_peers(speeds, shares):
    """speeds: tokens a second that each trains on; it evaluates in 0.45 of that time."""
    token_s = [1 / speed for speed in speeds]
    update_s, evaluation_s = max(map(mul, shares, token_s)), 0.45 * max(token_s) * 1000
    trained_s, _ = played(300, lambda _: update_s, evaluated=1000, shares=shares)
    assert evaluation_s > 4 and abs(trained_s + evaluation_s - 300) < 2


def test_a_time_that_is_over_takes_one_more_update_and_ends():
    spent_s, pace = played(20, lambda _: 0.1, guess=10**6, used_s=100)
    assert pace.total_steps < 5


def test_a_time_shorter_than_the_start_is_refused_with_one_that_suffices():
    now = [130.0]
    budget = Budget(36, 100.0, clock=lambda: now[0])
    budget.ending_s = 4.0
    with pytest.raises(
        ForgeError, match=r"(?s)--minutes 0.6 is too short.* 30 s.* 8 s.*1.0 or more"
    ):
        budget.require_start(4.0)
    Budget(60, 100.0, clock=lambda: now[0]).require_start(8.0)


def test_a_process_began_when_its_launcher_did(monkeypatch):
    monkeypatch.setattr(budgets, "first_started", lambda: time.time() - 1000)
    assert time.monotonic() - budgets.process_began() == pytest.approx(1000, abs=60)
    monkeypatch.setattr(budgets, "first_started", lambda: time.time() + 1000)  # the clock was set
    assert time.monotonic() - budgets.process_began() == pytest.approx(0, abs=60)
