"""A run that ends by the clock: its rate never jumps, ends at zero, and follows from decisions."""

from __future__ import annotations

import random

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.config.train import SCHEDULES
from p2p_llm_forge.training.pace import Pace, paced_learning_rate, saved_pace


def decided_at_random(seed):
    """Decisions of a run whose machine is now twice as fast, now half as fast."""
    draw, pairs, done = random.Random(seed), [(0, 400)], 0
    for _ in range(30):
        done += draw.randint(1, 12)
        if done >= pairs[-1][1]:
            break
        left = (400 - done) * draw.choice([0.5, 0.8, 1.0, 1.3, 2.0])
        pairs.append((done, done + max(1, int(left))))
    return pairs


@pytest.mark.parametrize("seed", range(8))
def test_progress_goes_from_0_to_1_without_a_jump_whatever_is_decided(seed):
    pairs = decided_at_random(seed)
    pace, end = Pace(pairs), pairs[-1][1]
    # Another way to the same: every update takes its part of what is left.
    expected, total = 0.0, pairs[0][1]
    totals = dict(pairs)
    for step in range(end):
        total = totals.get(step, total)
        assert pace.progress(step) == pytest.approx(expected, abs=1e-9)
        expected += (1 - expected) / (total - step)
    assert pace.total_steps == end and pace.progress(end) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(8))
def test_the_rate_warms_up_never_jumps_and_ends_near_zero(seed):
    pairs = decided_at_random(seed)
    pace, end = Pace(pairs), pairs[-1][1]
    rate = paced_learning_rate(TrainConfig(warmup_steps=9), pace)
    left = [1 - pace.progress(step) for step in range(end)]
    warm = [min(1.0, 0.1 * (step + 1)) for step in range(end)]
    expected = [one * factor for one, factor in zip(left, warm, strict=True)]
    assert [rate(step) for step in range(end)] == pytest.approx(expected, abs=2e-5)
    parts = [before - after for before, after in zip(left, left[1:], strict=False)]
    assert min(parts) > 0 and left[-1] <= 1.01 * parts[-1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_was_asked_for_is_that_of_a_run_whose_end_was_known(name):
    from p2p_llm_forge.model.optimizer import learning_rate_factor

    config = TrainConfig(lr_scheduler=name)
    known, paced = learning_rate_factor(config, 500), paced_learning_rate(config, Pace([(0, 500)]))
    if name == "inverse_sqrt":
        return  # counts updates from the warm-up, wherever the end is
    for step in range(500):
        assert paced(step) == pytest.approx(known(step), abs=0.01)


def test_a_resumed_pace_is_the_one_that_was_saved():
    pace = Pace(decided_at_random(1))
    state = {"budget": {"seconds": 12.5, "decisions": [list(pair) for pair in pace.decisions]}}
    again = saved_pace(state)
    assert again.decisions == pace.decisions
    assert [again.progress(n) for n in range(400)] == [pace.progress(n) for n in range(400)]
    assert saved_pace({}) is None


@pytest.mark.parametrize(
    "budget",
    [
        {},
        {"seconds": 1, "decisions": []},
        {"seconds": 1, "decisions": [[1, 5]]},
        {"seconds": 1, "decisions": [[0, 0]]},
        {"seconds": 1, "decisions": [[0, 5, 6]]},
        {"seconds": 1, "decisions": [[0, 5], [6, 9]]},
        {"seconds": 1, "decisions": [[0, 5], [3, 2]]},
        {"seconds": 1, "decisions": [[0, 5], [3, 9], [2, 9]]},
        {"seconds": -1, "decisions": [[0, 5]]},
        {"seconds": float("nan"), "decisions": [[0, 5]]},
        {"seconds": "1", "decisions": [[0, 5]]},
        {"seconds": 1, "decisions": [[0, 10**12]]},
    ],
)
def test_what_no_run_has_saved_is_refused(budget):
    with pytest.raises(ValueError):
        saved_pace({"budget": budget})
