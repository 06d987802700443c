"""The order of data is pure arithmetic: every block once an epoch, whatever the world."""

from __future__ import annotations

import itertools

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data import order as data_order
from p2p_llm_forge.errors import ForgeError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 255, 1000, 4097])
def test_an_epoch_is_a_permutation_of_the_blocks(size):
    order = [data_order.permute(index, size, seed=3, epoch=1) for index in range(size)]
    assert sorted(order) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(data_order.permute(index, 100, seed, epoch) for index in range(100))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_a_permutation_looks_shuffled():
    size = 10_000
    order = [data_order.permute(index, size, seed=0, epoch=0) for index in range(size)]
    # Of a random permutation about one element stays in place and half of the neighbours ascend.
    assert sum(place == index for index, place in enumerate(order)) < 10
    ascents = sum(a < b for a, b in itertools.pairwise(order))
    assert 0.47 * size < ascents < 0.53 * size


def test_any_position_of_a_huge_corpus_is_found_without_walking_there():
    blocks = data_order.blocks_at(10**6 * 512, count=512, num_blocks=10**9, seed=1)
    assert len(set(blocks)) == 512 and max(blocks) < 10**9


WORLDS = [
    (world, micro, factor, blocks)
    for world in (1, 2, 3, 4, 8)
    for micro in (1, 2, 5)
    for factor in (1, 3)
    for blocks in (7, 64, 101)
]


@pytest.mark.parametrize(("world", "micro", "factor", "num_blocks"), WORLDS)
def test_every_block_is_read_once_an_epoch_by_exactly_one_rank(world, micro, factor, num_blocks):
    batch_size = world * micro * factor
    steps = 2 * num_blocks  # 2 * batch_size whole epochs
    stream = []
    for step in range(steps):
        update = data_order.blocks_at(step * batch_size, batch_size, num_blocks, seed=5)
        sizes = data_order.equal_shares(batch_size, world)
        shares = [data_order.share_of_rank(update, sizes, rank) for rank in range(world)]
        for share in shares:
            assert [len(m) for m in data_order.micro_batches(share, micro)] == [micro] * factor
        assert list(itertools.chain(*shares)) == update
        stream += update
    assert len(stream) == 2 * batch_size * num_blocks
    for start in range(0, len(stream), num_blocks):
        assert sorted(stream[start : start + num_blocks]) == list(range(num_blocks))


def test_the_batch_size_does_not_change_with_the_number_of_processes():
    config = TrainConfig(batch_size=24)
    plans = [data_order.plan_updates(config, 100, 32, world) for world in (1, 2, 3, 4)]
    assert {plan.batch_size for plan in plans} == {24}
    assert [plan.shares for plan in plans] == [[24], [12] * 2, [8] * 3, [6] * 4]
    assert {plan.total_steps for plan in plans} == {5}


def test_a_batch_size_that_does_not_divide_names_those_that_do():
    with pytest.raises(ForgeError, match="--batch-size 10 .* 4 processes .* use 8 or 12"):
        data_order.plan_updates(TrainConfig(batch_size=10), 100, 32, world_size=4)
    with pytest.raises(ForgeError, match="use 24$"):
        data_order.plan_updates(
            TrainConfig(batch_size=10, micro_batch_size=6), 100, 32, world_size=4
        )


def test_the_batch_size_may_be_said_as_users_of_run_clm_say_it():
    config = TrainConfig(micro_batch_size=4, gradient_accumulation_steps=3)
    plan = data_order.plan_updates(config, 100, 32, world_size=2)
    assert (plan.batch_size, plan.micro_batch_size, plan.shares) == (24, 4, [12, 12])
    config.batch_size = 16
    with pytest.raises(ForgeError, match="--batch-size 16"):
        data_order.plan_updates(config, 100, 32, world_size=2)


def test_epochs_become_steps_that_read_every_block():
    assert data_order.steps_of_epochs(1, num_blocks=100, batch_size=16) == 7
    assert data_order.steps_of_epochs(0.5, num_blocks=100, batch_size=10) == 5
    assert data_order.steps_of_epochs(3, num_blocks=2, batch_size=16) == 1


def test_a_number_of_peers_that_came_about_gets_uneven_shares():
    plan = data_order.plan_updates(TrainConfig(batch_size=10), 100, 32, 3, may_be_uneven=True)
    assert plan.shares == [4, 3, 3]
    with pytest.raises(ForgeError, match="cannot be dealt to 11 processes"):
        data_order.plan_updates(TrainConfig(batch_size=10), 100, 32, 11, may_be_uneven=True)


@pytest.mark.parametrize("speeds", [[1.0], [1, 1], [10, 1], [1, 2, 3], [5, 1e-9, 5], [1] * 7])
@pytest.mark.parametrize("batch_size", [7, 16, 64, 1000])
def test_shares_follow_the_speeds_of_the_ranks(speeds, batch_size):
    shares = data_order.shares_by_speed(batch_size, speeds)
    assert sum(shares) == batch_size and min(shares) >= 1
    spare = batch_size - len(speeds)
    for share, speed in zip(shares, speeds, strict=True):
        assert abs(share - 1 - spare * speed / sum(speeds)) < 1
