"""A run is timed and forecast by its own model, and keeps the strategy it has begun with."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from p2p_llm_forge.config import TrainConfig, as_dict
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.links import Links
from p2p_llm_forge.sync.forecast import CANDIDATES, Strategy
from p2p_llm_forge.training import forecast, trial
from p2p_llm_forge.training.budget import Budget
from p2p_llm_forge.training.learner import new_model


def test_auto_takes_of_a_run_by_ddp_no_settings_of_rounds():
    """Without rounds they would be refused."""
    begun = as_dict(TrainConfig(sync="ddp", compress="int8")) | {"outer_lr": 0.5}
    auto = TrainConfig(dataset_path="data", output_dir="run", sync="auto")
    config = forecast.as_begun(auto, begun)
    assert (config.sync, config.compress, config.outer_lr) == ("ddp", "int8", None)
    config.problems().raise_any()


@pytest.mark.parametrize(
    "begun", [{}, {"sync": 5}, {"sync": "auto"}, {"sync": "ddp", "compress": []}]
)
def test_auto_refuses_a_checkpoint_that_names_no_strategy(begun):
    auto = TrainConfig(dataset_path="data", output_dir="run", sync="auto")
    with pytest.raises(ForgeError, match="does not say how its peers") as error:
        forecast.as_begun(auto, begun)
    assert "--sync ddp" in error.value.problems[0].fix


def test_auto_takes_of_a_run_by_rounds_all_their_settings():
    rounds = TrainConfig(sync="diloco", sync_every=7, outer_lr=0.8, fragments=2, compress="int4")
    config = forecast.as_begun(TrainConfig(sync="auto", learning_rate=0.5), as_dict(rounds))
    for name in ("sync", "sync_every", "outer_lr", "fragments", "compress"):
        assert getattr(config, name) == getattr(rounds, name), name
    assert config.learning_rate == 0.5


def test_a_chosen_strategy_is_a_valid_configuration():
    auto = TrainConfig(dataset_path="data", output_dir="run", sync="auto")
    for strategy in (Strategy(compress="int8"), Strategy("diloco", "int4", 100, 4, 10)):
        config = forecast.with_strategy(auto, strategy)
        config.problems().raise_any()
        assert (config.sync, config.compress) == (strategy.sync, strategy.compress)
    assert config.round_length() == 100


@pytest.fixture
def timed(open_small_job, alone, monkeypatch):
    """A job whose forwards need no Accelerate."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    monkeypatch.setattr(alone, "accelerator", SimpleNamespace(autocast=nullcontext))
    monkeypatch.setattr(forecast, "COMPUTING_S", 0.0)
    return open_small_job(micro_batch_size=2)


def test_an_update_is_timed_by_its_micro_batches(timed, monkeypatch):
    """With every measurement taken for a second: four micro-batches and the optimizer's step."""
    monkeypatch.setattr(trial, "seconds", lambda act: (act(), 1.0)[1])
    lm = new_model(timed)
    before = [p.detach().clone() for p in lm.parameters()]
    assert forecast.update_s_by_rank(timed, lm) == [5.0]
    after = list(lm.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "no update"


def by_clock(job, updates, **settings):
    """The same with --minutes, and a time for so many updates."""
    plan, config = replace(job.plan, total_steps=updates), replace(job.config, **settings)
    return replace(job, plan=plan, config=config, budget=Budget(60.0, 0.0))


@pytest.mark.parametrize(
    ("updates", "rounds"), [(4000, {20, 50, 100}), (600, {20, 50, 60}), (60, {6})]
)
def test_a_run_that_ends_by_the_clock_has_ten_rounds_at_least(timed, updates, rounds):
    """Only where rounds end is it decided when it does."""
    job = by_clock(timed, updates, sync="auto")
    found = forecast.forecasts(job, new_model(job), Links([[math.nan]], [[math.nan]]), [1.0])
    strategies = [one.strategy for one in found]
    assert {one.sync_every for one in strategies} == {0, *rounds}
    assert len({*strategies}) == len(strategies)
    for one in strategies:
        forecast.with_strategy(job.config, one).problems().raise_any()


def test_rounds_that_nobody_asked_for_are_short_and_go_with_the_other_settings(timed):
    def length(updates, **settings):
        return forecast.round_length_for(
            by_clock(timed, updates, sync="diloco", **settings), updates
        )

    assert [length(updates) for updates in (10_000, 500, 370, 60, 9)] == [50, 50, 37, 6, 1]
    assert length(370, eval_every=100) == 25  # which it is evaluated at the end of
    assert length(370, fragments=4, overlap_steps=5) == 37
    assert length(60, fragments=4, overlap_steps=6) is None


def test_strategies_that_do_not_go_with_the_run_are_left_out(timed):
    nobody = Links([[math.nan]], [[math.nan]])
    lm = new_model(timed)
    found = forecast.forecasts(timed, lm, nobody, [1.0])
    fragments = {one.strategy.fragments for one in found}
    assert found and max(fragments) <= 4
    # Without --minutes a run is as long as it is: no rounds are shortened for it.
    assert [one.strategy for one in found] == [one for one in CANDIDATES if one.fragments <= 4]
    assert all(one.times_alone == pytest.approx(1.0) for one in found if one.strategy.sync == "ddp")
