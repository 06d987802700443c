"""--minutes for real: a killed run counts its time on after a resume, and repeats its rates."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from p2p_llm_forge.config import TrainConfig, as_dict
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.shape import learning_rate_of
from p2p_llm_forge.peers.join import join
from p2p_llm_forge.peers.links import Links
from p2p_llm_forge.training import timing, trial
from p2p_llm_forge.training.budget import Budget
from p2p_llm_forge.training.checkpoint import commit
from p2p_llm_forge.training.interruptions import Interrupted
from p2p_llm_forge.training.job import open_job
from p2p_llm_forge.training.learner import new_model
from p2p_llm_forge.training.run_record import RunRecord
from p2p_llm_forge.training.timing import Planning, timed
from tests import runs
from tests.memory_channel import clusters, run_ranks
from tests.training.saved import writer
from tests.training.slow_models import SlowModels
from train import train

SECONDS = 60.0
PLANNED = ("plan    ", "expected")


def saved(folder, step):
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())


def rates_of(decisions, end, warmup_steps):
    """By a loop: every update takes its part of what is left, and so does the rate."""
    left, total, rates, totals = 1.0, 0, [], dict(map(tuple, decisions))
    for step in range(end):
        total = totals.get(step, total)
        rates.append(left * min(1.0, (step + 1) / (warmup_steps + 1)))
        left -= left / (total - step)
    return rates


@pytest.mark.slow
def test_a_run_that_was_killed_ends_by_the_seconds_of_all_its_sessions(zygote, prepared, tmp_path):
    folder, logs = tmp_path / "run", [tmp_path / "first.log", tmp_path / "second.log"]
    settings = {"max_steps": None, "minutes": SECONDS / 60, "learning_rate": 1e-3}
    settings |= {"sync": "diloco", "sync_every": 5}
    settings |= {"log_every": 1, "keep_checkpoints": 100}
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
    said = logs[1].read_text()
    assert end > killed_at and f"resuming  after step {killed_at}" in said
    assert "changed  " not in said  # what was chosen holds, its warm-up too
    warmup_steps = saved(folder, killed_at)["config"]["warmup_steps"]
    assert saved(folder, end)["config"]["warmup_steps"] == warmup_steps > 0
    # What was decided before holds; the clock goes on from there, and not from 0.
    assert after["decisions"][: len(before["decisions"])] == before["decisions"]
    assert after["decisions"][-1][1] == end == runs.results(folder)["steps"]
    assert before["seconds"] < after["seconds"] < 2 * SECONDS
    rates = [line["learning_rate"] for line in runs.lines(folder) if "learning_rate" in line]
    assert rates == pytest.approx(
        [1e-3 * one for one in rates_of(after["decisions"], end, warmup_steps)], abs=1e-7
    )
    assert len(rates) == end and rates[-1] < 0.2 * max(rates)


def test_minutes_and_a_number_of_updates_contradict_each_other():
    for other in ({"epochs": 1.0}, {"max_steps": 5}):
        with pytest.raises(ForgeError, match="leave out --minutes or --"):
            TrainConfig("data", "run", minutes=1.0, **other).problems().raise_any()


def test_a_time_shorter_than_the_start_is_refused_and_leaves_nothing(config, tmp_path):
    with pytest.raises(ForgeError, match="--minutes 0.001 is too short") as refused:
        train(replace(config, max_steps=None, minutes=0.001))
    assert not (tmp_path / "run").exists()
    assert "give it --minutes" in str(refused.value)


def test_a_model_that_is_too_slow_for_the_time_is_refused_after_one_block(config, monkeypatch):
    slow = SlowModels(trial, monkeypatch, block_s=37.0)
    with pytest.raises(ForgeError, match="--minutes 5 is too short"):
        train(replace(config, max_steps=None, minutes=5.0))
    assert slow.sizes == [1]


@pytest.mark.parametrize("block_s", [0.02, 0.2, 2.0])
@pytest.mark.parametrize("is_given", [False, True])
def test_measuring_takes_a_tenth_of_the_time_at_most(config, monkeypatch, is_given, block_s):
    config = replace(config, max_steps=None, minutes=2.0, batch_size=None)
    if not is_given:
        config = replace(config, model_type=None, config_overrides=None)
    slow = SlowModels(trial, monkeypatch, block_s)
    with join(config) as cluster:
        job = open_job(config, cluster)
        with contextlib.suppress(ForgeError):
            timed(config, job, time.monotonic())
    assert 0 < slow.now() <= 12 and slow.sizes[0] == 1
    assert max(slow.sizes) == job.plan.micro_batch_size or block_s > 0.02


def test_a_slow_peer_is_timed_by_fewer_micro_batches_and_all_know_its_speed(
    open_small_job, monkeypatch
):
    slow, seconds = SlowModels(trial, monkeypatch), (0.5, 20.0)
    links = Links([[math.nan, 1e-3], [1e-3, math.nan]], [[math.nan, 1e9], [1e9, math.nan]])
    monkeypatch.setattr(timing, "measure_links", lambda cluster: links)
    job = open_small_job(max_steps=None, minutes=5.0)
    lm = new_model(job)
    monkeypatch.setattr(trial, "new_model", lambda job: copy.deepcopy(lm))

    def act(cluster):
        cluster.accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
        slow.block_s = seconds[cluster.rank]
        own = replace(job, cluster=cluster)
        planning = Planning(job.config, own, Budget(300.0, 0.0, clock=lambda: 0.0))
        return planning._measure([0])[0].token_s, list(slow.sizes)

    with clusters(2) as ranks:
        of_fast, of_slow = run_ranks(ranks, act)
    assert of_fast == (pytest.approx(20 / 32), [1, 1, 8, 8, 8])
    assert of_slow == (pytest.approx(20 / 32), [1])


def test_a_run_by_the_clock_and_one_by_number_do_not_resume_each_other(config, capsys):
    train(replace(config, max_steps=2))
    by_clock = replace(config, max_steps=None, minutes=1.0)
    with pytest.raises(ForgeError, match="ends after a number of updates, not by --minutes") as no:
        train(replace(by_clock, resume="auto"))
    capsys.readouterr()
    train(replace(by_clock, dry_run=True))
    (problem,), said = no.value.problems, capsys.readouterr().out
    assert problem.found in said and problem.fix in said
    assert "continues it" not in said and "updates  " not in said


def test_what_was_planned_is_said_after_a_resume_and_in_a_dry_run_too(config, capsys):
    by_number = replace(config, resume="auto")
    config = replace(by_number, max_steps=None, minutes=1.0, max_seconds=0.1, save_every=0)
    with pytest.raises(Interrupted):
        train(config)
    planned = [line for line in capsys.readouterr().out.splitlines() if line[:8] in PLANNED]
    assert len(planned) == 2
    train(replace(config, dry_run=True))
    dry = capsys.readouterr().out
    assert "\n".join(planned) in dry and "--resume auto continues it" in dry
    (saved,) = Path(config.output_dir).glob("checkpoint-*")
    elsewhere = replace(config, resume=str(saved), output_dir=config.output_dir + "2")
    train(replace(elsewhere, dry_run=True))
    dry = capsys.readouterr().out
    assert "\n".join(planned) in dry and f"--resume {saved} continues it" in dry
    with pytest.raises(Interrupted):
        train(config)
    resumed = capsys.readouterr().out
    assert "resuming  after" in resumed and "\n".join(planned) in resumed
    with pytest.raises(ForgeError, match="ends by the clock") as no:
        train(by_number)
    train(replace(by_number, dry_run=True))
    (problem,), dry = no.value.problems, capsys.readouterr().out
    assert problem.found in dry and problem.fix in dry and "continues it" not in dry


def test_a_run_that_was_killed_before_it_saved_anything_is_planned_again(config, tmp_path):
    """run.json is all there is of it, and holds its depth and its batch."""
    config = replace(config, max_steps=None, minutes=1.0, batch_size=None)
    config = replace(config, model_type=None, config_overrides=None, resume="auto")

    def opened():
        with join(config) as cluster:
            return timed(config, open_job(config, cluster), time.monotonic())

    first = opened()
    (tmp_path / "run").mkdir()
    RunRecord(first.identity()).write(tmp_path / "run")
    again = opened()
    assert again.identity() == first.identity()
    assert first.budget.plan.keys() == again.budget.plan.keys() != set()
    assert again.plan.total_steps != timing.FIRST_GUESS and again.config.warmup_steps > 0
    # One that was begun when another family was the default.
    before = first.identity() | {"model_type": "llama", "depth": 2}
    RunRecord(before).write(tmp_path / "run")
    assert {name: opened().identity()[name] for name in before} == before


@pytest.mark.parametrize("asked", [{"batch_size": 256}, {"micro_batch_size": 200}])
def test_what_is_planned_counts_the_updates_that_are_taken(config, asked):
    config = replace(config, max_steps=None, minutes=3.0, **{"batch_size": None, **asked})
    with join(config) as cluster:
        job = timed(config, open_job(config, cluster), time.monotonic())
    updates, chosen = job.plan.total_steps, job.budget.plan["chosen"]
    tokens = 32 * sum(asked.values())
    assert job.plan.tokens_per_update == chosen["update_tokens"] == tokens
    assert chosen["tokens"] == updates * tokens
    assert f"about {updates:,} updates of {tokens:,} tokens" in job.budget.words[0]
    assert job.config.warmup_steps == int(timing.WARMUP * updates)


def test_a_loaded_model_reads_a_small_text_four_times_and_no_loss_is_expected(config, tmp_path):
    train(replace(config, max_steps=1))
    again = {"model_name": str(tmp_path / "run"), "output_dir": str(tmp_path / "tuned")}
    again |= dict.fromkeys(("model_type", "config_overrides", "learning_rate", "batch_size"))
    config = replace(config, **again, max_steps=None, minutes=3.0)
    with join(config) as cluster:
        job = timed(config, open_job(config, cluster), time.monotonic())
    split, read = job.data.manifest.splits["train"], job.plan.total_steps * job.plan.batch_size
    assert 3.9 * split.blocks < read <= 4 * split.blocks
    assert job.budget.most_updates == job.plan.total_steps
    assert job.config.warmup_steps == math.ceil(0.05 * job.plan.total_steps)
    (words,) = job.budget.words
    assert "the text 4.0 times" in words and "ends before the time is over" in words
    assert {one["bits_per_byte"] for one in job.budget.plan.values()} == {None}


@pytest.mark.parametrize(
    ("overrides", "is_chosen"), [("tie_word_embeddings=true", True), ("hidden_size=64", False)]
)
def test_a_depth_is_chosen_unless_a_size_was_given(config, overrides, is_chosen):
    config = replace(config, max_steps=None, minutes=3.0, model_type=None)
    config = replace(config, config_overrides=overrides)
    with join(config) as cluster:
        job = timed(config, open_job(config, cluster), time.monotonic())
    assert job.config.config_overrides == overrides
    assert ("the model as given" in job.budget.words[0]) == (not is_chosen)
    assert job.budget.plan["chosen"]["depth"] == (job.config.depth if is_chosen else None)


DEFAULT_MODEL = {"model_type": None, "config_overrides": None, "depth": 1}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (DEFAULT_MODEL, None),
        ({**DEFAULT_MODEL, "learning_rate": 1e-5}, None),  # no more than of its own rate
        ({**DEFAULT_MODEL, "learning_rate": 0.1}, None),
        ({**DEFAULT_MODEL, "weight_decay": 0.3}, 0.3),
        ({**DEFAULT_MODEL, "optimizer": "adamw"}, 0.1),
        ({"optimizer": "muon"}, 0.1),  # of a shape that it was not measured with
    ],
)
def test_the_weight_decay_follows_from_the_text_where_that_was_measured(config, asked, expected):
    config = replace(config, max_steps=None, minutes=3.0, optimizer=None, learning_rate=None)
    config = replace(config, **asked)
    with join(config) as cluster:
        job = timed(config, open_job(config, cluster), time.monotonic())
    updates = job.data.manifest.splits["train"].blocks / job.plan.batch_size  # of a reading
    rate = max(learning_rate_of("muon", 1), asked.get("learning_rate", 0))
    by_text = max(0.1, min(0.05, 1 / (0.7 * updates)) / rate)
    assert job.config.weight_decay == (expected or pytest.approx(by_text, rel=0.05))


def test_rounds_are_at_most_a_tenth_of_the_updates_and_stay_so(config, tmp_path):
    config = replace(config, max_steps=None, minutes=3.0, batch_size=256, sync="diloco")
    with join(config) as cluster:
        first = timed(config, open_job(config, cluster), time.monotonic())
        assert 1 <= first.config.sync_every <= max(1, first.plan.total_steps // 10) < 50
        assert not [line for line in first.budget.words if line.startswith("note")]

        def write(folder):
            writer(3, config=as_dict(first.config))(folder)

        (tmp_path / "run").mkdir()
        commit(tmp_path / "run", 3, write, TrainConfig())
        again = replace(config, resume="auto")
        resumed = timed(again, open_job(again, cluster), time.monotonic())
    assert resumed.config.sync_every == first.config.sync_every


def test_longer_rounds_that_were_asked_for_stay_and_are_noted(config):
    config = replace(config, max_steps=None, minutes=3.0, batch_size=256)
    config = replace(config, sync="diloco", sync_every=1000)
    with join(config) as cluster:
        job = timed(config, open_job(config, cluster), time.monotonic())
    assert job.config.sync_every == 1000 and job.plan.total_steps < 3000
    (note,) = [line for line in job.budget.words if line.startswith("note")]
    shorter = int(re.search(r"--sync-every (\d+) would be", note)[1])
    assert "fewer than 3 rounds of 1000" in note and shorter <= max(1, job.plan.total_steps // 10)


def test_a_batch_that_is_chosen_leaves_room_for_peers_that_may_come(config):
    config = replace(config, max_steps=None, minutes=4.0, batch_size=None)
    sizes = []
    for launch in ({}, {"is_elastic": True, "most_processes": 150}):
        with join(config) as cluster:
            cluster.launch = replace(cluster.launch, **launch)
            job = timed(config, open_job(config, cluster), time.monotonic())
        sizes.append(job.plan.batch_size)
        assert f" updates of {job.plan.tokens_per_update:,} tokens" in job.budget.words[0]
    assert sizes[0] < 150 <= sizes[1]


def test_a_dry_run_shows_the_plan(config, tmp_path, capsys):
    train(replace(config, max_steps=None, minutes=1.0, dry_run=True))
    said = capsys.readouterr().out
    assert "\nplan      the model as given, about " in said and "\nexpected  about " in said
    assert "twice the time" in said and "one more peer" in said
    assert not (tmp_path / "run").exists()
