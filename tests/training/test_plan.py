"""The plan of the updates: the batch is the same for any number of processes, and adds up."""

from __future__ import annotations

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training.plan import plan_updates, shares_by_speed, steps_of_epochs


def test_the_batch_size_does_not_change_with_the_number_of_processes():
    config = TrainConfig(batch_size=24)
    plans = [plan_updates(config, 100, 32, world) for world in (1, 2, 3, 4)]
    assert {plan.batch_size for plan in plans} == {24}
    assert [plan.shares for plan in plans] == [[24], [12] * 2, [8] * 3, [6] * 4]
    assert {plan.total_steps for plan in plans} == {5}


def test_a_batch_size_that_does_not_divide_names_those_that_do():
    with pytest.raises(ForgeError, match="(?s)--batch-size 10 .* 4 processes .* use 8 or 12"):
        plan_updates(TrainConfig(batch_size=10), 100, 32, world_size=4)
    with pytest.raises(ForgeError, match="use 24$"):
        plan_updates(TrainConfig(batch_size=10, micro_batch_size=6), 100, 32, world_size=4)


def test_the_batch_size_may_be_said_as_users_of_run_clm_say_it():
    config = TrainConfig(micro_batch_size=4, gradient_accumulation_steps=3)
    plan = plan_updates(config, 100, 32, world_size=2)
    assert (plan.batch_size, plan.micro_batch_size, plan.shares) == (24, 4, [12, 12])
    config.batch_size = 16
    with pytest.raises(ForgeError, match="--batch-size 16"):
        plan_updates(config, 100, 32, world_size=2)


@pytest.mark.parametrize(
    ("share", "length", "size"),
    [(16, 1024, 8), (16, 512, 8), (16, 256, 16), (64, 128, 32), (17, 1024, 6), (3, 64, 3)],
)
def test_a_forward_has_8_blocks_or_4096_tokens_and_all_are_about_even(share, length, size):
    plan = plan_updates(TrainConfig(batch_size=share), 100, length, world_size=1)
    assert plan.micro_batch_size == size
    loaded = plan_updates(TrainConfig(batch_size=share, model_name="m"), 100, length, world_size=1)
    assert loaded.micro_batch_size == min(size, 8), "it is rarely small"


def test_epochs_become_steps_that_read_every_block():
    assert steps_of_epochs(1, num_blocks=100, batch_size=16) == 7
    assert steps_of_epochs(0.5, num_blocks=100, batch_size=10) == 5
    assert steps_of_epochs(3, num_blocks=2, batch_size=16) == 1


def test_a_number_of_peers_that_came_about_gets_uneven_shares():
    plan = plan_updates(TrainConfig(batch_size=10), 100, 32, 3, may_be_uneven=True)
    assert plan.shares == [4, 3, 3]
    with pytest.raises(ForgeError, match="cannot be divided among 11 processes"):
        plan_updates(TrainConfig(batch_size=10), 100, 32, 11, may_be_uneven=True)


@pytest.mark.parametrize("speeds", [[1.0], [1, 1], [10, 1], [1, 2, 3], [5, 1e-9, 5], [1] * 7])
@pytest.mark.parametrize("batch_size", [7, 16, 64, 1000])
def test_shares_follow_the_speeds_of_the_ranks(speeds, batch_size):
    shares = shares_by_speed(batch_size, speeds)
    assert sum(shares) == batch_size and min(shares) >= 1
    spare = batch_size - len(speeds)
    for share, speed in zip(shares, speeds, strict=True):
        assert abs(share - 1 - spare * speed / sum(speeds)) < 1
