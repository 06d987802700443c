"""--minutes for real: a killed run counts its time on after a resume, and repeats its rates."""

from __future__ import annotations

import json
import os
import signal

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from tests import runs

SECONDS = 36.0


def saved(folder, step):
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())


def rates_of(decisions, end):
    """By a loop: every update takes its part of what is left, and so does the rate."""
    left, total, rates, totals = 1.0, 0, [], dict(map(tuple, decisions))
    for step in range(end):
        total = totals.get(step, total)
        rates.append(left * min(1.0, (step + 1) / 2))
        left -= left / (total - step)
    return rates


@pytest.mark.slow
def test_a_run_that_was_killed_ends_by_the_seconds_of_all_its_sessions(zygote, prepared, tmp_path):
    folder, logs = tmp_path / "run", [tmp_path / "first.log", tmp_path / "second.log"]
    settings = {"max_steps": None, "minutes": SECONDS / 60, "learning_rate": 1e-3}
    settings |= {"sync": "diloco", "sync_every": 5}
    settings |= {"log_every": 1, "keep_checkpoints": 100, "warmup_steps": 1}
    words = runs.flags(prepared, folder, **settings)
    ranks = runs.start_ranks(zygote, words, 2, logs[0])
    runs.wait_for_checkpoint(zygote, ranks[0], folder, 1, logs[0])
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    for pid in ranks:
        zygote.wait(pid)
    killed_at = runs.newest_step(folder)
    before = saved(folder, killed_at)["budget"]
    assert before["seconds"] < SECONDS

    ranks = runs.start_ranks(zygote, words, 2, logs[1])
    assert [zygote.wait(pid) for pid in ranks] == [0, 0], runs.read(logs[1])
    end = runs.newest_step(folder)
    after = saved(folder, end)["budget"]
    assert end > killed_at and f"resuming  after step {killed_at}" in logs[1].read_text()
    # What was decided before holds; the clock goes on from there, and not from 0.
    assert after["decisions"][: len(before["decisions"])] == before["decisions"]
    assert after["decisions"][-1][1] == end == runs.results(folder)["steps"]
    assert before["seconds"] < after["seconds"] < 2 * SECONDS
    rates = [line["learning_rate"] for line in runs.lines(folder) if "learning_rate" in line]
    assert rates == pytest.approx(
        [1e-3 * one for one in rates_of(after["decisions"], end)], abs=1e-7
    )
    assert len(rates) == end and rates[-1] < 0.2 * max(rates)


def test_minutes_and_a_number_of_updates_contradict_each_other():
    for other in ({"epochs": 1.0}, {"max_steps": 5}):
        with pytest.raises(ForgeError, match="leave out --minutes or --"):
            TrainConfig("data", "run", minutes=1.0, **other).problems().raise_any()


def test_a_time_shorter_than_the_start_is_refused_and_leaves_nothing(config, tmp_path):
    from dataclasses import replace

    from train import train

    with pytest.raises(ForgeError, match="--minutes 0.001 is too short") as refused:
        train(replace(config, max_steps=None, minutes=0.001))
    assert not (tmp_path / "run").exists()
    assert "give it --minutes" in str(refused.value)


def test_a_run_by_the_clock_and_one_by_number_do_not_resume_each_other(config, tmp_path):
    from dataclasses import replace

    from train import train

    train(replace(config, max_steps=2))
    with pytest.raises(ForgeError, match="ends after a number of updates, not by --minutes"):
        train(replace(config, max_steps=None, minutes=1.0, resume="auto"))
