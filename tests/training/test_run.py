"""The clock of a run counts its updates only; what ranks ask for, the largest decides."""

from __future__ import annotations

import math
import signal
from types import SimpleNamespace

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.sync.base import SyncReport
from p2p_llm_forge.training import run as runs
from p2p_llm_forge.training.copies import Copies
from p2p_llm_forge.training.gauge import Gauge
from p2p_llm_forge.training.interruptions import NOTHING, OUT_OF_TIME, SAVE_NOW
from p2p_llm_forge.training.pace import Pace
from p2p_llm_forge.training.run import Clock, Due, Run


@pytest.fixture
def now(monkeypatch):
    """The time that clocks see, in seconds."""
    seconds = [100.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: seconds[0])
    return seconds


def test_a_clock_does_not_count_pauses(now):
    clock = Clock()
    clock.start()
    now[0] += 5
    with clock.paused():
        now[0] += 100
    now[0] += 2
    assert clock.seconds == 7
    with pytest.raises(KeyError), clock.paused():
        now[0] += 100
        raise KeyError
    assert clock.seconds == 7


def a_run(job, **more):
    """A run that has resumed after 10 updates, of what these tests look at."""
    parts = dict.fromkeys(("folder", "learner", "sync", "saving", "tracking", "balance"))
    parts |= {"held_out": None, "card_facts": None}
    parts |= {"learning_rate_factor": lambda step: 0.5, "blocks": range(100)}
    lines = SimpleNamespace(lines=[])
    lines.end_line = lines.lines.append
    parts |= {"window": lines, "first_step": 10, "first_position": 80}
    parts["gauge"] = Gauge(0.0, None, None)
    parts["saving"] = SimpleNamespace(copies=Copies(job.cluster))
    return Run(job=job, train_loss=None, figures={}, **(parts | more))


def test_a_line_holds_what_the_updates_of_this_process_took(open_small_job, now):
    gauge = Gauge(began=90.0, flops_per_token=2e3, peak_flops=1e6, clock=lambda: now[0])
    run = a_run(open_small_job(learning_rate=0.1, max_steps=20), gauge=gauge)
    run.clock.start()
    gauge.start()
    now[0] += 4
    run.meter.add(SyncReport(bytes_sent=1000, seconds=1.0))
    run.end_line(12, math.inf)
    (line,) = run.window.lines
    assert line["step"] == 12 and line["learning_rate"] == 0.05 and line["grad_norm"] is None
    assert line["tokens"] == 12 * 8 * 32 and line["tokens_per_second"] == 2 * 8 * 32 / 4
    assert line["mfu"] == 2 * 8 * 32 / 4 * 2e3 / 1e6
    assert (line["seconds"], line["seconds_left"]) == (14.0, 16.0)  # 4 s for 2, 8 are left
    assert line["epoch"] == (80 + 2 * 8) / 100
    assert (line["communication"], line["bytes_sent_per_update"]) == (0.25, 500)


def test_the_largest_wish_is_that_of_all_and_speeds_are_told(open_small_job, monkeypatch):
    job, measured = open_small_job(), []
    run = a_run(
        job,
        folder=SimpleNamespace(is_lost=False),
        balance=SimpleNamespace(measured=measured.append),
        forward_s=1.5,
    )
    monkeypatch.setattr(
        job.cluster, "gather_numbers", lambda own: [own, [SAVE_NOW, 2.5, False, 0, 5e9]]
    )
    assert run.agree(15, 11) == 15 and run.agree(0, 12) == SAVE_NOW
    assert run.gauge.worst_memory_peak == 5e9
    assert measured == [[1.5, 2.5], [0.0, 2.5]]


def test_the_time_that_is_left_is_judged_by_the_tokens_of_each_rank(open_small_job):
    asked, balance = [], SimpleNamespace(measured=lambda seconds: None, shares=[6, 2])
    run = a_run(open_small_job(), folder=SimpleNamespace(is_lost=False), balance=balance)
    run.pace = Pace([(0, 20)])
    run.budget = SimpleNamespace(
        decide=lambda done, pace, shares: asked.append((done, pace, shares)) or 0,
        is_save_due=lambda: False,
    )
    run.agree(NOTHING, 11)
    assert asked == [(11, run.pace, [6 * 32, 2 * 32])]


def test_all_ranks_end_when_the_main_process_has_lost_the_folder(open_small_job):
    def confirm():
        raise ForgeError("taken over", "stop the other one")

    nobody = SimpleNamespace(measured=lambda seconds: None)
    folder = SimpleNamespace(is_lost=True, confirm=confirm, on_keepers=lambda act: act())
    run = a_run(open_small_job(), folder=folder)
    run.balance = nobody
    with pytest.raises(ForgeError, match="taken over"):
        run.agree(0, 11)


@pytest.mark.parametrize(
    ("done", "asked", "expected"),
    [
        (1, NOTHING, Due(evaluate=False, save=False, stop=False)),
        (4, NOTHING, Due(evaluate=True, save=False, stop=False)),
        (6, NOTHING, Due(evaluate=False, save=True, stop=False)),
        (12, NOTHING, Due(evaluate=True, save=True, stop=False)),
        (1, SAVE_NOW, Due(evaluate=False, save=True, stop=False)),
        # Asked to stop, a run saves at once and evaluates nothing first.
        (4, signal.SIGTERM, Due(evaluate=False, save=True, stop=True)),
        (1, OUT_OF_TIME, Due(evaluate=False, save=True, stop=True)),
        # The last update is evaluated and saved, and ends the run in peace.
        (13, NOTHING, Due(evaluate=True, save=True, stop=False)),
        (13, signal.SIGTERM, Due(evaluate=True, save=True, stop=False)),
    ],
)
def test_what_is_due(open_small_job, done, asked, expected):
    run = a_run(open_small_job(eval_every=4, save_every=6, max_steps=13))
    assert run.due_after(done, asked) == expected


def test_never_is_only_at_the_end(open_small_job):
    run = a_run(open_small_job(max_steps=100))
    assert not any(run.is_due(step, 0) for step in range(1, 100)) and run.is_due(100, 0)
    assert [step for step in range(1, 10) if run.is_due(step, 3)] == [3, 6, 9]
